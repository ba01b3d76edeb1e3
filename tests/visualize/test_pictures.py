from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from resnext_det.errors import DatasetError
from resnext_det.visualize.pictures import made_by, read_drawable, save_png


def halves(width: int = 30, height: int = 20) -> Image.Image:
    picture = Image.new("RGB", (width, height), (200, 30, 60))
    picture.paste((20, 40, 220), (0, 0, width // 2, height // 2))
    return picture


def test_who_made_a_picture(tmp_path: Path) -> None:
    save_png(halves(), tmp_path / "own.png", "me")
    save_png(halves(), tmp_path / "other.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "own.png").read_bytes()[:20])
    names = ("own.png", "other.png", "broken.png", "missing.png")
    assert [name for name in names if made_by(tmp_path / name, "me")] == ["own.png"]
    assert not made_by(tmp_path / "own.png", "somebody")


def test_a_fifo_is_nobodys_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert not made_by(tmp_path / "a.png", "me")


def test_what_no_jpeg_can_hold_is_refused(tmp_path: Path) -> None:
    Image.new("1", (70_000, 1000)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png cannot be drawn on: .*at most 65500 a side"):
        read_drawable(tmp_path / "a.png")
    halves().save(tmp_path / "b.png")
    assert read_drawable(tmp_path / "b.png").tobytes() == halves().tobytes()
