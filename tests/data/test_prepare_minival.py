"""Whole runs, from each choice of COCO files that somebody may have, on small sets."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnext_det.data.coco.counts import COCO as TRUE
from resnext_det.data.coco.counts import Counts, Size
from resnext_det.data.coco.names import MINIVAL, TRAIN_2014, VALMINUSMINIVAL, locate
from resnext_det.data.coco.preparing import prepare_minival
from resnext_det.errors import DatasetError

sys.path.append(str(Path(__file__).parent))  # tests are no package to import from
from generated_coco import CATEGORIES, SMALL, GeneratedCoco, generate, pack

MINIVAL_FILE = "instances_minival2014.json"
REMAINDER_FILE = "instances_valminusminival2014.json"
ALL = ("train2014", "val2014", "train2017", "val2017")
Tool = Callable[..., "CompletedProcess[str]"]


@pytest.fixture(scope="session")
def generated() -> GeneratedCoco:
    return generate()


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    folder = tmp_path / "coco"
    folder.mkdir()
    return folder


def lay(
    coco: Path, generated: GeneratedCoco, annotations: tuple[str, ...], images: tuple[str, ...]
) -> None:
    """Write annotation files, and files that stand for images."""
    for split in annotations:
        generated.write(split, coco / "annotations" / f"instances_{split}.json")
    for split in images:
        (coco / split).mkdir(parents=True)
        for number in generated.ids(split):
            (coco / split / generated.image_name(split, number)).write_bytes(b"jpeg")


def prepare(coco: Path, **more: Any) -> tuple[bool, str]:
    lines: list[str] = []
    ready = prepare_minival(coco, lines.append, counts=SMALL, **more)
    return ready, "\n".join(lines)


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All files below a folder: inode, date and content."""
    return {
        str(file.relative_to(folder)): (
            file.stat().st_ino,
            file.stat().st_mtime_ns,
            file.read_bytes(),
        )
        for file in folder.rglob("*")
        if file.is_file()
    }


def read(coco: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((coco / "annotations" / name).read_text())
    return found


def by_id(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


def expected(generated: GeneratedCoco, split: str, subset: str) -> dict[str, Any]:
    """The part of a split, picked the plain way."""
    document, wanted = generated.document(split), set(generated.ids(subset))
    document["images"] = [each for each in document["images"] if each["id"] in wanted]
    annotations = document["annotations"]
    document["annotations"] = [each for each in annotations if each["image_id"] in wanted]
    return document


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for key in ("images", "annotations", "categories"):
        assert by_id(found[key]) == by_id(wanted[key])
    assert (found["info"], found["licenses"]) == (wanted["info"], wanted["licenses"])


def test_both_years_give_both_files(coco: Path, generated: GeneratedCoco) -> None:
    """And a second run touches nothing."""
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    ready, said = prepare(coco)
    assert ready
    assert "minival is val2017 (12 images)" in said
    assert "2014 and 2017 agree" in said
    assert_same(read(coco, MINIVAL_FILE), expected(generated, "val2014", "minival"))
    assert_same(read(coco, REMAINDER_FILE), expected(generated, "val2014", "valminusminival"))
    before = state(coco)
    ready, said = prepare(coco)
    assert ready
    assert said.count("is already right") == 2
    assert "wrote" not in said
    assert state(coco) == before


def test_a_dry_run_says_the_same_and_writes_nothing(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ALL, ("val2014", "train2014"))
    before = state(coco)
    ready, said = prepare(coco, dry_run=True)
    assert ready
    assert state(coco) == before
    truly = prepare(coco)[1]
    assert said.replace("would write", "wrote") == truly
    assert "coco_2014_train: ready, from instances_train2014.json and train2014" in truly


def test_images_of_2017_serve_the_names_of_2014(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ALL, ("train2017", "val2017"))
    ready, said = prepare(coco)
    assert ready, said
    for name, split, subset in (
        (MINIVAL, "val2017", "minival"),
        (VALMINUSMINIVAL, "train2017", "valminusminival"),
        (TRAIN_2014, "train2017", "train2014"),
    ):
        file, folder = locate(coco, name)
        assert folder == coco / split
        assert_same(json.loads(file.read_text()), expected(generated, split, subset))
        records = load_coco_json(str(file), str(folder))
        assert {record["image_id"] for record in records} == set(generated.ids(subset))
        assert all(Path(record["file_name"]).is_file() for record in records)
    before = state(coco)
    prepare(coco)
    assert state(coco) == before


def test_2017_alone_serves_minival_and_says_what_it_cannot_tell(
    coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, ("train2017", "val2017"), ("train2017", "val2017"))
    before = state(coco)
    ready, said = prepare(coco)
    assert ready
    assert state(coco) == before
    assert "coco_2014_minival: ready, from instances_val2017.json and val2017" in said
    assert "coco_2014_valminusminival: cannot be told from the 2017 files alone" in said
    assert "coco_2017_train is the union of both 2014 sets" in said


@pytest.mark.parametrize("of_2014", ["train2014", "val2014"])
def test_one_file_of_2014_tells_the_complement(
    of_2014: str, coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, (of_2014, "train2017", "val2017"), ("train2017", "val2017"))
    assert prepare(coco)[0]
    for file, subset in (
        ("instances_valminusminival2014_from2017.json", "valminusminival"),
        ("instances_train2014_from2017.json", "train2014"),
    ):
        assert_same(read(coco, file), expected(generated, "train2017", subset))


def test_annotations_of_2017_serve_images_of_2014(coco: Path, generated: GeneratedCoco) -> None:
    """The names differ by the year alone."""
    lay(coco, generated, ("val2017",), ("val2014",))
    ready, said = prepare(coco)
    assert ready, said
    wanted = expected(generated, "val2017", "minival")
    for image in wanted["images"]:
        image["file_name"] = f"COCO_val2014_{image['id']:012d}.jpg"
    assert_same(read(coco, MINIVAL_FILE), wanted)


def test_val2014_and_train2017_tell_minival(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ("val2014", "train2017"), ("val2014",))
    assert prepare(coco)[0]
    assert_same(read(coco, MINIVAL_FILE), expected(generated, "val2014", "minival"))


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        (
            ("val2014",),
            r"from instances_val2014.json alone\. Put annotations/instances_val2017.json",
        ),
        ((), "no annotations are there"),
        (("train2014", "val2014"), "published instances_minival2014.json"),
    ],
)
def test_what_is_missing_is_named(
    annotations: tuple[str, ...], said: str, coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, annotations, ("val2014",))
    before = state(coco)
    ready, lines = prepare(coco)
    assert not ready
    assert re.search(said, lines)
    assert state(coco) == before


def test_the_published_file_is_mended_from_val2014(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ("val2014",), ("val2014",))
    annotations = coco / "annotations"
    for split, name in (("minival", MINIVAL_FILE), ("valminusminival", REMAINDER_FILE)):
        generated.write_published(split, annotations / name)
    before = state(coco)
    ready, said = prepare(coco)
    assert ready
    assert "annotation ids written as floats: 2 (9" in said
    assert "1 annotations have the id of another (1 are crowds)" in said
    assert said.count("pycocotools keeps one annotation per id") == 1
    assert "minival has 12 images, as it should have; whether they are those of val2017 is" in said
    assert "minival is val2017" not in said
    for split, name in (("minival", MINIVAL_FILE), ("valminusminival", REMAINDER_FILE)):
        assert_same(read(coco, name), expected(generated, "val2014", split))
        kept = annotations / name.replace(".json", ".original.json")
        assert kept.read_bytes() == before[f"annotations/{name}"][2]
    before = state(coco)
    assert prepare(coco)[0]
    assert state(coco) == before


def test_the_published_file_alone_gets_fresh_ids(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, (), ("val2014",))
    file = generated.write_published("minival", coco / "annotations" / MINIVAL_FILE)
    taken = file.with_name("instances_minival2014.original.json")
    taken.write_text("something of the user's own")
    original = read(coco, MINIVAL_FILE)
    assert prepare(coco)[0]
    mended = read(coco, MINIVAL_FILE)
    numbers = [each["id"] for each in mended["annotations"]]
    assert {type(number) for number in numbers} == {int}
    assert len(set(numbers)) == len(numbers)
    changed = [
        (one["id"], other["id"])
        for one, other in zip(original["annotations"], mended["annotations"])
        if one["id"] != other["id"]
    ]
    assert [one for one, _ in changed] == [original_repeat(original)]
    for record in (*original["annotations"], *mended["annotations"]):
        del record["id"]
    assert mended == original
    assert taken.read_text() == "something of the user's own"
    assert file.with_name("instances_minival2014.original-2.json").is_file()


def original_repeat(document: dict[str, Any]) -> float:
    numbers = [each["id"] for each in document["annotations"]]
    (repeated,) = {number for number in numbers if numbers.count(number) > 1}
    assert isinstance(repeated, float)
    return repeated


def test_a_file_that_differs_is_replaced_and_kept(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    document = expected(generated, "val2014", "minival")
    document["annotations"][5]["bbox"][0] += 1.5
    number = document["annotations"][5]["id"]
    (coco / "annotations" / MINIVAL_FILE).write_text(json.dumps(document))
    ready, said = prepare(coco)
    assert ready
    assert f"annotations with another bbox: 1 ({number}: [" in said
    assert_same(read(coco, MINIVAL_FILE), expected(generated, "val2014", "minival"))
    assert (coco / "annotations" / "instances_minival2014.original.json").is_file()


def test_a_file_that_differs_from_the_other_year_is_replaced_and_kept(
    coco: Path, generated: GeneratedCoco
) -> None:
    """Only val2017's annotations are there, and the file was made of them."""
    lay(coco, generated, ("val2017",), ("val2014",))
    assert prepare(coco)[0]
    right = read(coco, MINIVAL_FILE)
    harmed = read(coco, MINIVAL_FILE)
    for annotation in harmed["annotations"][:20]:
        annotation["bbox"] = [1.0, 2.0, 3.0, 4.0]
        annotation["category_id"] = 1 if annotation["category_id"] != 1 else 2
    (coco / "annotations" / MINIVAL_FILE).write_text(json.dumps(harmed))
    ready, said = prepare(coco)
    assert ready
    assert "annotations with another category_id: 20 (" in said
    assert "annotations with another bbox: 20 (" in said
    assert "is already right" not in said
    assert read(coco, MINIVAL_FILE) == right
    kept = coco / "annotations" / "instances_minival2014.original.json"
    assert json.loads(kept.read_text()) == harmed
    assert "is already right" in prepare(coco)[1]


@pytest.mark.parametrize("there", ["nothing", "half", "hollow", "links"])
def test_a_set_that_can_be_read_is_not_broken(
    there: str, coco: Path, generated: GeneratedCoco
) -> None:
    """val2017 and train2017 are whole, and of val2014 there is not enough."""
    lay(coco, generated, ALL, ("val2017", "train2017"))
    (coco / "val2014").mkdir()
    names = [generated.image_name("val2014", number) for number in sorted(generated.val2014)]
    for at, name in enumerate(names):
        if there == "hollow" or (there == "half" and at % 2):
            (coco / "val2014" / name).write_bytes(b"" if there == "hollow" else b"jpeg")
        elif there == "links":
            (coco / "val2014" / name).symlink_to(coco / "nowhere")
    ready, said = prepare(coco)
    assert ready, said
    for name, split in ((MINIVAL, "val2017"), (VALMINUSMINIVAL, "train2017")):
        assert locate(coco, name)[1] == coco / split
        assert f"{name}: ready, from " in said
    assert ("minival2014.json is not written: val2014 lacks some" in said) == (there == "half")
    for name in names:
        (coco / "val2014" / name).unlink(missing_ok=True)
        (coco / "val2014" / name).write_bytes(b"jpeg")
    assert prepare(coco)[0]
    assert locate(coco, MINIVAL) == (coco / "annotations" / MINIVAL_FILE, coco / "val2014")


@pytest.mark.parametrize("hollow", ["empty", "link", "folder"])
def test_files_without_content_are_no_images(
    hollow: str, coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    for number in sorted(generated.minival)[:3]:
        image = coco / "val2014" / generated.image_name("val2014", number)
        image.unlink()
        if hollow == "empty":
            image.touch()
        elif hollow == "link":
            image.symlink_to(coco / "nowhere")
        else:
            image.mkdir()
    image = coco / "val2014" / generated.image_name("val2014", max(generated.minival))
    image.unlink()
    ready, said = prepare(coco)
    assert not ready
    assert f"4 of 12 images are not in {coco / 'val2014'}" in said
    assert "3 of these are there, but empty or links to nothing" in said


def test_files_that_do_not_go_together_are_refused_before_anything_is_written(
    coco: Path, generated: GeneratedCoco
) -> None:
    """train2014 has an id of val2014's: that shows when the years are compared."""
    lay(coco, generated, ALL, ("val2014",))
    file = coco / "annotations" / "instances_train2014.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["id"] = generated.document("val2014")["annotations"][0]["id"]
    file.write_text(json.dumps(document))
    before = state(coco)
    with pytest.raises(DatasetError, match="annotation ids that repeat: 1"):
        prepare(coco)
    assert state(coco) == before


def test_images_of_2017_and_the_published_file_lack_one_file_alone(
    coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, ("val2014",), ("val2017",))
    prepare(coco)
    generated.write("minival", coco / "annotations" / MINIVAL_FILE)
    ready, said = prepare(coco)
    assert not ready
    assert f"{coco / 'val2017'} has them all, and only its annotations are missing" in said
    assert f"put instances_val2017.json into {coco / 'annotations'}" in said
    (coco / "val2014").mkdir()
    assert "and only its annotations are missing" in prepare(coco)[1]
    generated.write("val2017", coco / "annotations" / "instances_val2017.json")
    assert prepare(coco)[0]


@pytest.mark.parametrize(
    ("annotations", "needed"),
    [
        ((), "annotations_trainval2014.zip and annotations_trainval2017.zip there"),
        (("val2014",), "annotations_trainval2017.zip there"),
        (("train2014", "val2014"), "annotations_trainval2017.zip there"),
        (("train2014", "val2017"), "trainval2014.zip or annotations_trainval2017.zip there"),
    ],
)
def test_only_the_year_that_is_missing_is_asked_for(
    annotations: tuple[str, ...], needed: str, coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, annotations, ())
    lines = prepare(coco)[1].splitlines()
    (line,) = [line for line in lines if line.startswith("coco_2014_valminusminival")]
    assert line.endswith(needed)
    assert line.count(".zip") == needed.count(".zip")


def test_what_lies_one_level_off_is_told(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ("val2017", "val2014"), ("val2017",))
    (coco / "images").mkdir()
    (coco / "val2017").rename(coco / "images" / "val2017")
    nested = coco / "annotations" / "annotations"
    nested.mkdir()
    (coco / "annotations" / "instances_val2017.json").rename(nested / "instances_val2017.json")
    ready, said = prepare(coco)
    assert not ready
    assert f"{coco / 'images' / 'val2017'} is not where it is looked for: move it to {coco}" in said
    for line in said.splitlines():
        if "is not where it is looked for" in line:
            place, home = line.split(" is not where it is looked for: move it to ")
            Path(place).rename(home)
    ready, said = prepare(coco)
    assert ready
    assert "is not where" not in said


def test_a_zip_file_without_a_folder_is_read(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ("val2017",), ("val2017",))
    file = coco / "annotations" / "instances_val2017.json"
    with zipfile.ZipFile(coco / "annotations_trainval2017.zip", "w") as archive:
        archive.write(file, file.name)
    file.unlink()
    assert prepare(coco)[0]
    assert_same(read(coco, file.name), generated.document("val2017"))


def test_what_is_in_a_zip_file_is_not_told_to_be_elsewhere(
    coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, ("val2017",), ())
    pack(coco / "annotations", coco / "annotations_trainval2017.zip")
    generated.write("val2017", coco / "instances_val2017.json")
    assert "is not where" not in prepare(coco, dry_run=True)[1]
    (coco / "annotations_trainval2017.zip").unlink()
    assert "instances_val2017.json is not where" in prepare(coco, dry_run=True)[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("category_id", CATEGORIES[7]["id"]),
        ("iscrowd", 1),
        ("area", 17.25),
        ("segmentation", [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]),
    ],
)
def test_differences_between_the_years_are_told_and_no_error(
    field: str, value: Any, coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    document = generated.document("val2017")
    kept = [a for a in document["annotations"] if a[field] != value and not a["iscrowd"]][:4]
    for annotation in kept:
        annotation[field] = value
    document["images"][3]["height"] += 1
    (coco / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    ready, said = prepare(coco)
    assert ready
    assert f"2014 and 2017 differ: annotations with another {field}: 4 (" in said
    assert f"images with another width, height: 1 ({document['images'][3]['id']}: [" in said


@pytest.mark.parametrize(
    ("size", "annotated", "said"),
    [
        (SMALL.val2014, None, "the counts of val2014"),
        (SMALL.of("valminusminival"), None, "the counts of valminusminival"),
        (Size(12, 70), None, "some other images of val2014"),
        (Size(5000, 35800), 4954, "darknet's 5k list"),
        (Size(4954, 35511), None, "darknet's 5k list"),
        (Size(8059, 60000), None, "mscoco_minival_ids"),
        (Size(11, 71), None, "minival without the images that have no annotations"),
        (Size(13, 71), None, "has 13 images and 71 annotations, and .* has 12 images"),
    ],
)
@pytest.mark.parametrize("name", [MINIVAL_FILE, "instances_val2017.json"])
def test_no_other_choice_is_taken(
    name: str, size: Size, annotated: int | None, said: str, coco: Path
) -> None:
    rest = Size(2, 2)
    others = Counts(
        train2014=rest, val2014=size + rest, minival=size, minival_annotated=annotated or 0
    )
    split = "minival" if name == MINIVAL_FILE else "val2017"
    generate(others, (4, 6)).write(split, coco / "annotations" / name)
    before = state(coco)
    with pytest.raises(DatasetError, match=f"{name} is not .*{said}"):
        prepare(coco)
    assert state(coco) == before


def test_a_random_choice_of_the_right_size_is_refused(coco: Path, generated: GeneratedCoco) -> None:
    """Counts alone do not tell it; val2017 does."""
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    document = expected(generated, "val2014", "minival")
    stranger = next(
        each
        for each in generated.document("val2014")["images"]
        if each["id"] in generated.valminusminival
    )
    gone = document["images"][0]["id"]
    document["images"][0] = stranger
    for annotation in document["annotations"]:
        if annotation["image_id"] == gone:
            annotation["image_id"] = stranger["id"]
    (coco / "annotations" / MINIVAL_FILE).write_text(json.dumps(document))
    before = state(coco)
    with pytest.raises(DatasetError, match="has other images than minival: 1 of them"):
        prepare(coco)
    assert state(coco) == before


def test_derived_files_are_checked_by_themselves(coco: Path, generated: GeneratedCoco) -> None:
    """Each of them: alone it is taken by its counts, and beside the others by its images."""
    lay(coco, generated, ALL, ("train2017", "val2017"))
    prepare(coco)
    for split in ("train2014", "val2014", "train2017"):
        (coco / "annotations" / f"instances_{split}.json").unlink()
    (coco / "annotations" / REMAINDER_FILE).unlink()
    before = state(coco)
    ready, said = prepare(coco)
    assert ready
    assert said.count("is already right") == 1
    assert said.count("stays as it is") == said.count("not compared") == 2
    assert state(coco) == before
    file = coco / "annotations" / "instances_valminusminival2014_from2017.json"
    document = json.loads(file.read_text())
    moved = document["images"][2]["id"]
    stranger = generated.train2014[0]
    document["images"][2] |= {"id": stranger, "file_name": f"{stranger:012d}.jpg"}
    for annotation in document["annotations"]:
        if annotation["image_id"] == moved:
            annotation["image_id"] = stranger
    file.write_text(json.dumps(document))
    lay(coco, generated, ("val2014",), ())
    before = state(coco)
    with pytest.raises(DatasetError, match=r"from2017\.json has other images than valminusminival"):
        prepare(coco)
    assert state(coco) == before


def test_years_that_do_not_belong_together_are_refused(
    coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, ("val2014",), ("val2014",))
    document = generated.document("val2017")
    image = document["images"][0]
    for annotation in document["annotations"]:
        if annotation["image_id"] == image["id"]:
            annotation["image_id"] = 600_000
    image |= {"id": 600_000, "file_name": "000000600000.jpg"}
    (coco / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    with pytest.raises(DatasetError, match="1 images of minival are not in val2014"):
        prepare(coco)


def test_other_categories_are_refused(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ("val2014",), ("val2014",))
    document = generated.document("val2017")
    document["categories"][3]["name"] = "aeroplane"
    file = coco / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match="other categories"):
        prepare(coco)
    used = {each["category_id"] for each in document["annotations"]}
    unused = next(each for each in document["categories"] if each["id"] not in used)
    document["categories"].remove(unused)
    file.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match="has 79 categories"):
        prepare(coco)


def test_missing_images_are_counted_and_named(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ("val2014", "val2017"), ("val2014", "val2017"))
    assert prepare(coco)[0]
    gone = sorted(generated.image_name("val2014", number) for number in generated.minival)[:5]
    for name in gone:
        (coco / "val2014" / name).unlink()
    ready, said = prepare(coco)
    assert not ready
    assert f"5 of 12 images are not in {coco / 'val2014'} ({', '.join(gone[:3])}, ...)" in said
    assert f"{coco / 'val2017'} has them all: move {coco / 'val2014'} away" in said
    (coco / "val2014").rename(coco / "elsewhere")
    assert prepare(coco)[0]


def test_annotations_are_read_from_the_zip_files(coco: Path, generated: GeneratedCoco) -> None:
    """Those that Detectron2 is to read come out as they are."""
    for year in ("2014", "2017"):
        lay(coco, generated, tuple(split for split in ALL if year in split), ())
        (coco / "annotations" / f"captions_val{year}.json").write_text("{}")
        pack(coco / "annotations", coco / f"annotations_trainval{year}.zip")
    lay(coco, generated, (), ("val2017", "train2017"))
    assert prepare(coco, dry_run=True)[0]
    assert not (coco / "annotations").exists()
    assert prepare(coco)[0]
    assert_same(read(coco, MINIVAL_FILE), expected(generated, "val2014", "minival"))
    for split in ("val2017", "train2017"):
        copied = coco / "annotations" / f"instances_{split}.json"
        again = generated.write(split, coco / "again.json")
        assert copied.read_bytes() == again.read_bytes()
    assert not (coco / "annotations" / "captions_val2017.json").exists()
    before = state(coco)
    assert prepare(coco)[0]
    assert state(coco) == before


def figures(annotations: Path, detections: list[dict[str, Any]]) -> NDArray[np.float64]:
    truth = COCO(str(annotations))
    evaluation = COCOeval(truth, truth.loadRes([dict(each) for each in detections]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return np.asarray(evaluation.stats)


def test_the_derived_file_gives_the_figures_of_val2017(
    coco: Path, generated: GeneratedCoco
) -> None:
    """The published one need not: that is why it is mended."""
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    prepare(coco)
    derived = coco / "annotations" / MINIVAL_FILE
    generator = np.random.default_rng(3)
    detections = []
    for annotation in generated.document("val2017")["annotations"]:
        for _ in range(3):
            box = np.array(annotation["bbox"]) * generator.uniform(0.9, 1.1, 4)
            seen = {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
            score = float(generator.uniform())
            detections.append({**seen, "bbox": box.tolist(), "score": score})
    ours = figures(derived, detections)
    theirs = figures(coco / "annotations" / "instances_val2017.json", detections)
    assert ours.shape == (12,)
    assert 0.05 < ours[0] < 0.95
    np.testing.assert_array_equal(ours, theirs)
    assert len(load_coco_json(str(derived), str(coco / "val2014"))) == SMALL.minival.images


@pytest.mark.parametrize("writes", [1, 2, 3])
def test_a_killed_run_leaves_nothing_half_written(
    writes: int, coco: Path, generated: GeneratedCoco
) -> None:
    """Killed by SIGKILL when the n-th file is written, but not yet in its place."""
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    generated.write_published("minival", coco / "annotations" / MINIVAL_FILE)
    published = (coco / "annotations" / MINIVAL_FILE).read_bytes()

    def killed() -> None:
        remaining = iter(range(writes - 1))

        def fsync(descriptor: object) -> None:
            if next(remaining, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync  # type: ignore[assignment]
        prepare(coco)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    whole = {MINIVAL_FILE: published} if writes < 3 else {}
    for file in (coco / "annotations").glob("[!.]*.json"):
        json.loads(file.read_bytes())
    for name, content in whole.items():
        assert (coco / "annotations" / name).read_bytes() == content
    for file in coco.rglob(".*.partial"):  # it was yesterday
        os.utime(file, (time.time() - 100_000,) * 2)
    assert prepare(coco)[0]
    assert_same(read(coco, MINIVAL_FILE), expected(generated, "val2014", "minival"))
    assert_same(read(coco, REMAINDER_FILE), expected(generated, "val2014", "valminusminival"))
    kept = coco / "annotations" / "instances_minival2014.original.json"
    assert kept.read_bytes() == published
    assert not list(coco.rglob(".*")), "what the killed run left beside"


def test_a_full_disk_is_an_error_that_leaves_the_file(
    coco: Path, generated: GeneratedCoco, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    before = state(coco)
    with pytest.raises(DatasetError, match=r"minival2014\.json cannot be written: No space left"):
        prepare(coco)
    assert state(coco) == before


def test_the_command_ends_with_0_where_minival_is_ready(coco: Path, tool: Tool) -> None:
    """val2017 of the true size; all else is small, and not written."""
    rest = Size(10, 10)
    made = generate(Counts(rest, TRUE.minival + rest, TRUE.minival), (4, 6))
    lay(coco, made, ("val2017",), ("val2017",))
    done = tool("prepare_minival.py", ["--coco", coco])
    assert done.returncode == 0, done.stderr
    assert "minival is val2017 (5,000 images)" in done.stdout
    assert "coco_2014_minival: ready, from instances_val2017.json and val2017" in done.stdout
    assert f"export DETECTRON2_DATASETS={coco.parent}" in done.stdout
    next((coco / "val2017").iterdir()).unlink()
    done = tool("prepare_minival.py", ["--dry-run"], datasets=coco.parent)
    assert done.returncode == 1
    assert "1 of 5,000 images are not in" in done.stdout


def test_the_command_refuses_small_sets_with_code_1(
    coco: Path, generated: GeneratedCoco, tool: Tool
) -> None:
    lay(coco, generated, ("val2017",), ("val2017",))
    done = tool("prepare_minival.py", ["--coco", coco])
    assert done.returncode == 1
    assert "\nerror: instances_val2017.json is not val2017: it has 12 images" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_ctrl_c_is_one_line_and_code_130(coco: Path) -> None:
    """The command is stopped while it waits for a file that never ends."""
    (coco / "annotations").mkdir()
    (coco / "annotations" / "instances_val2017.json").write_text("[")
    root = Path(__file__).resolve().parents[2]
    program = (
        "import os, runpy, signal, sys\n"
        "from resnext_det.data.coco import preparing\n"
        "preparing.read_document = lambda source: os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.argv = ['prepare_minival.py', '--coco', {str(coco)!r}]\n"
        f"runpy.run_path({str(root / 'tools' / 'prepare_minival.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=root
    )
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1:] == ["stopped by Ctrl-C"]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_files_of_the_true_size(tmp_path: Path, tool: Tool) -> None:
    """All of COCO's annotations, in under 3 minutes and 6 GB, the published flaws mended."""
    made, coco = generate(TRUE), tmp_path / "coco"
    for split in ALL:
        made.write(split, coco / "annotations" / f"instances_{split}.json")
    for split, name in (("minival", MINIVAL_FILE), ("valminusminival", REMAINDER_FILE)):
        made.write_published(split, coco / "annotations" / name)
    (coco / "val2014").mkdir()
    for number in made.val2014:
        (coco / "val2014" / made.image_name("val2014", number)).write_bytes(b"jpeg")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = tool("prepare_minival.py", ["--coco", coco])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180
    assert after.ru_maxrss < 6 << 20, "KiB"
    assert "36,781 annotations" in done.stdout
    assert len(COCO(str(coco / "annotations" / MINIVAL_FILE)).anns) == TRUE.minival.annotations
    remainder = COCO(str(coco / "annotations" / REMAINDER_FILE))
    assert (len(remainder.imgs), len(remainder.anns)) == (35_504, 255_094)
    shutil.rmtree(coco)
