"""A detector is used, and a training resumed, under the settings that its checkpoint records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.events import EventStorage

from resnext_det import load_config
from resnext_det.checkpoint_file import read_run
from resnext_det.data.registered import datasets_root, register_datasets
from resnext_det.engine.evaluating import evaluate, last_checkpoint
from resnext_det.engine.predictor import Predictor
from resnext_det.engine.recorded_config import function_changes
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError, TrainingError

SMALL = "SOLVER.MAX_ITER 4 SOLVER.STEPS () SOLVER.WARMUP_ITERS 0 SOLVER.IMS_PER_BATCH 2"
SMALL += " SOLVER.BASE_LR 0.01 SOLVER.CHECKPOINT_PERIOD 2 INPUT.MIN_SIZE_TRAIN (64,)"
SMALL += " INPUT.MAX_SIZE_TRAIN 96 TEST.EVAL_PERIOD 0 DATALOADER.NUM_WORKERS 0 SEED 3"


def config(folder: Path, *more: Any) -> CfgNode:
    words = [*SMALL.split(), "OUTPUT_DIR", folder, "DATASETS.TEST", "()", *more]
    return load_config("faster_rcnn_X_26_8x4d_FPN_toy", [str(word) for word in words])


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


def copied(run: Path, tmp_path: Path) -> Path:
    """The training as if killed after its second iteration."""
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "model_0000001.pth").write_bytes((run / "model_0000001.pth").read_bytes())
    return folder


def one_update(trainer: Trainer) -> None:
    trainer.iter = trainer.start_iter
    with EventStorage(trainer.start_iter) as storage:
        trainer.storage = storage
        trainer._trainer.iter = trainer.iter
        trainer._trainer.storage = storage
        trainer.run_step()


def test_a_resume_makes_the_updates_that_the_config_names(run: Path, tmp_path: Path) -> None:
    """By the update itself: momentum 0.5 on the old buffer, the new decay, the new rate."""
    words = "SOLVER.BASE_LR 0.001 SOLVER.MOMENTUM 0.5 SOLVER.WEIGHT_DECAY 0.01"
    trainer = Trainer(config(copied(run, tmp_path), *words.split()))
    trainer.resume_or_load(resume=True)
    state = trainer._trainer.optimizer.state
    before = [
        (parameter, parameter.detach().clone(), state[parameter]["momentum_buffer"].clone())
        for group in trainer._trainer.optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(before) > 20 and any(buffer.any() for _, _, buffer in before)
    one_update(trainer)
    for parameter, weight, buffer in before:
        expected = 0.5 * buffer + parameter.grad + 0.01 * weight
        torch.testing.assert_close(state[parameter]["momentum_buffer"], expected)
        torch.testing.assert_close(parameter.detach(), weight - 0.001 * expected)


def test_unchanged_settings_resume_to_the_same_bits(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    trainer = Trainer(config(folder))
    trainer.resume_or_load(resume=True)
    trainer.train()
    ours, theirs = (torch.load(each / "model_final.pth") for each in (folder, run))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in ours["model"])
    groups = (each["trainer"]["_trainer"]["optimizer"]["param_groups"] for each in (ours, theirs))
    assert next(groups) == next(groups)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("MODEL.BACKBONE.FREEZE_AT 4", "MODEL.BACKBONE.FREEZE_AT was 0 and is 4"),
        ("SOLVER.BIAS_LR_FACTOR 2.0", "SOLVER.BIAS_LR_FACTOR was 1.0 and is 2.0"),
        ("SEED 4", "SEED was 3 and is 4"),
        ("MODEL.PIXEL_STD [1.0,1.0,1.0]", "MODEL.PIXEL_STD was"),
    ],
)
def test_what_a_resume_cannot_change_is_refused(
    words: str, said: str, run: Path, tmp_path: Path
) -> None:
    trainer = Trainer(config(copied(run, tmp_path), *words.split()))
    with pytest.raises(ConfigError, match=said):
        trainer.resume_or_load(resume=True)


def test_permuted_classes_are_refused(run: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(copied(run, tmp_path)))
    trainer.checkpointer._class_names = tuple(reversed(trainer.checkpointer._class_names))
    with pytest.raises(ConfigError, match=r"trained on 6 classes.*first that differs"):
        trainer.resume_or_load(resume=True)


OTHER_FUNCTION = [
    ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
    ("MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0]),
    ("INPUT.FORMAT", "RGB"),
    ("MODEL.RESNETS.STRIDE_IN_1X1", True),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0)),
    ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]),
    ("MODEL.RPN.BBOX_REG_WEIGHTS", (2.0, 2.0, 2.0, 2.0)),
]


@pytest.mark.parametrize(("key", "value"), OTHER_FUNCTION, ids=[key for key, _ in OTHER_FUNCTION])
def test_a_detector_is_not_evaluated_as_another_function(
    key: str, value: object, run: Path, tmp_path: Path
) -> None:
    more = [key, value, "MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1", True]
    more += ["MODEL.WEIGHTS", run / "model_final.pth"]
    cfg = config(tmp_path, *more)
    for road in (evaluate, Predictor):
        with pytest.raises(ConfigError, match=rf"{key} was .* and is .*ALLOW_OTHER_FUNCTION"):
            road(cfg)
    Predictor(config(tmp_path, *more, "MODEL.RESNEXT.ALLOW_OTHER_FUNCTION", True))


WITHOUT_EFFECT = """MODEL.WEIGHTS a.pth MODEL.DEVICE cuda MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.7
MODEL.RPN.NMS_THRESH 0.5 MODEL.RPN.POST_NMS_TOPK_TEST 100 INPUT.MIN_SIZE_TEST 100
MODEL.RPN.LOSS_WEIGHT 3.0 MODEL.RETINANET.NUM_CONVS 2 MODEL.BACKBONE.FREEZE_AT 3
MODEL.RESNETS.NORM BN MODEL.RESNEXT.FORM aggregated OUTPUT_DIR elsewhere
MODEL.ROI_MASK_HEAD.CONV_DIM 7 MODEL.BACKBONE.NAME build_resnet_fpn_backbone
MODEL.ROI_HEADS.IOU_THRESHOLDS [0.6]"""


def test_only_what_changes_the_function_counts() -> None:
    """A key that nobody thought of counts, those of other architectures do not."""
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


def test_the_best_survives_a_continuation_by_stock_detectron2(run: Path, tmp_path: Path) -> None:
    """Stock checkpoints hold no record of it; model_best.pth does."""
    folder = copied(run, tmp_path)
    trainer = Trainer(config(folder))
    trainer.resume_or_load(resume=True)
    (hook,) = [each for each in trainer._hooks if type(each).__name__ == "Evaluation"]
    hook.best, hook.best_iteration = 42.0, 1
    trainer.checkpointer.save("model_best", iteration=1)
    stock = DetectionCheckpointer(
        trainer._trainer.model, str(folder), optimizer=trainer._trainer.optimizer
    )
    stock.save("model_0000002", iteration=2)
    assert read_run(folder / "model_0000002.pth") is None
    again = Trainer(config(folder))
    again.checkpointer.checkpointables.pop("trainer")
    again.checkpointer.add_checkpointable("optimizer", again._trainer.optimizer)
    again.resume_or_load(resume=True)
    (hook,) = [each for each in again._hooks if type(each).__name__ == "Evaluation"]
    assert again.start_iter == 3
    assert (hook.best, hook.best_iteration) == (42.0, 1)


def test_an_evaluation_takes_the_checkpoint_that_a_resume_would(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    cfg = config(folder)
    (folder / "model_final.pth").write_bytes(b"damaged")
    for pointer in (b"model_final.pth", b"\xff\x00" * 100, b"../model_0000001.pth"):
        (folder / "last_checkpoint").write_bytes(pointer)
        assert last_checkpoint(cfg) == folder / "model_0000001.pth"
    (folder / "model_0000001.pth").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"no checkpoint of .* can be resumed"):
        last_checkpoint(cfg)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        last_checkpoint(config(tmp_path / "empty"))
