"""Pictures of the gallery: small JPEGs, boxes placed within them, files of any kind."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnext_det.report.matching import Labelled, compare
from resnext_det.report.pictures import Entry, Place, make_entry, picture_file

NAMES = {1: "cat", 2: "dog"}


def entry_of(file: Path, truth: list[Labelled], predictions: list[Labelled]) -> Entry | None:
    outcome = compare(truth, predictions)
    return make_entry(file, file.name, truth, predictions, (outcome, outcome), NAMES)


def opened(entry: Entry) -> Image.Image:
    header, _, encoded = entry.picture.partition(",")
    assert header == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_boxes_are_placed_in_percent_and_within_the_picture(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    boxes = [(20, 10, 50, 50), (-50, -10, 100, 200), (190, 90, 50, 50), (300, 300, 9, 9)]
    entry = entry_of(tmp_path / "a.png", [Labelled(box, 1) for box in boxes], [])
    assert entry is not None
    assert [box.place for box in entry.truth] == [
        Place(10, 10, 25, 50),
        Place(0, 0, 25, 100),
        Place(95, 90, 5, 10),
        Place(100, 100, 0, 0),
    ]


def test_a_true_box_is_found_from_the_score_of_what_finds_it(tmp_path: Path) -> None:
    Image.new("L", (200, 100)).save(tmp_path / "a.png")
    box, far = (20, 10, 50, 50), (120, 10, 50, 50)
    truth = [Labelled(box, 1), Labelled(far, 2), Labelled(far, 1, crowd=True)]
    predictions = [Labelled(box, 1, 0.9), Labelled(box, 1, 0.7), Labelled(far, 1, 0.6)]
    entry = entry_of(tmp_path / "a.png", truth, [*predictions, Labelled(box, 2, 0.3)])
    assert entry is not None
    assert [each.found_from for each in entry.truth] == [0.9, None, None]
    assert [each.right for each in entry.predictions] == [True, False, None, False]
    assert [each.instead_of for each in entry.predictions] == [None, None, None, "cat"]
    assert entry.categories == {1, 2}


@pytest.mark.parametrize("size", [(3000, 1500), (200, 100), (1, 4000)])
def test_pictures_become_small_whatever_they_show(tmp_path: Path, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", compress_level=0)
    entry = entry_of(tmp_path / "a.png", [], [])
    assert entry is not None
    assert len(entry.picture) < 4 / 3 * 96_000 + 50
    picture = opened(entry)
    assert (picture.mode, picture.size) == ("RGB", (entry.width, entry.height))
    assert max(picture.size) <= 640
    assert size[0] > 640 or picture.size[0] == size[0]


def test_a_turned_photograph_is_shown_upright(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg", exif=tags)
    entry = entry_of(tmp_path / "a.jpg", [Labelled((0, 0, 50, 100), 1)], [])
    assert entry is not None
    assert (entry.width, entry.height) == (100, 200)
    assert entry.truth[0].place == Place(0, 0, 50, 50)


def test_files_that_are_no_pictures_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for content in (b"", b"x", b"\xff\xd8\xff", b"BM" + bytes(60), b"P6 99999 99999 255\n"):
        (tmp_path / "a.jpg").write_bytes(content)
        assert entry_of(tmp_path / "a.jpg", [], []) is None
    Image.new("RGB", (200, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # as those of 179 million pixels are
    assert entry_of(tmp_path / "large.png", [], []) is None
    assert "large.png cannot be read" in caplog.text


@pytest.mark.parametrize("name", ["../a.jpg", "x/../../a.jpg", "\0", "a" * 5000, "", ".", "b.jpg"])
def test_names_of_no_picture_in_the_folder_are_none(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "a.jpg").write_bytes(b"x")
    assert picture_file(folder, "a.jpg") == folder / "a.jpg"
    assert picture_file(folder, name) is None
    assert picture_file(folder, str(tmp_path / "a.jpg")) is None
