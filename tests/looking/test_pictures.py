from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from resnext_det.errors import DatasetError
from resnext_det.looking.pictures import made_by, read_picture, save_jpeg, save_png


def halves(width: int = 30, height: int = 20) -> Image.Image:
    picture = Image.new("RGB", (width, height), (200, 30, 60))
    picture.paste((20, 40, 220), (0, 0, width // 2, height // 2))
    return picture


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(orientation: int, tmp_path: Path) -> None:
    """As Pillow's own ImageOps has it, which is not what Detectron2 uses."""
    exif = Image.Exif()
    exif[274] = orientation
    file = tmp_path / "turned.png"
    halves().save(file, exif=exif)
    with Image.open(file) as stored:
        expected = ImageOps.exif_transpose(stored)
    found = read_picture(file)
    assert found.size == ((20, 30) if orientation >= 5 else (30, 20))
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_pictures_of_every_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    file = tmp_path / "picture.tiff"
    halves().convert("L" if mode == "I;16" else mode).convert(mode).save(file)
    assert read_picture(file).mode == "RGB"


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_of_16_bits_the_upper_8_are_taken(suffix: str, tmp_path: Path) -> None:
    """As Pillow takes them of 16 bits of a colour; and not all of it is white."""
    pixels = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    file = tmp_path / f"grey.{suffix}"
    if suffix == "pgm":
        file.write_bytes(b"P5 40 30 65535\n" + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(file)
    found = np.asarray(read_picture(file))
    assert np.array_equal(found, np.repeat(pixels[:, :, None] // 256, 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_of_16_bits_are_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.asarray(halves().convert("L"))
    Image.fromarray(pixels.astype(np.uint16) * 256).save(tmp_path / "16.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "8.png", exif=exif)
    found, expected = (read_picture(tmp_path / name) for name in ("16.png", "8.png"))
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_who_made_a_picture(tmp_path: Path) -> None:
    save_png(halves(), tmp_path / "own.png", "me")
    save_png(halves(), tmp_path / "other.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "own.png").read_bytes()[:20])
    names = ("own.png", "other.png", "broken.png", "missing.png")
    assert [name for name in names if made_by(tmp_path / name, "me")] == ["own.png"]
    assert not made_by(tmp_path / "own.png", "somebody")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    save_jpeg(halves(300, 200), whole)
    for name, content in {
        "text.jpg": b"no picture",
        "empty.png": b"",
        "half.jpg": whole.read_bytes()[:900],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match=f"{name} cannot be read as a picture"):
            read_picture(tmp_path / name)


@pytest.mark.parametrize(
    ("size", "said"),
    [((70_000, 1000), "at most 65500 a side"), ((1000, 9), "at most 100 times the other")],
)
def test_sizes_that_cannot_be_drawn_are_refused(
    size: tuple[int, int], said: str, tmp_path: Path
) -> None:
    Image.new("1", size).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=said):
        read_picture(tmp_path / "a.png")


def test_a_picture_that_pretends_to_be_huge_is_refused(tmp_path: Path) -> None:
    """Two kilobytes that would be three gigabytes in memory."""
    file = tmp_path / "bomb.pgm"
    file.write_bytes(b"P5 40000 30000 255\n" + bytes(2000))
    with pytest.raises(DatasetError, match="cannot be read as a picture"):
        read_picture(file)
