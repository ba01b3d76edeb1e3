"""Checkpoints are used and resumed with the config and classes that they record."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.events import EventStorage
from safetensors.torch import save_file
from torch import nn

from resnext_det import load_config
from resnext_det.data.checks import check_datasets
from resnext_det.data.registered import datasets_root, register_datasets
from resnext_det.engine.checkpoints import Checkpointer
from resnext_det.engine.evaluate import evaluate, last_checkpoint, of_run
from resnext_det.engine.hooks import Evaluation
from resnext_det.engine.predictor import Predictor
from resnext_det.engine.recorded_config import changes, check_classes, function_changes
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError, DatasetError, TrainingError, WeightsError

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
SMALL = "SOLVER.MAX_ITER 4 SOLVER.STEPS () SOLVER.WARMUP_ITERS 0 SOLVER.IMS_PER_BATCH 2"
SMALL += " SOLVER.BASE_LR 0.01 SOLVER.CHECKPOINT_PERIOD 2 INPUT.MIN_SIZE_TRAIN (64,)"
SMALL += " INPUT.MAX_SIZE_TRAIN 96 TEST.EVAL_PERIOD 0 DATALOADER.NUM_WORKERS 0 SEED 3"


def config(folder: Path, *more: Any) -> CfgNode:
    words = [*SMALL.split(), "OUTPUT_DIR", folder, "DATASETS.TEST", "()", *more]
    return load_config(TOY, [str(word) for word in words])


@pytest.fixture(scope="module", autouse=True)
def toy_data(datasets: Path) -> Iterator[None]:
    register_datasets(datasets)
    yield
    register_datasets(datasets_root())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of 4 iterations, with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(config(folder))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return folder


@pytest.fixture
def killed(run: Path, tmp_path: Path) -> Path:
    """The same training as if killed after its second iteration."""
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "model_0000001.pth").write_bytes((run / "model_0000001.pth").read_bytes())
    return folder


def test_resume_uses_new_solver_settings(killed: Path) -> None:
    """Checked by the update itself: momentum 0.5 on the old buffer, new decay, new rate."""
    words = "SOLVER.BASE_LR 0.001 SOLVER.MOMENTUM 0.5 SOLVER.WEIGHT_DECAY 0.01"
    trainer = Trainer(config(killed, *words.split()))
    trainer.resume_or_load(resume=True)
    state = trainer._trainer.optimizer.state
    before = [
        (parameter, parameter.detach().clone(), state[parameter]["momentum_buffer"].clone())
        for group in trainer._trainer.optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(before) > 20 and any(buffer.any() for _, _, buffer in before)
    trainer.iter = trainer.start_iter
    with EventStorage(trainer.start_iter) as storage:
        trainer.storage = trainer._trainer.storage = storage
        trainer._trainer.iter = trainer.iter
        trainer.run_step()
    for parameter, weight, buffer in before:
        expected = 0.5 * buffer + parameter.grad + 0.01 * weight
        torch.testing.assert_close(state[parameter]["momentum_buffer"], expected)
        torch.testing.assert_close(parameter.detach(), weight - 0.001 * expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("MODEL.BACKBONE.FREEZE_AT 4", "MODEL.BACKBONE.FREEZE_AT was 0 and is 4"),
        ("SEED 4", "SEED was 3 and is 4"),
        ("MODEL.PIXEL_STD [1.0,1.0,1.0]", "MODEL.PIXEL_STD was"),
        ("MODEL.RESNEXT.PRECISION stock", "MODEL.RESNEXT.PRECISION was fp32 and is stock"),
        ("", "in another order"),
    ],
)
def test_resume_refuses_other_settings(words: str, message: str, killed: Path) -> None:
    trainer = Trainer(config(killed, *words.split()))
    if not words:
        trainer.checkpointer._class_names = tuple(reversed(trainer.checkpointer._class_names))
    with pytest.raises((ConfigError, DatasetError), match=message):
        trainer.resume_or_load(resume=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
        ("INPUT.FORMAT", "RGB"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True),
        ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]),
    ],
)
def test_refuses_other_function(key: str, value: object, run: Path, tmp_path: Path) -> None:
    more = [key, value, "MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1", True]
    more += ["MODEL.WEIGHTS", run / "model_final.pth"]
    cfg = config(tmp_path, *more)
    for use in (evaluate, Predictor):
        with pytest.raises(ConfigError, match=rf"{key} was .* and is .*ALLOW_OTHER_FUNCTION"):
            use(cfg)
    Predictor(config(tmp_path, *more, "MODEL.RESNEXT.ALLOW_OTHER_FUNCTION", True))


def test_evaluates_weights_that_no_training_could_resume(run: Path, tmp_path: Path) -> None:
    """Stripped of the optimizer, with other objects beside the weights, or in another format."""
    final = tmp_path / "model_final.pth"
    (tmp_path / "last_checkpoint").write_text(final.name)
    (tmp_path / "config.yaml").write_text("")
    model = torch.load(run / "model_final.pth")["model"]
    cfg = config(tmp_path, "MODEL.WEIGHTS", final)
    for others in ({}, {"args": argparse.Namespace(lr=1)}):
        torch.save({"model": model, **others}, final)
        assert of_run(tmp_path) == (tmp_path / "config.yaml", final)
        assert "tensors of the detector loaded" in Predictor(cfg).report
    save_file(model, final)
    assert of_run(tmp_path)[1] == final
    assert "tensors of the detector loaded" in Predictor(cfg).report
    for use in (evaluate, Predictor):
        with pytest.raises(WeightsError, match="cannot be fetched"):
            use(config(tmp_path, "MODEL.WEIGHTS", "https://127.0.0.1:1/model_final.pth"))


def test_saves_the_iteration_of_an_early_stop(killed: Path) -> None:
    trainer = Trainer(config(killed))
    trainer.resume_or_load(resume=True)
    (evaluation,) = (hook for hook in trainer._hooks if isinstance(hook, Evaluation))
    evaluation._patience = evaluation.waited = 1
    trainer.train()
    content = torch.load(killed / "model_final.pth")
    assert content["iteration"] == content["trainer"]["iteration"] == 1


WITHOUT_EFFECT = """MODEL.WEIGHTS a.pth MODEL.DEVICE cuda MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.7
MODEL.RPN.NMS_THRESH 0.5 MODEL.RPN.POST_NMS_TOPK_TEST 100 INPUT.MIN_SIZE_TEST 100
MODEL.RPN.LOSS_WEIGHT 3.0 MODEL.BACKBONE.FREEZE_AT 3 MODEL.RESNETS.NORM BN
MODEL.RESNEXT.FORM aggregated OUTPUT_DIR elsewhere MODEL.ROI_HEADS.IOU_THRESHOLDS [0.6]
MODEL.RPN.HEAD_NAME CheckpointedRPNHead"""


def test_function_depends_on_network_only() -> None:
    """Keys that this version does not know count, too."""
    cfg = config(Path("run"))
    recorded = cfg.dump()
    changed = cfg.clone()
    changed.defrost()
    changed.merge_from_list(WITHOUT_EFFECT.split())
    assert function_changes(recorded, changed) == {}
    older = CfgNode(CfgNode.load_cfg(recorded))
    older.MODEL.RESNETS.NEW_TRICK = 1
    changed.MODEL.RESNETS.NEW_TRICK = 2
    changed.MODEL.RESNETS.NORM = "GN"
    assert function_changes(older.dump(), changed) == {
        "MODEL.RESNETS.NEW_TRICK": (1, 2),
        "MODEL.RESNETS.NORM": ("FrozenBN", "GN"),
    }
    assert function_changes(get_cfg().dump(), get_cfg()) == {}


def test_records_without_a_precision_are_of_stock_arithmetic() -> None:
    cfg = config(Path("run"))
    older = CfgNode(CfgNode.load_cfg(cfg.dump()))
    del older.MODEL.RESNEXT["PRECISION"]
    assert changes(older.dump(), cfg) == {"MODEL.RESNEXT.PRECISION": ("stock", "fp32")}


def test_evaluates_checkpoint_that_resume_would_load(killed: Path, tmp_path: Path) -> None:
    cfg = config(killed)
    (killed / "model_final.pth").write_bytes(b"damaged")
    for pointer in (b"model_final.pth", b"\xff\x00" * 100, b"../model_0000001.pth"):
        (killed / "last_checkpoint").write_bytes(pointer)
        assert last_checkpoint(cfg) == killed / "model_0000001.pth"
    (killed / "model_0000001.pth").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"no checkpoint of .* can be resumed"):
        last_checkpoint(cfg)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        last_checkpoint(config(tmp_path / "empty"))


@pytest.fixture
def animals(toy_data: None) -> Iterator[str]:
    """A data set with the classes cat, dog and owl."""
    name = "animals_test"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).thing_classes = ["cat", "dog", "owl"]
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("learned", "message"),
    [
        ("cat dog owl", ""),
        ("", ""),  # as in checkpoints of other programs
        ("dog cat owl", "in another order: class 0 is 'dog' and 'cat'"),
        ("cat hound owl", "class 1 is 'hound' and 'dog'"),
        ("cat dog", r"differ: only in data set .*: 'owl'"),
    ],
)
def test_compares_recorded_classes(
    learned: str, message: str, animals: str, tmp_path: Path
) -> None:
    checkpointer = Checkpointer(nn.Linear(2, 2), tmp_path, class_names=learned.split())
    checkpointer.save("model_final", iteration=1)
    words = ["MODEL.WEIGHTS", tmp_path / "model_final.pth", "DATASETS.TRAIN", "()"]
    cfg = config(tmp_path, *words, "DATASETS.TEST", f"('{animals}',)")
    if not message:
        check_classes(cfg)
        return
    with pytest.raises(DatasetError, match=message):
        check_classes(cfg)


def test_compares_classes_of_training_and_test_data(datasets: Path, tmp_path: Path) -> None:
    """The number of classes is right, so AP would just be near 0."""
    toy = datasets / "toy_coco"
    document = json.loads((toy / "annotations" / "instances_val2017.json").read_text())
    one, other = document["categories"][:2]
    one["name"], other["name"] = other["name"], one["name"]
    swapped = tmp_path / "swapped.json"
    swapped.write_text(json.dumps(document))
    trained = toy / "annotations" / "instances_train2017.json"
    names = ["classes_train", "classes_test"]
    register_coco_instances(names[0], {}, str(trained), str(toy / "train2017"))
    register_coco_instances(names[1], {}, str(swapped), str(toy / "val2017"))
    trained_on = ["DATASETS.TRAIN", f"('{names[0]}',)", "DATASETS.TEST", f"('{names[1]}',)"]
    cfg = config(tmp_path / "run", *trained_on)
    model = nn.Linear(2, 2)
    untrained = config(tmp_path, "DATASETS.TRAIN", "()", "DATASETS.TEST", f"{tuple(names)}")
    try:
        for use in (
            lambda: check_datasets(cfg, names),
            lambda: Trainer(cfg),
            lambda: Trainer.test(cfg, model),
            lambda: Trainer.test(untrained, model),
        ):
            with pytest.raises(DatasetError, match="another order: class 0 is 'circle' and 'squ"):
                use()
        # Those of the model count, and not those of the weights that its training started from.
        learned = ["square", "circle", "triangle", "star", "cross", "crescent"]
        check_classes(cfg, learned=learned)
        with pytest.raises(DatasetError, match="data set classes_train"):
            check_classes(untrained, learned=learned)
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
