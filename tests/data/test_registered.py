"""Which files the registered names are served from, without opening one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from resnext_det.data.registered import (
    datasets_root,
    locate,
    register_datasets,
)

NAMES = ("coco_2014_minival", "coco_2014_valminusminival", "coco_2014_train")
MINIVAL, VAL = "instances_minival2014.json", "instances_val2017.json"
REMAINDER = "instances_valminusminival2014.json"
OF_2017 = "instances_valminusminival2014_from2017.json"
TRAIN, TRAIN_OF_2017 = "instances_train2014.json", "instances_train2014_from2017.json"


@pytest.fixture(autouse=True)
def registered_again() -> Iterator[None]:
    """Restore the catalog, which all tests share."""
    yield
    register_datasets(datasets_root())


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ((), (MINIVAL, "val2014")),
        ((VAL,), (VAL, "val2017")),
        ((MINIVAL, VAL, "val2014", "val2017"), (MINIVAL, "val2014")),
        ((MINIVAL, VAL, "val2017"), (VAL, "val2017")),
        ((VAL, "val2014"), (VAL, "val2017")),
        ((MINIVAL, "val2017"), (MINIVAL, "val2014")),
        (("val2017",), (MINIVAL, "val2014")),
        ((REMAINDER, OF_2017, "val2014", "train2017"), (REMAINDER, "val2014")),
        ((REMAINDER, OF_2017, "train2017"), (OF_2017, "train2017")),
        ((TRAIN, TRAIN_OF_2017, "train2017"), (TRAIN_OF_2017, "train2017")),
        ((TRAIN,), (TRAIN, "train2014")),
        ((MINIVAL, VAL, "empty val2014", "val2017"), (VAL, "val2017")),
    ],
)
def test_chooses_files_and_folders_that_fit_together(
    there: tuple[str, ...], expected: tuple[str, str], tmp_path: Path
) -> None:
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    for name in there:
        if name.endswith(".json"):
            (coco / "annotations" / name).touch()
        else:
            (coco / name.removeprefix("empty ")).mkdir()
            if not name.startswith("empty "):
                begins = "" if "2017" in name else f"COCO_{name}_"
                (coco / name / f"{begins}000000000009.jpg").write_bytes(b"jpeg")
    names = {REMAINDER: NAMES[1], OF_2017: NAMES[1], TRAIN: NAMES[2], TRAIN_OF_2017: NAMES[2]}
    name = names.get(expected[0], NAMES[0])
    assert locate(coco, name) == (coco / "annotations" / expected[0], coco / expected[1])


def test_a_folder_without_images_of_its_split_is_empty(tmp_path: Path) -> None:
    coco = tmp_path / "coco"
    for name in ("annotations", "val2014", "val2017"):
        (coco / name).mkdir(parents=True)
    for name in (MINIVAL, VAL):
        (coco / "annotations" / name).touch()
    (coco / "val2017" / "000000000009.jpg").write_bytes(b"jpeg")
    (coco / "val2014" / "000000000009.jpg").write_bytes(b"jpeg")
    (coco / "val2014" / "COCO_val2014_000000000001.jpg").touch()
    (coco / "val2014" / "COCO_val2014_000000000002.jpg").symlink_to(tmp_path / "nowhere")
    (coco / "val2014" / "COCO_val2014_000000000003.jpg").mkdir()
    assert locate(coco, NAMES[0])[1] == coco / "val2017"
    (coco / "val2014" / "COCO_val2014_000000000010.jpg").symlink_to(
        coco / "val2017" / "000000000009.jpg"
    )
    assert locate(coco, NAMES[0])[1] == coco / "val2014"


def test_registering_twice_opens_nothing(tmp_path: Path) -> None:
    """The files are not JSON, and the last folder does not exist."""
    annotations = tmp_path / "coco" / "annotations"
    annotations.mkdir(parents=True)
    for name in (MINIVAL, REMAINDER, TRAIN, VAL):
        (annotations / name).write_text("no JSON")
    for root in (tmp_path, tmp_path, tmp_path / "nowhere"):
        register_datasets(root)
        for name in NAMES:
            assert DatasetCatalog.list().count(name) == 1
            metadata = MetadataCatalog.get(name)
            assert Path(metadata.json_file).is_relative_to(root / "coco" / "annotations")
            assert metadata.evaluator_type == "coco"
            things = [each["name"] for each in COCO_CATEGORIES if each["isthing"]]
            assert metadata.thing_classes == things
            assert len(metadata.thing_dataset_id_to_contiguous_id) == 80
