"""Annotation files from outside: whatever is in them ends in a clear error, or is mended."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO as Reference

from resnext_det.data.coco import annotation_files
from resnext_det.data.coco.annotation_files import (
    Source,
    find_source,
    read_document,
    write_document,
)
from resnext_det.data.coco.counts import COCO, Counts, Size, looks_like
from resnext_det.data.coco.flaws import find_flaws, mend
from resnext_det.data.coco.preparing import prepare_minival
from resnext_det.data.coco.tables import build_table
from resnext_det.errors import DatasetError

sys.path.append(str(Path(__file__).parent))  # tests are no package to import from
from generated_coco import SMALL, GeneratedCoco, generate, pack


@pytest.fixture(scope="module")
def generated() -> GeneratedCoco:
    return generate()


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    return tmp_path / "coco"


def files(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(coco: Path, said: str) -> None:
    """The run ends in one error of ours, and nothing has been written."""
    before = files(coco)
    with pytest.raises(DatasetError, match=said):
        prepare_minival(coco, lambda line: None, counts=SMALL)
    assert files(coco) == before


def test_the_counts_are_those_of_coco() -> None:
    """Detectron's model zoo and the tables of both releases; the sums follow."""
    assert COCO.of("val2017") == Size(5_000, 36_781)
    assert COCO.of("valminusminival") == Size(35_504, 255_094)
    assert COCO.of("train2017") == Size(118_287, 860_001)
    assert COCO.train2014 + COCO.val2014 == Size(123_287, 896_782)
    assert COCO.categories == 80
    assert looks_like(Size(5_000, 36_000), 4_954) == looks_like(Size(4_954, 35_511), 4_954) != ""
    assert "val2014" in looks_like(Size(40_504, 291_875), 40_137)
    assert looks_like(Size(17, 18), 16) == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no JSON"),
        (b"[" * 200_000, "is no JSON"),
        (b'{"images": [', "is no JSON"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"1" * 100_000, "is no JSON"),
        (b"[1, 2]", "no list of objects under 'images'"),
        (b"null", "no list of objects under 'images'"),
        (b'{"images": [], "annotations": {}}', "no list of objects under 'annotations'"),
        (b'{"images": [1], "annotations": [], "categories": []}', "objects under 'images'"),
        (b'{"images": [], "annotations": []}', "no list of objects under 'categories'"),
        (b'{"images": [], "annotations": [], "categories": []}', "has no categories"),
    ],
)
@pytest.mark.parametrize("name", ["instances_val2017.json", "instances_minival2014.json"])
def test_what_is_no_annotation_file_is_refused(
    name: str, content: bytes, said: str, coco: Path
) -> None:
    (coco / "annotations" / name).write_bytes(content)
    refused(coco, said)


def annotation(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][4][key] = value

    return change


def image(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["images"][4][key] = value

    return change


def without(kind: str, key: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        del document[kind][4][key]

    return change


def twice(kind: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document[kind][4]["id"] = document[kind][3]["id"]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (annotation("id", "17"), "annotations whose id is no whole number: 1 .*'17'"),
        (annotation("id", True), "annotations whose id is no whole number: 1 .*True"),
        (annotation("id", 17.0), "annotations whose id is no whole number"),
        (annotation("id", -3), "annotations whose id is no whole number"),
        (annotation("id", 10**30), "annotations whose id is no whole number"),
        (annotation("id", None), "annotations whose id is no whole number"),
        (annotation("image_id", "1"), "annotations whose image_id is no whole number"),
        (annotation("image_id", 599_999), "annotations of an image that is not in the file: 1"),
        (annotation("category_id", 12), "annotations of a category that is not in the file: 1"),
        (annotation("iscrowd", True), "annotations whose iscrowd is no whole number"),
        (annotation("bbox", [1, 2, 3]), "boxes that are not lists of 4 numbers"),
        (annotation("bbox", "abcd"), "boxes that are not lists of 4 numbers"),
        (annotation("bbox", [1, 2, 3, "4"]), "bbox with '4' for a number"),
        (annotation("bbox", [1, 2, 3, 10**400]), "bbox with 1000.* for a number"),
        (annotation("bbox", [1, 2, 3, float("nan")]), "no JSON: NaN"),
        (annotation("area", float("inf")), "no JSON: Infinity"),
        (annotation("area", [3]), r"area with \[3\] for a number"),
        (annotation("segmentation", 3), "segmentation that is neither polygons nor RLE"),
        (annotation("segmentation", [["a"]]), "segmentation that is neither"),
        (annotation("segmentation", {"size": [1, 2]}), "segmentation that is neither"),
        (annotation("segmentation", None), "segmentation that is neither"),
        (without("annotations", "area"), "annotations: there is one without 'area'"),
        (without("images", "id"), "images: there is one without 'id'"),
        (without("images", "height"), "width or height is no whole number above 0: 1"),
        (twice("annotations"), "annotation ids that repeat: 1"),
        (twice("images"), "image ids that repeat: 1"),
        (image("id", "5"), "images whose id is no whole number"),
        (image("file_name", "../../etc/passwd"), r"is '\.\./\.\./etc/passwd', not 0"),
        (image("file_name", 5), "file name of image"),
        (image("width", 0), "width or height is no whole number above 0: 1"),
    ],
)
def test_records_that_are_not_sound_are_refused(
    change: Callable[[dict[str, Any]], None], said: str, coco: Path, generated: GeneratedCoco
) -> None:
    generated.write("val2014", coco / "annotations" / "instances_val2014.json")
    document = generated.document("val2017")
    change(document)
    (coco / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    refused(coco, said)


def test_an_infinite_number_of_a_polygon_is_never_written(
    coco: Path, generated: GeneratedCoco
) -> None:
    """1e999 is JSON, and infinite when read."""
    generated.write("val2017", coco / "annotations" / "instances_val2017.json")
    document = generated.document("val2014")
    chosen = next(a for a in document["annotations"] if a["image_id"] in generated.minival)
    chosen["segmentation"] = [[987654.5] * 6]
    text = json.dumps(document).replace("987654.5", "1e999")
    (coco / "annotations" / "instances_val2014.json").write_text(text)
    refused(coco, "a number that is none")


def test_a_file_that_is_too_large_is_not_read(
    coco: Path, generated: GeneratedCoco, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated.write("val2017", coco / "annotations" / "instances_val2017.json")
    monkeypatch.setattr(annotation_files, "_LARGEST", 10_000)
    refused(coco, r"bytes, more than any of COCO's annotation files \(limit: 10,000\)")
    pack(coco / "annotations", coco / "annotations_trainval2017.zip")
    refused(coco, "annotations_trainval2017.zip:annotations/instances_val2017.json has .* bytes")


def zipped(coco: Path, members: dict[str, bytes]) -> Path:
    file = coco / "annotations_trainval2017.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


NAME = "annotations/instances_val2017.json"


@pytest.mark.parametrize("name", ["../escaped.json", "/escaped.json", "a/../../b", "C:/b", "a\\b"])
def test_a_zip_file_whose_names_lead_out_is_refused(
    name: str, coco: Path, generated: GeneratedCoco
) -> None:
    content = generated.write("val2017", coco / "beside.json").read_bytes()
    zipped(coco, {NAME: content, name: b"{}"})
    refused(coco, "1 names that lead out of the folder")


def test_a_bomb_is_refused_before_it_is_unpacked(coco: Path) -> None:
    zipped(coco, {NAME: b" " * 50_000_000})
    refused(coco, "unpacks from .* to 50,000,000 bytes, as no annotations do")


@pytest.mark.parametrize("claimed", [1_000, 1_000_009])
def test_a_bomb_that_lies_about_its_size_is_refused(
    claimed: int, coco: Path, generated: GeneratedCoco
) -> None:
    """The size that is written down is changed, in both places; the CRC is the content's."""
    content = generated.write("val2017", coco / "beside.json").read_bytes()
    file = zipped(coco, {NAME: content + b" " * (1_000_003 - len(content))})
    content = file.read_bytes()
    assert content.count((1_000_003).to_bytes(4, "little")) == 2
    size = claimed.to_bytes(4, "little")
    file.write_bytes(content.replace((1_000_003).to_bytes(4, "little"), size))
    refused(coco, "is damaged, or no zip file")


@pytest.mark.parametrize("harm", ["cut", "changed", "text", "empty"])
def test_a_damaged_zip_file_is_refused(harm: str, coco: Path, generated: GeneratedCoco) -> None:
    content = generated.write("val2017", coco / "beside.json").read_bytes()
    file = zipped(coco, {NAME: content})
    packed = bytearray(file.read_bytes())
    if harm == "cut":
        packed = packed[: len(packed) // 2]
    elif harm == "changed":
        packed[len(packed) // 2] ^= 255
    else:
        packed = bytearray(b"no zip file" if harm == "text" else b"")
    file.write_bytes(packed)
    refused(coco, "annotations_trainval2017.zip is damaged, or no zip file")


def test_a_json_file_goes_before_a_zip_file(coco: Path, generated: GeneratedCoco) -> None:
    generated.write("val2017", coco / "annotations" / "instances_val2017.json")
    zipped(coco, {NAME: b"{}"})
    assert find_source(coco, "val2017") == Source(coco / "annotations" / "instances_val2017.json")
    assert find_source(coco, "train2017") is None


def test_what_is_written_is_what_was_read(coco: Path, generated: GeneratedCoco) -> None:
    """More annotations than are written at once, numbers to the last bit, and other keys."""
    document = {
        "info": {"läuft": "ü"},
        "licenses": [],
        "images": [{"id": 1}],
        "annotations": [
            {"id": n, "bbox": [n / 7, 1e-300, 0.1 + 0.2, 2**53]} for n in range(25_000)
        ],
        "categories": [],
        "more": None,
    }
    file = coco / "written.json"
    write_document(document, file)
    assert json.loads(file.read_bytes()) == document
    assert read_document(Source(file)) == document


def test_the_flaws_of_the_published_file_are_found_and_mended(
    tmp_path: Path, generated: GeneratedCoco
) -> None:
    file = generated.write_published("valminusminival", tmp_path / "published.json")
    document = json.loads(file.read_text())
    flaws = find_flaws(document)
    numbers = [each["id"] for each in document["annotations"]]
    assert list(flaws.floats) == [number for number in numbers if type(number) is float]
    assert len(flaws.floats) == 4
    assert flaws.spare == len(numbers) - len(set(numbers)) == 2
    assert flaws.crowds == 2
    before = json.loads(file.read_text())
    mended = mend(document)
    assert document == before
    assert not find_flaws(mended)
    assert len({each["id"] for each in mended["annotations"]}) == len(numbers)
    (tmp_path / "mended.json").write_text(json.dumps(mended))
    assert len(Reference(str(tmp_path / "mended.json")).anns) == len(numbers)
    assert len(Reference(str(file)).anns) == len(numbers) - 2  # what the flaw does


def test_a_table_holds_what_the_file_says(tmp_path: Path, generated: GeneratedCoco) -> None:
    file = generated.write("val2017", tmp_path / "instances_val2017.json")
    document = json.loads(file.read_text())
    table = build_table(document, Source(file), "val2017")
    assert table.size == SMALL.minival
    assert table.annotated == SMALL.minival_annotated
    for row in (0, 40, 70):
        one = document["annotations"][row]
        assert (table.ids[row], table.of_images[row]) == (one["id"], one["image_id"])
        assert (table.of_categories[row], table.crowds[row]) == (one["category_id"], one["iscrowd"])
        assert table.boxes[row].tolist() == one["bbox"]
        assert table.areas[row] == one["area"]
    for annotation in document["annotations"]:  # written otherwise, they are the same numbers
        annotation["area"] = float(annotation["area"])
        if annotation["iscrowd"]:
            counts = annotation["segmentation"]["counts"]
            annotation["segmentation"]["counts"] = [float(count) for count in counts]
    again = build_table(document, Source(file), "val2017")
    assert (again.outlines == table.outlines).all()
    document["annotations"][9]["segmentation"][0][3] += 0.01
    assert (build_table(document, Source(file), "val2017").outlines != table.outlines).sum() == 1


def test_small_counts_do_not_leak_into_the_true_ones() -> None:
    assert Counts() == COCO
