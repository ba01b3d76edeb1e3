"""Each key of Detectron2's config and of ours: honoured, refused, or said to have no effect."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from resnext_det import add_resnext_config, load_config
from resnext_det.backbones import build_detector
from resnext_det.config_rules import RULES, value_of
from resnext_det.config_use import idle_settings, idle_warning, refuse_impossible
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
NEWER = {"FLOAT32_PRECISION"}  # of Detectron2s after the one that is installed here
# Read by tools, by default_setup and for a checkpoint, outside of a new training.
OF_SET_UP = {
    *("VERSION", "CUDNN_BENCHMARK", "MODEL.WEIGHTS", "TEST.EXPECTED_RESULTS"),
    *("MODEL.RESNEXT.ALLOW_OTHER_FUNCTION", *NEWER),
}


def every_key(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from every_key(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_key_has_a_rule_that_its_default_meets() -> None:
    cfg = get_cfg()
    add_resnext_config(cfg)
    assert set(every_key(cfg)) - NEWER == set(RULES) - NEWER
    for key in every_key(cfg):
        assert RULES[key].holds(value_of(cfg, key)), key


class Recorder(CfgNode):  # type: ignore[misc]
    """A config that notes which of its keys are read."""

    read: ClassVar[set[str]] = set()

    @classmethod
    def of(cls, cfg: CfgNode, prefix: str = "") -> Recorder:
        found = cls()
        found.__dict__["prefix"] = prefix
        for name, value in cfg.items():
            node = cls.of(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else value
            dict.__setitem__(found, name, node)
        return found

    def __getitem__(self, name: str) -> Any:
        self.read.add(self.__dict__.get("prefix", "") + name)
        return super().__getitem__(name)


SMALL = [
    *("SOLVER.MAX_ITER", "1", "SOLVER.WARMUP_ITERS", "0", "SOLVER.STEPS", "()", "SEED", "1"),
    *("SOLVER.IMS_PER_BATCH", "1", "SOLVER.REFERENCE_WORLD_SIZE", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "64", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.DEVICE", "cpu"),
]


def trained(words: list[str], datasets: Path, folder: Path, patch: pytest.MonkeyPatch) -> Trainer:
    toy = datasets / "toy_coco"
    annotations = toy / "annotations" / "instances_val2017.json"
    name = f"use_{folder.name}"
    register_coco_instances(name, {}, str(annotations), str(toy / "val2017"))
    patch.setattr(Recorder, "read", set())
    words = [*words, "DATASETS.TRAIN", name, "DATASETS.TEST", name]
    cfg = load_config(TOY, [*SMALL, "OUTPUT_DIR", str(folder), *words])
    try:
        trainer = Trainer(Recorder.of(cfg))
        trainer.train()
    finally:
        DatasetCatalog.remove(name)
    return trainer


def test_what_a_training_does_not_read_is_said_to_have_no_effect(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By experiment: a key that nobody reads and that is not named fails."""
    trained([], datasets, tmp_path, monkeypatch)
    unread = set(RULES) - Recorder.read - OF_SET_UP
    cfg = load_config(TOY, SMALL).clone()
    cfg.defrost()
    silent = set()
    for key in sorted(unread):
        *path, name = key.split(".")
        node = cfg
        for part in path:
            node = node[part]
        kept, node[name] = node[name], "something else"
        if key not in idle_settings(cfg):
            silent.add(key)
        node[name] = kept
    assert silent == set()


def test_a_training_ends_with_the_figures_of_augmented_images(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 96)", "TEST.BEST.METRIC", "''"]
    words += ["SOLVER.EMA.ENABLED", "True"]
    trainer = trained(words, datasets, tmp_path, monkeypatch)
    assert set(trainer._last_eval_results) == {"bbox", "bbox_TTA"}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {"bbox/AP", "bbox_TTA/AP"} <= set(json.loads(lines[-1]))
    plain, augmented = (
        json.loads(next(folder.glob("detections_*.json")).read_text())
        for folder in (tmp_path / "inference", tmp_path / "inference_TTA")
    )
    assert plain != augmented
    average = json.loads((tmp_path / "inference_ema" / "metrics.json").read_text())
    assert average["weights"] == f"{tmp_path}, iteration {trainer.max_iter}"


IMPOSSIBLE = [
    (["TEST.AUG.ENABLED", "True", "MODEL.META_ARCHITECTURE", "RetinaNet"], "META_ARCHITECTURE"),
    (["TEST.AUG.ENABLED", "True", "MODEL.KEYPOINT_ON", "True"], "MODEL.KEYPOINT_ON"),
    (["MODEL.LOAD_PROPOSALS", "True"], "DATASETS.PROPOSAL_FILES_TRAIN names 0 files"),
    (
        ["MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TEST", "no-such-file.pkl"],
        "1 of them missing",
    ),
    (["MODEL.ROI_BOX_HEAD.USE_FED_LOSS", "True"], "USE_SIGMOID_CE True"),
    (
        [f"MODEL.ROI_BOX_HEAD.{key}" for key in ("USE_FED_LOSS", "USE_SIGMOID_CE")],
        "class_image_count",
    ),
    (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "the least and the greatest"),
    (["INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[300, 300]"], "INPUT.CROP.SIZE"),
    (["MODEL.FPN.NORM", "SyncBN"], "naiveSyncBN"),
    (["MODEL.PIXEL_STD", "[1.0]"], "MODEL.PIXEL_STD 1"),
]


@pytest.mark.parametrize(("words", "said"), IMPOSSIBLE, ids=lambda value: str(value)[:50])
def test_what_cannot_be_is_refused_before_anything_is_built(words: list[str], said: str) -> None:
    if all(word.isupper() and "." in word for word in words):
        words = [part for word in words for part in (word, "True")]
    cfg = load_config(TOY, [*SMALL, *words])
    with pytest.raises(ConfigError) as refused:
        refuse_impossible(cfg, processes=2)
    assert said in str(refused.value)
    refuse_impossible(load_config(TOY, SMALL), processes=2)


def test_pictures_need_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(TOY, [*SMALL, "VIS_PERIOD", "1"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="opencv-python-headless, or set VIS_PERIOD 0"):
        refuse_impossible(cfg)
    refuse_impossible(cfg, training=False)


def test_settings_without_effect_are_named_in_one_line() -> None:
    assert idle_warning(load_config(TOY)) is None
    given = ["MODEL.RETINANET.NUM_CLASSES", "3", "TEST.AUG.MIN_SIZES", "5", "GLOBAL.HACK", "2.0"]
    found = idle_warning(load_config(TOY, given)) or ""
    for part in ("RETINANET.NUM_CLASSES (see MODEL.META_ARCHITECTURE)", "TEST.AUG.MIN_SIZES (see"):
        assert part in found
    assert "GLOBAL.HACK (see nothing" in found


@pytest.mark.parametrize(
    "words",
    [
        ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64]]"],
        ["MODEL.RPN.IN_FEATURES", "['p2', 'p9']"],
        ["MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p4']"],
        ["MODEL.RPN.IOU_LABELS", "[0, 1]"],
    ],
    ids=lambda words: words[0],
)
def test_parts_that_do_not_fit_are_one_error_of_this_package(words: list[str]) -> None:
    cfg = load_config(TOY, [*SMALL, *words])
    for build in (build_detector, Trainer.build_model):
        with pytest.raises(ConfigError, match="no detector can be built from this config"):
            build(cfg)


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_proposals_that_are_a_program_are_refused(tmp_path: Path) -> None:
    """Detectron2 would run it; proposals as it writes them pass."""
    file, mark = tmp_path / "proposals.pkl", tmp_path / "executed"
    words = ["MODEL.LOAD_PROPOSALS", "True", "DATASETS.TEST", "()"]
    cfg = load_config(TOY, [*words, "DATASETS.PROPOSAL_FILES_TRAIN", f"('{file}',)"])
    boxes = [np.zeros((3, 4), np.float32)]
    good = {"ids": [1], "boxes": boxes, "objectness_logits": [np.zeros(3)], "bbox_mode": 0}
    file.write_bytes(pickle.dumps(good))
    refuse_impossible(cfg)
    file.write_bytes(pickle.dumps({**good, "ids": Hostile(mark)}))
    with pytest.raises(ConfigError, match=r"proposals\.pkl are not a pickle of arrays alone"):
        refuse_impossible(cfg)
    assert not mark.exists()
    for address in ("http://127.0.0.1:9/a.pkl", "https://example.org/a.pkl", "s3://bucket/a.pkl"):
        cfg = load_config(TOY, [*words, "DATASETS.PROPOSAL_FILES_TRAIN", f"('{address}',)"])
        with pytest.raises(ConfigError, match="executes what it downloads"):
            refuse_impossible(cfg)
