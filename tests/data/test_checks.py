from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnext_det import load_config
from resnext_det.data.checks import check_datasets
from resnext_det.data.registered import locate, register_datasets
from resnext_det.errors import ConfigError, DatasetError

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"


@pytest.fixture
def registered(datasets: Path, tmp_path: Path) -> Path:
    """A copy of the toy data, registered; the test may damage it."""
    shutil.copytree(datasets / "toy_coco", tmp_path / "toy_coco")
    register_datasets(tmp_path)
    return tmp_path / "toy_coco"


def check(*overrides: str) -> None:
    cfg = load_config(TOY, overrides)
    check_datasets(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])


def test_sound_data_passes(registered: Path) -> None:
    check()


def test_missing_images_are_counted_and_named(registered: Path) -> None:
    gone = sorted((registered / "train2017").iterdir())[:7]
    for file in gone:
        file.unlink()
    with pytest.raises(DatasetError, match=rf"of 12 image files.*: 7 \({gone[0].name}.*; \.\.\."):
        check()


def test_a_missing_folder_is_named(registered: Path) -> None:
    shutil.rmtree(registered / "val2017")
    with pytest.raises(DatasetError, match=r"image folder .*val2017 is not there"):
        check()
    shutil.rmtree(registered)
    with pytest.raises(DatasetError, match=r"instances_train2017\.json are not there"):
        check()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json at all", "is not JSON"),
        ('{"images": [', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "no list under 'images'"),
        ('{"images": [], "annotations": []}', "no list under 'categories'"),
    ],
)
def test_annotations_that_are_none(content: str, said: str, registered: Path) -> None:
    (registered / "annotations" / "instances_train2017.json").write_text(content)
    with pytest.raises(DatasetError, match=said):
        check()


def test_the_number_of_classes_must_fit(registered: Path) -> None:
    with pytest.raises(ConfigError, match=r"NUM_CLASSES is 80.*6 categories.*NUM_CLASSES 6"):
        check("MODEL.ROI_HEADS.NUM_CLASSES", "80")


def test_an_unknown_data_set_suggests_another() -> None:
    with pytest.raises(ConfigError, match="toy_coco_train"):
        check("DATASETS.TRAIN", "('toy_coco_trian',)")
    with pytest.raises(ConfigError, match="no data set is named"):
        check_datasets(load_config(TOY), [])


def damage(toy: Path, split: str, change: Callable[[dict[str, Any]], object]) -> None:
    file = toy / "annotations" / f"instances_{split}2017.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def repeat_an_id(document: dict[str, Any]) -> None:
    document["annotations"][1]["id"] = document["annotations"][0]["id"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_that_are_not_sound_stop_a_run(
    split: str, registered: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(registered, split, repeat_an_id)
    with pytest.raises(DatasetError, match=r"annotation ids that repeat: 1 .*--ignore-health"):
        check()
    cfg = load_config(TOY)
    with caplog.at_level(logging.WARNING):
        check_datasets(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], ignore_health=True)
    assert "annotation ids that repeat: 1" in caplog.text


def test_warnings_are_logged_once(registered: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(registered, "train", lambda document: document["annotations"][0].pop("area"))
    cfg = load_config(TOY, ["DATASETS.TEST", "('toy_coco_train',)"])
    with caplog.at_level(logging.WARNING):
        check_datasets(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    assert caplog.text.count("annotations without area") == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_image_headers_are_read(split: str, registered: Path) -> None:
    damage(registered, split, lambda document: document["images"][0].update(width=999))
    with pytest.raises(DatasetError, match="another size than their file"):
        check()


@pytest.mark.parametrize("leave", ["an empty list", "no list"])
def test_a_test_set_without_annotations(leave: str, registered: Path) -> None:
    """Such as COCO's image_info_test-dev2017.json, which has no list."""
    change = {
        "an empty list": lambda d: d["annotations"].clear(),
        "no list": lambda d: d.pop("annotations"),
    }
    damage(registered, "val", change[leave])
    with pytest.raises(DatasetError, match="has no annotations: nothing can be evaluated on it"):
        check()
    damage(registered, "train", change[leave])
    with pytest.raises(DatasetError, match="has no annotations: nothing can be learnt from it"):
        check()


def test_what_is_not_evaluated_is_not_examined(registered: Path) -> None:
    damage(registered, "val", lambda document: document["info"].update(year="2022"))
    check()


def test_minival_is_served_from_the_files_that_are_there(tmp_path: Path) -> None:
    """2014 where it is there, else 2017; with neither, the 2014 names stand in the error."""
    coco, name = tmp_path / "coco", "coco_2014_minival"
    annotations = coco / "annotations"
    annotations.mkdir(parents=True)
    of_2014, of_2017 = "instances_minival2014.json", "instances_val2017.json"
    assert locate(coco, name)[0].name == of_2014
    (annotations / of_2017).write_text(json.dumps({}))
    assert [path.name for path in locate(coco, name)] == [of_2017, "val2017"]
    (annotations / of_2014).write_text(json.dumps({}))
    assert [path.name for path in locate(coco, name)] == [of_2014, "val2014"]
