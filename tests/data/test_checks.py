"""What `check_datasets` refuses before a run, on copies of the toy data."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from resnext_det import load_config
from resnext_det.data.checks import check_datasets
from resnext_det.data.registered import datasets_root, register_datasets
from resnext_det.errors import ConfigError, DatasetError

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"


@pytest.fixture
def registered(datasets: Path, tmp_path: Path) -> Iterator[Path]:
    """A registered copy of the toy data, which the test may damage."""
    shutil.copytree(datasets / "toy_coco", tmp_path / "toy_coco")
    register_datasets(tmp_path)
    yield tmp_path / "toy_coco"
    register_datasets(datasets_root())


def check(*overrides: str, ignore_health: bool = False) -> None:
    cfg = load_config(TOY, overrides)
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    check_datasets(cfg, names, ignore_health=ignore_health)


def damage(toy: Path, split: str, change: Callable[[dict[str, Any]], object]) -> None:
    file = toy / "annotations" / f"instances_{split}2017.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def test_names_missing_files(registered: Path) -> None:
    check()
    gone = sorted((registered / "train2017").iterdir())[:7]
    for file in gone:
        file.unlink()
    with pytest.raises(DatasetError, match=rf"of 12 image files.*: 7 \(.*{gone[0].name}.*; \.\.\."):
        check()
    shutil.rmtree(registered / "train2017")
    with pytest.raises(DatasetError, match=r"no image folder .*train2017"):
        check()
    shutil.rmtree(registered)
    with pytest.raises(DatasetError, match=r"no annotation file .*instances_train2017\.json"):
        check()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json at all", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "no list under 'images'"),
        ('{"images": [], "annotations": []}', "no list under 'categories'"),
    ],
)
def test_refuses_other_files(content: str, said: str, registered: Path) -> None:
    (registered / "annotations" / "instances_train2017.json").write_text(content)
    with pytest.raises(DatasetError, match=rf"toy_coco_train.*{said}"):
        check()


def test_refuses_unknown_data_sets_and_other_numbers_of_classes(registered: Path) -> None:
    with pytest.raises(ConfigError, match=r"NUM_CLASSES is 80.*6 categories.*NUM_CLASSES 6"):
        check("MODEL.ROI_HEADS.NUM_CLASSES", "80")
    with pytest.raises(ConfigError, match=r"'toy_coco_trian'.* Similar: toy_coco_train"):
        check("DATASETS.TRAIN", "('toy_coco_trian',)")
    with pytest.raises(ConfigError, match="no data set"):
        check_datasets(load_config(TOY), [])


def repeat_an_id(document: dict[str, Any]) -> None:
    document["annotations"][1]["id"] = document["annotations"][0]["id"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_refuses_errors_and_logs_warnings(
    split: str, registered: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(registered, split, lambda document: document["annotations"][0].pop("area"))
    with caplog.at_level(logging.WARNING):
        check()
    assert caplog.text.count("annotations without area") == 1
    damage(registered, split, repeat_an_id)
    with pytest.raises(DatasetError, match=r"annotations with repeated ids.*--ignore-health"):
        check()
    with caplog.at_level(logging.WARNING):
        check(ignore_health=True)
    assert "annotations with repeated ids" in caplog.text
    damage(registered, split, lambda document: document["images"][0].update(width=999))
    with pytest.raises(DatasetError, match="another size than their annotations"):
        check()


def test_refuses_test_sets_without_annotations(registered: Path) -> None:
    """Such as COCO's image_info_test-dev2017.json, which has no list."""
    damage(registered, "val", lambda document: document.pop("annotations"))
    with pytest.raises(DatasetError, match="has no annotations to evaluate on"):
        check()
    damage(registered, "train", lambda document: document["annotations"].clear())
    with pytest.raises(DatasetError, match="has no annotations to train on"):
        check()
