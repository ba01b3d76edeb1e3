from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from resnext_det.errors import DatasetError
from resnext_det.visualize.video_reading import open_video

Frames = Callable[..., Path]
EVEN = [index / 10 for index in range(60)]
UNEVEN = [0.0, 0.1, 0.15, 0.6, 1.5, 1.55]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.avi"])
def test_frames_come_with_their_colours_and_times(
    name: str, frames: Frames, frame_colour: Callable[[int], NDArray[np.uint8]], tmp_path: Path
) -> None:
    times = EVEN[:12] if name == "a.avi" else UNEVEN  # AVI has no uneven times
    codec = "mpeg4" if name == "a.avi" else "libx264"
    with open_video(frames(tmp_path / name, times, codec=codec)) as reader:
        found = list(reader)
        assert reader.problem is None
    assert [each.index for each in found] == list(range(len(times)))
    assert [each.seconds for each in found] == pytest.approx(times, abs=2e-3)
    for each in found:
        pixels = np.asarray(each.picture).astype(int)
        assert each.picture.size == (64, 48)
        assert abs(pixels[36, 8] - frame_colour(each.index)).max() <= 8  # RGB, not BGR
        assert pixels[4, 4].min() > 240 and pixels[36, 56].max() < 12


def test_times_begin_with_the_first_frame(frames: Frames, tmp_path: Path) -> None:
    with open_video(frames(tmp_path / "late.mkv", [7.0, 7.1, 7.3])) as reader:
        assert [each.seconds for each in reader] == pytest.approx([0, 0.1, 0.3])
        assert reader.problem is None  # though it says that it ends at 7.4 s


QUARTERS = {
    # The matrix of the track header turns the picture: clockwise by 0, 90, 180 and 270 degrees.
    0: ((1, 0, 0, 1), (64, 48), (4, 4)),
    90: ((0, 1, -1, 0), (48, 64), (4, 43)),
    180: ((-1, 0, 0, -1), (64, 48), (43, 59)),
    270: ((0, -1, 1, 0), (48, 64), (59, 4)),
}


@pytest.mark.parametrize("degrees", QUARTERS)
def test_frames_are_upright(degrees: int, frames: Frames, tmp_path: Path) -> None:
    """The white mark of the upper left corner is where the rotation takes it."""
    (a, b, c, d), size, (row, column) = QUARTERS[degrees]
    file = frames(tmp_path / "turned.mp4", EVEN[:3])
    content = bytearray(file.read_bytes())
    place = content.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2, version 0
    one = 1 << 16
    content[place : place + 36] = struct.pack(
        ">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30
    )
    file.write_bytes(content)
    with open_video(file) as reader:
        (first, *_) = reader
    pixels = np.asarray(first.picture)
    assert first.picture.size == size
    assert pixels[row, column].min() > 240
    assert (pixels.min(axis=2) > 240).mean() < 0.08  # and it is the only one


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_a_video_that_was_cut_short_keeps_its_frames(
    name: str, frames: Frames, tmp_path: Path
) -> None:
    file = frames(tmp_path / name, EVEN, size=(320, 240))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    with open_video(file) as reader:
        count = len(list(reader))
        said = str(reader.problem)
    assert 5 < count < 60
    assert f"{name} is damaged or was cut short" in said


def test_damage_in_the_middle_is_passed_over_and_told(frames: Frames, tmp_path: Path) -> None:
    file = frames(tmp_path / "damaged.mp4", EVEN, size=(320, 240))
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    file.write_bytes(content)
    with open_video(file) as reader:
        found = list(reader)
        assert "cannot be decoded" in str(reader.problem)
    assert found[-1].seconds == pytest.approx(5.9, abs=0.2)


@pytest.mark.parametrize("content", [b"", b"no video", bytes(5000)])
def test_what_is_no_video_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(DatasetError, match=r"clip\.mp4 cannot be opened as a video"):
        open_video(tmp_path / "clip.mp4")


def test_a_playlist_that_calls_itself_a_video_opens_no_other_file(
    frames: Frames, tmp_path: Path
) -> None:
    """FFmpeg would follow it, to any file and any address."""
    other = frames(tmp_path / "secret.mp4", EVEN[:5])
    lists = {
        "clip.mp4": f"ffconcat version 1.0\nfile '{other.name}'\n",
        "clip.mkv": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DatasetError, match="cannot be opened as a video"):
            open_video(tmp_path / name)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    for name, why in (("a.mp4", "not a regular file"), ("none.mp4", "No such file")):
        with pytest.raises(DatasetError, match=f"{name} cannot be opened as a video: {why}"):
            open_video(tmp_path / name)


def test_how_many_frames_there_are_is_known_beforehand(frames: Frames, tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        with open_video(frames(tmp_path / name, EVEN)) as reader:
            assert reader.frame_count == pytest.approx(60, abs=1)


WITHOUT = """
import sys
from pathlib import Path

sys.modules["av"] = None  # as Python marks what cannot be imported
import resnext_det.visualize.demonstration
from resnext_det.errors import ConfigError
from resnext_det.visualize.video_reading import open_video

try:
    open_video(Path("clip.mp4"))
except ConfigError as error:
    print(error)
"""


def test_pyav_is_needed_for_videos_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("pip install av")
