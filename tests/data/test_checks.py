from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from resnext_det import load_config
from resnext_det.data.checks import NamingDatasetMapper, check_datasets
from resnext_det.data.splits import locate_minival, register_datasets
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
    with pytest.raises(DatasetError, match=rf"7 of 12 images.*{gone[0].name}.*, \.\.\."):
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


@pytest.mark.parametrize("damage", ["truncated", "empty", "another size", "gone"])
def test_a_broken_image_is_named(damage: str, registered: Path) -> None:
    file = sorted((registered / "train2017").iterdir())[0]
    record = {"file_name": str(file), "height": 999, "width": 999, "image_id": 1}
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    with pytest.raises(DatasetError, match=file.name):
        NamingDatasetMapper(load_config(TOY), False)(record)


def test_minival_is_served_from_the_files_that_are_there(tmp_path: Path) -> None:
    """2014 where it is there, else 2017; with neither, the 2014 names stand in the error."""
    annotations = tmp_path / "coco" / "annotations"
    annotations.mkdir(parents=True)
    of_2014, of_2017 = "instances_minival2014.json", "instances_val2017.json"
    assert locate_minival(tmp_path)[0].name == of_2014
    (annotations / of_2017).write_text(json.dumps({}))
    assert [path.name for path in locate_minival(tmp_path)] == [of_2017, "val2017"]
    (annotations / of_2014).write_text(json.dumps({}))
    assert [path.name for path in locate_minival(tmp_path)] == [of_2014, "val2014"]
