"""What `check-data --data` finds in a folder."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from resnext_det import load_config
from resnext_det.engine.own_data import MODELS, survey_folder
from resnext_det_cli import main

from .test_folder import yolo


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """48 pictures to train on, 12 to validate with, all different."""
    root = yolo(tmp_path / "data", 60)
    for kind in ("images", "labels"):
        for split, numbers in (("train", range(48)), ("val", range(48, 60))):
            (root / kind / split).mkdir()
            for number in numbers:
                (file,) = (root / kind).glob(f"{number}.*")
                file.rename(root / kind / split / file.name)
    return root


def checked(data: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    code = main(["check-data", "--data", str(data), "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def whats(document: Any) -> list[str]:
    return [f"{each['severity']}: {each['what']}: {each['count']}" for each in document["findings"]]


def test_sound_data(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(data.rglob("*"))
    code, found = checked(data, capsys)
    assert (code, found["findings"], found["layout"]) == (0, [], "yolo")
    assert found["classes"] == {"cat": {"train": 24, "val": 6}, "a: dog": {"train": 24, "val": 6}}
    assert found["health"]["train"]["images"] == 48
    assert sorted(data.rglob("*")) == before


def test_images_of_both_splits(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in ((3, "same.png"), (4, "near.jpg")):
        source, target = data / "images/train" / f"{number}.png", data / "images/val" / name
        shutil.copy(data / f"labels/train/{number}.txt", data / f"labels/val/{name[:4]}.txt")
        if name == "same.png":
            shutil.copy(source, target)
        else:
            Image.open(source).resize((48, 36)).save(target, quality=40)
    code, found = checked(data, capsys)
    assert code == 1
    assert whats(found) == [
        "error: identical images in train and val: figures on val are too good: 1",
        "warning: nearly identical images in train and val: figures on val are too good: 1",
    ]
    assert found["findings"][1]["examples"] == ["'images/train/4.png' and 'images/val/near.jpg'"]


def test_images_outside_the_folder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, root = str(data / "images/train/3.png"), tmp_path / "coco"
    (root / "images").mkdir(parents=True)
    image = {"id": 1, "file_name": picture, "width": 96, "height": 72}
    label = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81}
    document = {"images": [image], "annotations": [label | {"iscrowd": 0}]}
    for split in ("train", "val"):
        kinds = [{"id": 1, "name": "cat"}]
        (root / f"{split}.json").write_text(json.dumps(document | {"categories": kinds}))
    code, found = checked(root, capsys, "--html", str(tmp_path / "data.html"))
    assert code == 1 and found["shared"][0]["names"] == [picture, picture]
    assert "lead out of the image folder" in json.dumps(found["health"])


def test_classes_empty_images_and_flags(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(48):
        if number % 2 == 0 and number >= 10:
            (data / f"labels/train/{number}.txt").write_text("")
    for number in range(49, 60, 2):
        (data / f"labels/val/{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    exif = Image.Exif()
    exif[0x112] = 3
    picture = Image.open(data / "images/train/7.png")
    picture.save(data / "images/train/7.png", exif=exif)
    code, found = checked(data, capsys)
    assert code == 0
    assert whats(found) == [
        "warning: classes with fewer than 20 objects to train on: 1",
        "warning: classes without objects in val, so without AP: 1",
    ]
    assert found["findings"][0]["examples"] == ["cat 5"]
    assert found["empty"] == {"train": 19, "val": 0}
    (flag,) = found["health"]["train"]["findings"]
    assert flag["what"].startswith("images turned by their EXIF orientation")
    assert main(["check-data", "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert "19 images of train have no objects" in out and "FILTER_EMPTY_ANNOTATIONS" in out


def test_small_objects_and_anchors_to_paste(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (data / "labels/train").iterdir():
        file.write_text("0 0.5 0.25 0.02 0.09\n1 0.3 0.4 0.02 0.08\n")
    words = ["INPUT.MIN_SIZE_TRAIN", "216"]  # three times the images' 96 x 72
    code, found = checked(data, capsys, *words)
    assert code == 0
    (tiny,) = (each["what"] for each in found["findings"])
    assert tiny.startswith(
        "96 of 96 objects have a side of less than 8 pixels at the training size"
    )
    assert found["size"][0] == 216
    pasted = shlex.split(found["overrides"])
    assert pasted[::2] == ["MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"]
    load_config(MODELS["x50"], pasted)
    assert found["better_recalls"]["0.7"] > found["recalls"]["0.7"] + 0.3
    given = dict(zip([*words[::2], *pasted[::2]], [*words[1::2], *pasted[1::2]]))
    _, again = survey_folder(data, None, None, given)
    assert again.recalls == pytest.approx(list(found["better_recalls"].values()))


def test_exit_code_of_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["check-data", "--data", str(tmp_path / "empty")])
    assert ended.value.code == 2
