"""Folders of somebody's own data, in the layouts that tools write."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pytest
from PIL import Image

from resnext_det.data import layouts
from resnext_det.data.dividing import with_validation, write_parts
from resnext_det.data.folder import LAYOUTS, Folder, read_folder
from resnext_det.data.layouts import Part
from resnext_det.data.similar import fingerprints, similar
from resnext_det.errors import DatasetError
from resnext_det_cli import flags

SPLITS = {"train": "train2017", "val": "val2017"}
Objects = Counter[tuple[str, str, tuple[int, ...]]]


def objects(document: dict[str, Any]) -> Objects:
    """Return name of the image, class and rounded box of every object that is not a crowd."""
    files = {each["id"]: Path(each["file_name"]).name for each in document["images"]}
    classes = {each["id"]: each["name"] for each in document["categories"]}
    return Counter(
        (files[each["image_id"]], classes[each["category_id"]], tuple(np.round(each["bbox"])))
        for each in document["annotations"]
        if not each["iscrowd"]
    )


@pytest.fixture
def truth(datasets: Path) -> dict[str, dict[str, Any]]:
    folder = datasets / "toy_coco" / "annotations"
    return {
        split: json.loads((folder / f"instances_{name}.json").read_text())
        for split, name in SPLITS.items()
    }


@pytest.fixture
def laid_out(datasets: Path, truth: dict[str, Any], tmp_path: Path) -> Callable[[str], Path]:
    """Write the toy data in a layout, by hotcoco's writers and the folders that tools make."""

    def write(layout: str) -> Path:
        root = tmp_path / layout
        for split, document in truth.items():
            boxes = [{**each, "segmentation": []} for each in document["annotations"]]
            if layout == "cvat":  # which knows no crowds
                boxes = [each for each in boxes if not each["iscrowd"]]
            coco = hotcoco.COCO({**document, "annotations": boxes})
            images = {
                "coco": root / split,
                "yolo": root / split / "images",
                "voc": root / split / "JPEGImages",
                "cvat": root / "images" / split,
            }[layout]
            shutil.copytree(datasets / "toy_coco" / SPLITS[split], images)
            if layout == "coco":
                coco.save(str(images / "_annotations.coco.json"))
            elif layout == "yolo":
                coco.to_yolo(str(root / split / "labels"))
                shutil.move(root / split / "labels" / "data.yaml", root / "data.yaml")
                with (root / "data.yaml").open("a") as stream:  # as Roboflow has it
                    stream.write("train: ../train/images\nval: ../val/images\n")
            elif layout == "voc":
                coco.to_voc(str(root / split))
            else:
                coco.to_cvat(str(root / f"{split}.xml"))
        return root

    return write


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_objects(
    layout: str, laid_out: Callable[[str], Path], truth: dict[str, Any]
) -> None:
    root = laid_out(layout)
    before = sorted(root.rglob("*"))
    found = read_folder(root)
    assert (found.layout, set(found.parts)) == (layout, set(SPLITS))
    for split, part in found.parts.items():
        assert objects(part.document) == objects(truth[split])
        assert len(part.files) == len(truth[split]["images"])
        assert all(file.is_file() for file in part.files)
        ids = [each["id"] for each in part.document["annotations"]]
        assert len(set(ids)) == len(ids)
    assert sorted(root.rglob("*")) == before
    assert tuple(LAYOUTS) == flags.LAYOUTS


def yolo(root: Path, count: int = 1, names: str = "names: [cat, 'a: dog']\n") -> Path:
    """Write random pictures, all different, with one object each."""
    generator = np.random.default_rng(1)
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), np.uint8))
        coarse.resize((96, 72)).save(root / "images" / f"{number}.png")
        (root / "labels" / f"{number}.txt").write_text(f"{number % 2} 0.5 0.25 0.5 0.25\n")
    (root / "data.yaml").write_text(names)
    return root


def test_fractions_are_of_the_upright_image(tmp_path: Path) -> None:
    root = yolo(tmp_path)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (96, 72)).save(root / "images" / "0.png", exif=exif)  # shown as 72 x 96
    document = read_folder(root).parts["train"].document
    assert (document["images"][0]["width"], document["images"][0]["height"]) == (72, 96)
    assert document["annotations"][0]["bbox"] == [18, 12, 36, 24]


def test_images_without_labels_are_kept(tmp_path: Path) -> None:
    root = yolo(tmp_path, 3)
    (root / "labels" / "1.txt").unlink()
    found = read_folder(root)
    assert len(found.parts["train"].document["images"]) == 3
    assert found.parts["train"].annotated == 2
    assert found.notes == ("1 images of train have no .txt: taken as without objects",)
    assert [each["name"] for each in found.parts["train"].document["categories"]][1] == "a: dog"


def test_lists_of_voc_decide_the_split(laid_out: Callable[[str], Path]) -> None:
    root = laid_out("voc") / "train"
    stems = sorted(each.stem for each in (root / "Annotations").glob("*.xml"))
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(stems[:5]))
    (lists / "val.txt").write_text("\n".join(stems[5:8]))
    found = read_folder(root)
    assert {name: len(part.files) for name, part in found.parts.items()} == {"train": 5, "val": 3}
    assert f"{len(stems) - 8} images are in no list of ImageSets/Main: left out" in found.notes
    with pytest.raises(DatasetError):  # the images are not in this folder
        read_folder(root / "Annotations")


def test_several_voc_folders_become_one(laid_out: Callable[[str], Path]) -> None:
    root = laid_out("voc")
    counts = [len(part.files) for part in read_folder(root).parts.values()]
    (root / "train").rename(root / "VOC2007")
    (root / "val").rename(root / "VOC2012")
    (part,) = read_folder(root).parts.values()
    for kind in ("images", "annotations"):
        ids = [each["id"] for each in part.document[kind]]
        assert len(set(ids)) == len(ids)
    assert len(part.files) == sum(counts)


def no_labels(root: Path) -> None:
    shutil.rmtree(root / "labels")


def mix(root: Path) -> None:
    (root / "0.xml").write_text("<annotation><filename>0.png</filename></annotation>")


def polygon(root: Path) -> None:
    (root / "labels" / "0.txt").write_text("0 0.1 0.1 0.2 0.2 0.3 0.1\n")


def unnamed(root: Path) -> None:
    (root / "data.yaml").unlink()


def elsewhere(root: Path) -> None:
    (root / "data.yaml").write_text("names: [cat, dog]\ntrain: /etc\n")


def unreadable(root: Path) -> None:
    (root / "images" / "0.png").write_text("no image")


def unbounded(root: Path) -> None:
    (root / "data.yaml").write_text(f"names: [cat, dog]\ntrain: {'x' * 5000}\n")


def unknown_class(root: Path) -> None:
    (root / "labels" / "0.txt").write_text("7 0.5 0.5 0.1 0.1\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_labels, "no known layout .1 images and 1 other files.* Looked for coco: .*cvat"),
        (mix, r"mixes layouts: yolo \(labels/0.txt\), voc \(0.xml\)"),
        (polygon, r"labels/0.txt: line 1: expected 5 fields.* Only boxes"),
        (unnamed, "nothing names their classes"),
        (elsewhere, "names '/etc', which is not in"),
        (unbounded, "names 'xxx.*, which is not in"),
        (unreadable, "1 of 1 images cannot be read"),
        (unknown_class, "labels/0.txt: line 1: class_idx 7 out of range"),
    ],
)
def test_bad_folders_are_explained(
    damage: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    root = yolo(tmp_path)
    damage(root)
    with pytest.raises(DatasetError, match=said):
        read_folder(root)


@pytest.mark.parametrize("kind", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [7, {}, {"id": [], "image_id": [], "file_name": "a\0b"}])
def test_malformed_coco_is_refused_or_read(kind: str, value: object, tmp_path: Path) -> None:
    root = yolo(tmp_path, 4)
    document = read_folder(root).parts["train"].document
    shutil.rmtree(root / "labels")
    document[kind].insert(0, value)
    (root / "all.json").write_text(json.dumps(document))
    if kind == "annotations":  # those are for the check of health
        divided, _ = with_validation(read_folder(root))
        assert sum(len(part.document[kind]) for part in divided.parts.values()) == 4
    else:
        with pytest.raises(DatasetError):
            read_folder(root)


def test_classes_that_differ_are_named(laid_out: Callable[[str], Path]) -> None:
    root = laid_out("voc")
    file = next(each for each in sorted(root.glob("val/**/*.xml")) if "<name>" in each.read_text())
    text = file.read_text()
    start = text.index("<name>")
    file.write_text(text[:start] + "<name>unicorn" + text[text.index("</name>") :])
    with pytest.raises(DatasetError, match="classes of train and val differ: only in val: unicorn"):
        read_folder(root)


def test_similar_images_stay_together(tmp_path: Path) -> None:
    root = yolo(tmp_path, 30)
    for number in range(0, 30, 3):  # a copy in JPEG at half the size
        picture = Image.open(root / "images" / f"{number}.png").resize((48, 36))
        picture.save(root / "images" / f"copy of {number}.jpg", quality=40)
        shutil.copy(root / "labels" / f"{number}.txt", root / "labels" / f"copy of {number}.txt")
    folder = read_folder(root)
    divided, how = with_validation(folder, seed=3)
    again, _ = with_validation(folder, seed=3)
    names = {
        split: {each["file_name"] for each in part.document["images"]}
        for split, part in divided.parts.items()
    }
    assert again.parts == divided.parts
    assert len(names["train"]) + len(names["val"]) == 40
    assert not names["train"] & names["val"]
    assert 8 <= len(names["val"]) <= 10
    for number in range(0, 30, 3):
        pair = {f"images/{number}.png", f"images/copy of {number}.jpg"}
        assert pair <= names["train"] or pair <= names["val"], number
    assert "10 pairs of similar images" in how
    counts = Counter(each["category_id"] for each in divided.parts["val"].document["annotations"])
    assert set(counts) == {1, 2}
    one, _ = with_validation(folder, seed=4)
    assert one.parts["val"] != divided.parts["val"]


def test_names_group_frames_and_copies(tmp_path: Path) -> None:
    names = [f"video{video}_frame_{frame:03d}.jpg" for video in range(10) for frame in range(3)]
    names += ["a_jpg.rf.0123456789abcdef.jpg", "a_jpg.rf.fedcba9876543210.jpg"]
    images = [
        {"id": number, "file_name": name, "width": 9, "height": 9}
        for number, name in enumerate(names)
    ]
    document = {"images": images, "annotations": [], "categories": []}
    divided, how = with_validation(Folder(tmp_path, "coco", {"train": Part(document, tmp_path)}))
    owners = [
        {each["file_name"][:6].rstrip("_") for each in part.document["images"]}
        for part in divided.parts.values()
    ]
    assert not owners[0] & owners[1]
    assert "11 groups by name" in how


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    root = yolo(tmp_path, 10)
    folder, _ = with_validation(read_folder(root))
    write_parts(folder, root / "resnext_det")
    again = read_folder(root)
    assert {name: part.document for name, part in again.parts.items()} == {
        name: part.document for name, part in folder.parts.items()
    }
    train = {**folder.parts["train"].document, "images": [], "annotations": []}
    (root / "resnext_det" / "train.json").write_text(json.dumps(train))
    with pytest.raises(DatasetError, match="no images to train on"):
        read_folder(root)


def test_divided_coco_images_are_found_again(tmp_path: Path) -> None:
    root = yolo(tmp_path, 10)
    document = read_folder(root).parts["train"].document
    shutil.rmtree(root / "labels")
    for each in document["images"]:
        each["file_name"] = Path(each["file_name"]).name  # relative to images/, not to the root
    (root / "instances_all.json").write_text(json.dumps(document))
    folder, _ = with_validation(read_folder(root))
    write_parts(folder, root / "resnext_det")
    for parts in (folder.parts, read_folder(root).parts):
        assert [len(part.files) for part in parts.values()] == [8, 2]
        assert all(file.is_file() for part in parts.values() for file in part.files)


def test_paths_of_any_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = yolo(tmp_path / "data", 3, "names: [cat, dog]\ntrain: train.txt\n")
    (root / "images" / "._0.png").write_text("what macOS puts into archives")
    (root / "train.txt").write_text(f"{root}/images/0.png\n/gone/1.png\n./images/2.png\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    part = read_folder(Path("../data")).parts["train"]
    assert part.files == [root / "images" / f"{number}.png" for number in range(3)]
    monkeypatch.setattr(layouts, "_MOST_TEXT", 40)
    with pytest.raises(DatasetError, match="has more than 40 bytes"):
        read_folder(root)


def test_similar_photographs(real_photographs: Path, tmp_path: Path) -> None:
    files = sorted((real_photographs / "val2017").glob("*.jpg"))
    copies = []
    for file in files:
        copies.append(tmp_path / file.name)
        picture = Image.open(file).convert("RGB")
        picture.resize((picture.width // 2, picture.height // 2)).save(copies[-1], quality=50)
    shutil.copy(files[0], copies[0])
    found = set(similar(fingerprints(files), fingerprints(copies)))
    assert found == {(number, number, number == 0) for number in range(len(files))}
