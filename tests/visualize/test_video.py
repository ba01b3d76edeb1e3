"""Videos: frames with their times, upright; damaged and hostile files; nothing half-written."""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import resnext_det.visualize.video
from resnext_det.errors import ConfigError, DatasetError, ResNeXtError
from resnext_det.visualize.video import open_camera, open_video, written_video
from tests.visualize.conftest import frame_colour, write_frames

EVEN = [index / 10 for index in range(60)]
UNEVEN = [0.0, 0.1, 0.15, 0.6, 1.5, 1.55]
COLOURS = [(200, 30, 60), (30, 200, 60), (30, 60, 200)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_reads_colours_and_times(name: str, tmp_path: Path) -> None:
    times = EVEN[:12] if name == "a.avi" else [7 + each for each in UNEVEN]
    codec = "mpeg4" if name == "a.avi" else "libx264"
    with open_video(write_frames(tmp_path / name, times, codec=codec)) as reader:
        found = list(reader)
        assert reader.problem is None
        assert reader.frame_count is not None
    expected = [each - times[0] for each in times]
    assert [each.seconds for each in found] == pytest.approx(expected, abs=2e-3)
    for index, each in enumerate(found):
        pixels = np.asarray(each.picture).astype(int)
        assert each.picture.size == (64, 48)
        assert abs(pixels[36, 8] - frame_colour(index)).max() <= 8  # RGB, not BGR
        assert pixels[4, 4].min() > 240 and pixels[36, 56].max() < 12


# The matrix of the track header (ISO/IEC 14496-12, 8.3.2), the size, and where the mark ends up.
ROTATIONS = {
    0: ((1, 0, 0, 1), (64, 48), (4, 4)),
    90: ((0, 1, -1, 0), (48, 64), (4, 43)),
    180: ((-1, 0, 0, -1), (64, 48), (43, 59)),
    270: ((0, -1, 1, 0), (48, 64), (59, 4)),
}


@pytest.mark.parametrize("degrees", ROTATIONS)
def test_applies_rotation(degrees: int, tmp_path: Path) -> None:
    (a, b, c, d), size, (row, column) = ROTATIONS[degrees]
    file = write_frames(tmp_path / "turned.mp4", EVEN[:3])
    content = bytearray(file.read_bytes())
    place = content.index(b"tkhd") + 44
    one = 1 << 16
    matrix = (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    content[place : place + 36] = struct.pack(">9i", *matrix)
    file.write_bytes(content)
    with open_video(file) as reader:
        (first, *_) = reader
    assert first.picture.size == size
    assert np.asarray(first.picture)[row, column].min() > 240


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_truncated_video_keeps_its_frames(name: str, tmp_path: Path) -> None:
    file = write_frames(tmp_path / name, EVEN, size=(320, 240))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    with open_video(file) as reader:
        count = len(list(reader))
        assert f"{name} is damaged or truncated" in str(reader.problem)
    assert 5 < count < 60


def test_skips_damage_in_the_middle(tmp_path: Path) -> None:
    file = write_frames(tmp_path / "damaged.mp4", EVEN, size=(320, 240))
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    file.write_bytes(content)
    with open_video(file) as reader:
        found = list(reader)
        assert "cannot be decoded" in str(reader.problem)
    assert found[-1].seconds == pytest.approx(5.9, abs=0.2)


def test_refuses_what_is_not_a_video(tmp_path: Path) -> None:
    """FFmpeg would follow a playlist to any file and address."""
    other = write_frames(tmp_path / "secret.mp4", EVEN[:5])
    contents = {
        "empty.mp4": b"",
        "text.mp4": b"no video",
        "zeros.mp4": bytes(5000),
        "concat.mp4": f"ffconcat version 1.0\nfile '{other.name}'\n".encode(),
        "list.mkv": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n".encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "fifo.mp4")
    for name in (*contents, "fifo.mp4", "missing.mp4"):
        with pytest.raises(DatasetError, match=f"{name} cannot be opened as a video: "):
            open_video(tmp_path / name).__enter__()


def test_missing_camera(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"--webcam 93 .*cannot be opened"):
        open_camera(93).__enter__()


def test_names_the_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match="pip install av"):
        open_video(tmp_path / "clip.mp4").__enter__()


@pytest.mark.parametrize(("encoder", "codec"), [("libx264", "h264"), ("mpeg4", "mpeg4")])
@pytest.mark.parametrize("size", [(64, 48), (65, 47)])
def test_writes_colours_and_times(
    encoder: str, codec: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resnext_det.visualize.video, "_ENCODERS", ("missing", encoder))
    times = [0.0, 1001 / 30000, 0.5, 0.5]
    with written_video(tmp_path / "clip.mp4", Fraction(30)) as writer:
        for rgb, seconds in zip([*COLOURS, COLOURS[-1]], times):
            writer.write(Image.new("RGB", size, rgb), seconds)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        found = list(container.decode(video=0))
        assert container.streams.video[0].codec_context.name == codec
    written = [each.time for each in found]
    assert written == pytest.approx(times, abs=5e-5) and written[3] > written[2]
    for frame, rgb in zip(found, COLOURS):
        assert (frame.width, frame.height, frame.colorspace) == (64 + 2 * (size[0] % 2), 48, 1)
        assert abs(frame.to_ndarray(format="rgb24").astype(int) - np.array(rgb)).max() <= 10
    assert [each.name for each in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(
    ("error", "size", "count"),
    [
        (KeyboardInterrupt, (64, 48), 0),
        (KeyboardInterrupt, (64, 48), 2),
        (DatasetError, (64, 48), 0),  # no frame
        (DatasetError, (40_000, 16), 1),  # larger than H.264 allows
    ],
)
def test_failed_video_leaves_no_file(
    error: type[BaseException], size: tuple[int, int], count: int, tmp_path: Path
) -> None:
    with pytest.raises(error), written_video(tmp_path / "clip.mp4", Fraction(30)) as writer:
        for number in range(count):
            writer.write(Image.new("RGB", size), number / 10)
        if error is KeyboardInterrupt:
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_not_blamed_on_the_video(tmp_path: Path) -> None:
    """A file-size limit simulates a full disk."""
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with (
            pytest.raises(
                ResNeXtError, match=r"clip\.mp4 cannot be written: File too large"
            ) as error,
            written_video(tmp_path / "clip.mp4", Fraction(30)) as writer,
        ):
            for number in range(100):
                writer.write(Image.fromarray(np.roll(noise, 7 * number)), number / 30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not isinstance(error.value, DatasetError)  # which would skip to the next video
    assert list(tmp_path.iterdir()) == []
