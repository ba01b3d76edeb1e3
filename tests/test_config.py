from __future__ import annotations

import re
from pathlib import Path

import detectron2.model_zoo
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model

from resnext_det import add_resnext_config, load_config, model_zoo
from resnext_det.config import complete
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError

SHAPES = {
    "faster_rcnn_R_50_FPN_paper": (50, 1, 64),
    "faster_rcnn_R_101_FPN_paper": (101, 1, 64),
    "faster_rcnn_X_50_32x4d_FPN_paper": (50, 32, 4),
    "faster_rcnn_X_101_32x4d_FPN_paper": (101, 32, 4),
    "faster_rcnn_X_101_64x4d_FPN_paper": (101, 64, 4),
    "faster_rcnn_X_101_32x8d_FPN_paper": (101, 32, 8),
    **{f"faster_rcnn_X_50_32x4d_FPN_{schedule}": (50, 32, 4) for schedule in ("1x", "3x", "128")},
    **{f"faster_rcnn_X_101_32x4d_FPN_{schedule}": (101, 32, 4) for schedule in ("1x", "3x")},
    "faster_rcnn_X_26_8x4d_FPN_toy": (26, 8, 4),
}

# Measured with Detectron2's own builder; FrozenBN's tensors are no parameters.
PARAMETERS = {
    "faster_rcnn_R_50_FPN_paper": 41_699_936,
    "faster_rcnn_R_101_FPN_paper": 60_639_840,
    "faster_rcnn_X_50_32x4d_FPN_paper": 41_156_704,
    "faster_rcnn_X_101_32x4d_FPN_paper": 60_235_872,
    "faster_rcnn_X_101_64x4d_FPN_paper": 99_448_416,
    "faster_rcnn_X_101_32x8d_FPN_paper": 104_784_480,
}


def test_every_shipped_config_is_known_here() -> None:
    assert model_zoo.names() == sorted(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shipped_config_builds(name: str) -> None:
    """On the meta device: shapes and numbers of parameters without the memory."""
    cfg = model_zoo.get_config(name)
    resnets = cfg.MODEL.RESNETS
    assert SHAPES[name] == (resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP)
    with torch.device("meta"):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "meta"
        model = build_model(cfg)
    if name in PARAMETERS:
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in SHAPES if name.endswith("_paper")])
def test_the_papers_schedule(name: str) -> None:
    """Section 5.4 and appendix B: 8 GPUs, 2 images each, 0.02 for 120k, a tenth to 180k."""
    cfg = model_zoo.get_config(name)
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.REFERENCE_WORLD_SIZE) == (16, 8)
    assert (solver.BASE_LR, solver.GAMMA) == (0.02, 0.1)
    assert (solver.STEPS, solver.MAX_ITER) == ((120_000,), 180_000)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY, solver.NESTEROV) == (0.9, 0.0001, False)
    assert cfg.DATASETS.TRAIN == ("coco_2014_train", "coco_2014_valminusminival")
    assert cfg.DATASETS.TEST == ("coco_2014_minival",)
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["MODEL.RESNETS.DEPHT", "50"], "did you mean MODEL.RESNETS.DEPTH?"),
        (["SOLVER.BASE_LR", "quick"], "SOLVER.BASE_LR is 'quick'; it must be a number above 0"),
        (["SOLVER.BASE_LR"], "pairs"),
        (["MODEL.RESNETS.DEPTH", "None"], "MODEL.RESNETS.DEPTH is empty (None); its default is 50"),
        (["MODEL.RESNEXT.CHECKPOINT_STAGES", "None"], "CHECKPOINT_STAGES is empty"),
        (["MODEL.DEVICE", "None"], "MODEL.DEVICE is empty"),
    ],
)
def test_a_wrong_override_is_named(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config("faster_rcnn_X_50_32x4d_FPN_paper", overrides)


def test_an_unknown_key_in_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("MODEL:\n  RESNEXTS:\n    FORM: grouped\n")
    with pytest.raises(ConfigError, match=r"MODEL.RESNEXTS.*did you mean MODEL.RESN"):
        load_config(file)


def test_a_missing_file_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="faster_rcnn_X_50_32x4d_FPN_paper"):
        load_config("no/such/file.yaml")


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch {marker}']", "MODEL: [", "- 1\n- 2\n"]
)
def test_hostile_and_broken_yaml_is_refused(text: str, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("{marker}", str(marker)))
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_config(file)
    assert not marker.exists()


def test_the_device_follows_the_machine() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert expected == load_config("faster_rcnn_X_50_32x4d_FPN_paper").MODEL.DEVICE


def test_a_config_without_our_keys_gets_their_defaults() -> None:
    plain = get_cfg()
    plain.SOLVER.MAX_ITER = 7
    plain.freeze()
    full = get_cfg()
    add_resnext_config(full)
    full.SOLVER.MAX_ITER = 7
    found = complete(plain)
    assert found == full
    assert found.is_frozen()
    assert "SCALING" not in plain.SOLVER
    assert complete(found) is found
    partial = full.clone()
    partial.MODEL.RESNEXT = CfgNode({"FORM": "aggregated"})
    assert complete(partial).MODEL.RESNEXT == {**full.MODEL.RESNEXT, "FORM": "aggregated"}
    assert not complete(partial).is_frozen()


def test_the_trainer_takes_a_config_of_detectron2s_zoo(datasets: Path, tmp_path: Path) -> None:
    toy = datasets / "toy_coco"
    annotations = toy / "annotations" / "instances_val2017.json"
    register_coco_instances("plain_toy", {}, str(annotations), str(toy / "val2017"))
    cfg = detectron2.model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    words = [*("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TRAIN", "(64,)")]
    words += ["INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0", "SOLVER.STEPS", "()"]
    words += ["SOLVER.IMS_PER_BATCH", "1", "SOLVER.MAX_ITER", "1", "SOLVER.WARMUP_ITERS", "0"]
    words += ["OUTPUT_DIR", str(tmp_path), "DATASETS.TRAIN", "('plain_toy',)"]
    cfg.merge_from_list([*words, "DATASETS.TEST", "('plain_toy',)"])
    try:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
    finally:
        DatasetCatalog.remove("plain_toy")
    assert (tmp_path / "model_final.pth").is_file()
    assert (tmp_path / "inference" / "metrics.json").is_file()
