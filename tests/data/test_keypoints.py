"""Keypoints of annotation files, against those of Detectron2 for COCO's people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
)

from resnext_det import load_config
from resnext_det.data import annotations, custom
from resnext_det.data.keypoints import keypoints_of
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.data.toy import ToySpec, write_toy_coco
from resnext_det.engine import trainer as trainer_module
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import DatasetError

NAMES = ["left_ear", "nose", "right_ear"]
SMALL = "MODEL.KEYPOINT_ON True SOLVER.MAX_ITER 2 SOLVER.STEPS () SOLVER.WARMUP_ITERS 0"
SMALL += " SOLVER.IMS_PER_BATCH 2 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 96"
SMALL += " TEST.KEYPOINT_OKS_SIGMAS [0.05,0.1,0.05] DATALOADER.NUM_WORKERS 0"
# Heat maps are resized to every box, which takes most of the time.
SMALL += " TEST.DETECTIONS_PER_IMAGE 3 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96"
SMALL += " MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (16,16)"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Toy data with three keypoints per object; some objects have none."""
    root = write_toy_coco(tmp_path / "coco", ToySpec(train_images=6, val_images=3))
    for split in ("train2017", "val2017"):
        file = root / "annotations" / f"instances_{split}.json"
        document = json.loads(file.read_text())
        for category in document["categories"]:
            category |= {"keypoints": NAMES, "skeleton": [[1, 2], [2, 3]]}
        for number, entry in enumerate(document["annotations"]):
            x, y, width, height = entry["bbox"]
            points = [[x, y, 2], [x + width / 2, y + height, 2], [x + width, y, 1]]
            if number % 4 != 3:
                entry["keypoints"] = [value for point in points for value in point]
                entry["num_keypoints"] = 3
        file.write_text(json.dumps(document))
    return root


def files(root: Path) -> dict[str, Path]:
    return {
        f"{use}_{what}": root / ("annotations" if what == "json" else "") / name
        for use, split in (("train", "train2017"), ("test", "val2017"))
        for what, name in (("json", f"instances_{split}.json"), ("images", split))
    }


def config(*words: object) -> CfgNode:
    overrides = [*SMALL.split(), *map(str, words)]
    return load_config("faster_rcnn_X_26_8x4d_FPN_toy", overrides)


def test_people_have_the_keypoints_of_detectron2() -> None:
    category = {"keypoints": list(COCO_PERSON_KEYPOINT_NAMES), "skeleton": [[16, 14], [6, 7]]}
    found = keypoints_of([{"name": "dog"}, category], Path("a.json"))
    assert found is not None
    assert found.names == COCO_PERSON_KEYPOINT_NAMES
    assert set(found.flips) == set(COCO_PERSON_KEYPOINT_FLIP_MAP)
    assert found.joined == (("left_ankle", "left_knee"), ("left_shoulder", "right_shoulder"))
    assert keypoints_of([{"name": "dog"}], Path("a.json")) is None


@pytest.mark.parametrize(
    ("names", "flips"),
    [
        (["L eye", "R eye"], (("L eye", "R eye"),)),
        (["eye.l", "tail", "eye.r"], (("eye.l", "eye.r"),)),
        (["LeftHand", "RightHand"], (("LeftHand", "RightHand"),)),
        (["top", "lower", "corner"], ()),
    ],
)
def test_left_and_right_swap_by_name(names: list[str], flips: Any) -> None:
    found = keypoints_of([{"keypoints": names}], Path("a.json"))
    assert found is not None and found.flips == flips


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([["left_eye", "nose"]], "no 'right_eye'"),
        ([["a", "a"]], "one list of different names"),
        ([["a", 3]], "one list of different names"),
        (["abc"], "one list of different names"),
        ([["a"], ["b"]], "the same for all categories"),
    ],
)
def test_refuses_keypoints_that_cannot_be_learned(given: list[Any], said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        keypoints_of([{"keypoints": each} for each in given], Path("a.json"))


@pytest.fixture
def registered(toy: Path) -> Iterator[str]:
    """The training set as a program registers it for stock Detectron2."""
    name, paths = "keypoints_by_hand", files(toy)
    register_coco_instances(name, {}, str(paths["train_json"]), str(paths["train_images"]))
    flips = [("left_ear", "right_ear")]
    MetadataCatalog.get(name).set(keypoint_names=NAMES, keypoint_flip_map=flips)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_instances_are_those_of_detectron2(registered: str, toy: Path) -> None:
    ours = custom.use(config(), **files(toy))
    assert ours.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 3
    theirs = ours.clone()
    theirs.defrost()
    theirs.DATASETS.TRAIN = (registered,)
    mapper, stock = NamingDatasetMapper(ours, True), DatasetMapper(theirs, True)
    assert list(mapper.keypoint_hflip_indices) == list(stock.keypoint_hflip_indices)
    mapper.augmentations = stock.augmentations = stock.augmentations.__class__([])
    pairs = zip(DatasetCatalog.get(ours.DATASETS.TRAIN[0]), DatasetCatalog.get(registered))
    for mine, given in pairs:
        for annotation in given["annotations"]:  # stock needs keypoints of every object
            annotation.setdefault("keypoints", [0] * 9)
        found, expected = mapper(mine)["instances"], stock(given)["instances"]
        assert (found.gt_keypoints.tensor == expected.gt_keypoints.tensor).all()


def test_trains_and_evaluates_keypoints(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And parses the annotations once, for plan, statistics of batch norms and training alike."""
    parsed: list[str] = []
    read_json = annotations.read_json
    monkeypatch.setattr(
        annotations, "read_json", lambda file: (parsed.append(file.stem), read_json(file))[1]
    )
    precise = ["MODEL.FPN.NORM", "BN", "TEST.PRECISE_BN.ENABLED", True]
    precise += ["TEST.PRECISE_BN.NUM_ITER", 1, "TEST.EVAL_PERIOD", 2]
    cfg = custom.use(config("OUTPUT_DIR", tmp_path / "run", *precise), **files(toy))
    monkeypatch.delattr(trainer_module, "training_records")  # the plan counts the loader's images
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert parsed.count("instances_train2017") == 1
    assert {"bbox", "keypoints"} <= set(trainer._last_eval_results)
    alone = custom.use(config("OUTPUT_DIR", tmp_path / "run"), **dict(list(files(toy).items())[2:]))
    assert not alone.DATASETS.TRAIN
    NamingDatasetMapper(alone, False)


def test_refuses_data_without_keypoints(toy: Path) -> None:
    paths = files(toy)
    document = json.loads(paths["train_json"].read_text())
    for category in document["categories"]:
        del category["keypoints"]
    paths["train_json"].write_text(json.dumps(document))
    with pytest.raises(DatasetError, match="do not name the same keypoints"):
        custom.use(config(), **paths)
