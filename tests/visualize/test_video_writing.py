from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from resnext_det.errors import DatasetError, ResNeXtError
from resnext_det.visualize.video_writing import written_video

COLOURS = [(200, 30, 60), (30, 200, 60), (30, 60, 200)]
TIMES = [0.0, 1001 / 30000, 0.5]


def read(file: Path) -> list[av.VideoFrame]:
    with av.open(str(file)) as container:
        return list(container.decode(video=0))


@pytest.mark.parametrize("encoders", [("libx264", "mpeg4"), ("none", "mpeg4")])
@pytest.mark.parametrize("size", [(64, 48), (65, 47)])
def test_frames_are_written_with_colours_and_times(
    encoders: tuple[str, ...], size: tuple[int, int], tmp_path: Path
) -> None:
    target = tmp_path / "clip.mp4"
    with written_video(target, Fraction(30), encoders) as writer:
        for rgb, seconds in zip(COLOURS, TIMES):
            writer.write(Image.new("RGB", size, rgb), seconds)
    found = read(target)
    assert [each.time for each in found] == pytest.approx(TIMES, abs=1e-5)
    for frame, rgb in zip(found, COLOURS, strict=True):
        assert (frame.width, frame.height) == (64 + 2 * (size[0] % 2), 48)
        assert frame.colorspace == 1  # BT.709, as is said to players
        pixels = frame.to_ndarray(format="rgb24").astype(int)
        assert abs(pixels - np.array(rgb)).max() <= 10
    with av.open(str(target)) as container:
        codec = container.streams.video[0].codec_context.name
    assert codec == {"libx264": "h264", "none": "mpeg4"}[encoders[0]]
    assert [each.name for each in tmp_path.iterdir()] == ["clip.mp4"]


def test_times_that_do_not_rise_are_moved(tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    with written_video(target, Fraction(30)) as writer:
        for seconds in (0.0, 0.0, 1e-9):
            writer.write(Image.new("RGB", (64, 48)), seconds)
    times = [each.time for each in read(target)]
    assert len(times) == 3 and times == sorted(set(times))


@pytest.mark.parametrize("written", [0, 2])
def test_an_error_leaves_nothing(written: int, tmp_path: Path) -> None:
    def write() -> None:
        with written_video(tmp_path / "clip.mp4", Fraction(30)) as writer:
            for number in range(written):
                writer.write(Image.new("RGB", (64, 48)), number / 10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_encoded_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with written_video(tmp_path / "clip.mp4", Fraction(30)) as writer:
            writer.write(Image.new("RGB", (40_000, 16)), 0)

    with pytest.raises(DatasetError, match=r"clip\.mp4 cannot be encoded"):
        write()
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource
import signal
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from resnext_det.errors import DatasetError, ResNeXtError
from resnext_det.visualize.video_writing import written_video

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
try:
    with written_video(Path(sys.argv[1]) / "clip.mp4", Fraction(30)) as writer:
        for number in range(100):
            writer.write(Image.fromarray(np.roll(noise, 7 * number)), number / 30)
except ResNeXtError as error:
    assert not isinstance(error, DatasetError)  # which would be passed over
    print(error)
"""


def test_a_disk_without_room_ends_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=100
    )
    assert "clip.mp4 cannot be written: File too large" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResNeXtError, match="cannot be written"):
        written_video(tmp_path / "file" / "clip.mp4", Fraction(30)).__enter__()
