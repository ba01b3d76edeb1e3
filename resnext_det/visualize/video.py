"""Videos and cameras, read and written through FFmpeg's libraries (PyAV)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from resnext_det.errors import ConfigError, DatasetError, quoted
from resnext_det.files import open_regular, written_beside

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.video.frame import VideoFrame

# FFmpeg detects the format from the content. Without this list, a text file named clip.mp4 could
# be a playlist that makes it open other files or addresses.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,asf,flv,ogg"
_MOST_PIXELS = 178_956_970  # of a frame; Pillow refuses larger images too
_DEFAULT_RATE = Fraction(30)
_HIGHEST_RATE = 1000
_TICKS = 60_000  # per second; 24, 25, 30, 50, 60 and 30/1.001 frames/s are whole ticks
_ENCODERS = ("libx264", "libopenh264", "mpeg4")  # FFmpeg always has the last one


@dataclass(frozen=True)
class Frame:
    """An upright RGB frame, and its time in seconds since the first one."""

    picture: Image.Image
    seconds: float


def require_av() -> Any:
    """Return PyAV, an optional dependency that only videos need.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            f"videos and cameras need PyAV, which cannot be imported ({error}): pip install av"
        ) from error
    return av


@contextlib.contextmanager
def open_video(file: Path) -> Iterator[VideoReader]:
    """Open a video file: MP4, QuickTime, Matroska, WebM, AVI, MPEG, ASF, FLV or Ogg.

    Raises:
        ConfigError: PyAV is not installed.
        DatasetError: the file is not a readable video.
    """
    require_av()
    name = quoted(file)
    try:
        source = open_regular(file)
    except OSError as error:
        raise DatasetError(f"{name} cannot be opened as a video: {error.strerror}.") from error
    # FFmpeg gets the open file and may open nothing else.
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    with source, _opened(source, name, None, options) as reader:
        yield reader


@contextlib.contextmanager
def open_camera(number: int) -> Iterator[VideoReader]:
    """Open a camera of Linux, counted from 0. Never tested with a real camera.

    Raises:
        ConfigError: PyAV is not installed.
        DatasetError: the camera is missing, busy or forbidden.
    """
    device = f"/dev/video{number}"
    with _opened(device, f"--webcam {number} ({device})", "video4linux2", {}) as reader:
        yield reader


@contextlib.contextmanager
def _opened(
    source: str | BinaryIO, name: str, form: str | None, options: dict[str, str]
) -> Iterator[VideoReader]:
    av = require_av()
    try:
        container = av.open(source, format=form, options=options)
    except (av.FFmpegError, OSError) as error:
        raise DatasetError(f"{name} cannot be opened as a video: {error.strerror}.") from error
    with container:
        yield VideoReader(container, name)


class VideoReader:
    """Yields the frames of a video once, skipping what cannot be decoded.

    All frames get the size of the first. Rotation by quarter turns is applied; mirroring and the
    shape of non-square pixels are ignored.

    Attributes:
        name: for messages.
    """

    def __init__(self, container: InputContainer, name: str) -> None:
        """Prepare to read; `open_video` and `open_camera` do the opening.

        Raises:
            DatasetError: there is no video stream.
        """
        self._av = require_av()
        self.name = name
        self._container = container
        if not container.streams.video:
            raise DatasetError(f"{name} contains no video.")
        self._stream = container.streams.video[0]
        # FFmpeg checks this before it allocates a frame.
        self._stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
        self._stream.thread_type = "AUTO"
        self._first_problem = ""
        self._end = 0.0  # of the last frame, on the file's own clock

    @property
    def rate(self) -> Fraction:
        """Average frames per second, 30 if the file does not say."""
        rate = self._stream.average_rate
        return rate if rate and 0 < rate <= _HIGHEST_RATE else _DEFAULT_RATE

    @property
    def frame_count(self) -> int | None:
        """Estimated number of frames, for a progress bar; None if unknown."""
        duration = self._duration
        return None if duration is None else max(1, round(duration * self.rate))

    @property
    def problem(self) -> str | None:
        """What went wrong, once all frames have been read."""
        problem, duration = self._first_problem, self._duration
        if not problem and duration is not None and duration - self._end > max(1, duration / 20):
            problem = f"it ends after {self._end:.1f} of {duration:.1f} s"
        return f"{self.name} is damaged or truncated: {problem}." if problem else None

    @property
    def _duration(self) -> float | None:
        if self._stream.duration and self._stream.time_base:
            return float(self._stream.duration * self._stream.time_base)
        duration = self._container.duration
        return duration / self._av.time_base if duration else None

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames in order.

        Raises:
            DatasetError: no frame can be decoded.
        """
        size: tuple[int, int] | None = None
        start = seconds = 0.0
        for frame in self._decoded():
            try:
                # NumPy and FFmpeg both count quarter turns counterclockwise.
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            except (self._av.FFmpegError, ValueError) as error:
                self._first_problem = self._first_problem or quoted(error)
                continue
            picture = Image.fromarray(pixels)
            known = frame.time if frame.pts is not None else None
            if size is None:
                size, start = picture.size, known or 0.0
            elif known is None:
                seconds += float(1 / self.rate)
            else:
                seconds = max(known - start, seconds + 1 / _TICKS)
            self._end = start + seconds + float(1 / self.rate)
            if picture.size != size:
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            yield Frame(picture, seconds)
        if size is None:
            reason = f": {self._first_problem}" if self._first_problem else ""
            raise DatasetError(f"{self.name} has no frame that can be decoded{reason}.")

    def _decoded(self) -> Iterator[VideoFrame]:
        try:
            for packet in self._container.demux(self._stream):
                try:
                    yield from packet.decode()
                except self._av.FFmpegError as error:  # carry on, as video players do
                    message = f"a part cannot be decoded ({error.strerror})"
                    self._first_problem = self._first_problem or message
        except (self._av.FFmpegError, OSError) as error:
            message = f"reading stopped early ({error.strerror})"
            self._first_problem = self._first_problem or message


class VideoWriter:
    """Encodes frames into an open container; see `written_video`."""

    def __init__(self, container: OutputContainer, rate: Fraction) -> None:
        """Prepare to write at about `rate` frames per second; the first frame sets the size."""
        self._av = require_av()
        self._container = container
        self._rate = rate
        self._stream: Any = None
        self._last_tick = -1

    def write(self, picture: Image.Image, seconds: float) -> None:
        """Write a frame whose time is later than that of the frame before."""
        pixels = np.asarray(picture.convert("RGB"))
        height, width = pixels.shape[:2]
        # H.264 halves the resolution of colours, so both sides must be even.
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        # Players guess the colour space of a video that does not state it: this one is HD's.
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
        )
        self._last_tick = max(self._last_tick + 1, round(seconds * _TICKS))
        frame.pts, frame.time_base = self._last_tick, Fraction(1, _TICKS)
        if self._stream is None:
            self._start(frame.width, frame.height)
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write the frames that the encoder still buffers.

        Raises:
            DatasetError: no frame was written.
        """
        if self._stream is None:
            raise DatasetError("there was no frame to write.")
        self._container.mux(self._stream.encode(None))

    def _start(self, width: int, height: int) -> None:
        encoder = next(name for name in _ENCODERS if name in self._av.codecs_available)
        self._stream = self._container.add_stream(encoder, rate=self._rate)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.time_base = Fraction(1, _TICKS)
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited
        if encoder == "libx264":
            self._stream.options = {"crf": "20"}
        else:
            self._stream.bit_rate = int(max(500_000, 0.2 * width * height * float(self._rate)))


@contextlib.contextmanager
def written_video(target: Path, rate: Fraction) -> Iterator[VideoWriter]:
    """Write an MP4 (H.264 if FFmpeg has an encoder for it), whole or not at all.

    Args:
        target: the file; nothing is left of it if the body raises.
        rate: approximate frames per second; every frame has its own time.

    Raises:
        ConfigError: PyAV is not installed.
        DatasetError: the frames cannot be encoded, or there are none.
        ResNeXtError: the file cannot be written.
    """
    av = require_av()
    with written_beside(target) as beside:
        path, options = str(beside.absolute()), {"movflags": "faststart"}
        try:
            with av.open(path, "w", format="mp4", options=options) as container:
                writer = VideoWriter(container, rate)
                yield writer
                writer.finish()
        except av.FFmpegError as error:
            if isinstance(error, OSError):  # the disk's fault, not the video's
                raise
            raise DatasetError(f"{quoted(target)} cannot be encoded: {error.strerror}.") from error
