"""Frames of videos with their times, upright, through FFmpeg's libraries (PyAV)."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from resnext_det.errors import ConfigError, DatasetError, quoted
from resnext_det.files import open_regular
from resnext_det.visualize.pictures import MOST_PIXELS, check_size

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

# FFmpeg tells the format by the content. Without this list, a text file named clip.mp4 could be a
# playlist that makes it open other files or addresses.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,asf,flv,ogg"
TICKS = 60_000
"""A second; frames of 24, 25, 30, 50, 60 and 30/1.001 a second are whole ticks."""

_USUAL_RATE = Fraction(30)
_HIGHEST_RATE = 1000


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
        index: from 0.
        seconds: since the first one.
        picture: upright, RGB.
    """

    index: int
    seconds: float
    picture: Image.Image


def require_av() -> Any:
    """Return PyAV, which is imported only where there are videos.

    Raises:
        ConfigError: it is not installed, or does not work.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            f"videos and cameras need PyAV, and importing it failed ({error}): pip install av"
        ) from error
    return av


class VideoReader:
    """The frames of a video, once, as far as they can be decoded.

    Use it in a with statement. All frames are of the first one's size. The rotation that a file
    asks for is carried out in quarter turns; mirroring and pixels that are not square are not.
    """

    def __init__(
        self,
        source: str | BinaryIO,
        name: str,
        form: str | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Open a video; `open_video` and `resnext_det.visualize.camera` know what to pass.

        Args:
            source: an open file, which is closed at the end, or FFmpeg's name of a device.
            name: for messages.
            form: FFmpeg's name of the format; None finds it out.
            options: of the format.

        Raises:
            ConfigError: there is no PyAV.
            DatasetError: it is no video that can be read.
        """
        self.name = name
        self._av = require_av()
        try:
            opened = self._av.open(source, format=form, options=dict(options or {}))
        except (self._av.FFmpegError, OSError) as error:
            raise DatasetError(
                f"{name} cannot be opened as a video: {error.strerror}. A file that was cut short "
                "may lack what its end says about the rest."
            ) from error
        self._source = source
        self._container: InputContainer = opened
        self._refused = ""  # the first thing that was wrong
        self._end = 0.0  # of the last frame, by the file's own clock
        try:
            self._prepare()
        except BaseException:
            self._close()
            raise

    def _prepare(self) -> None:
        if not self._container.streams.video:
            raise DatasetError(f"{self.name} has no video in it")
        self._stream = self._container.streams.video[0]
        context = self._stream.codec_context
        if context.width and context.height:
            self._check_size(context.width, context.height)
        # Sizes may change later on; FFmpeg looks at each before it takes memory for it.
        context.options = {"max_pixels": str(MOST_PIXELS)}
        self._stream.thread_type = "AUTO"

    def __enter__(self) -> VideoReader:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._close()

    def _close(self) -> None:
        self._container.close()
        if not isinstance(self._source, str):
            self._source.close()

    @property
    def rate(self) -> Fraction:
        """Frames a second, on average; a guess where the file does not say."""
        rate = self._stream.average_rate
        return rate if rate and 0 < rate <= _HIGHEST_RATE else _USUAL_RATE

    @property
    def frame_count(self) -> int | None:
        """About how many frames there are, for a progress bar; None where nothing is known."""
        declared = self._declared_seconds()
        return None if declared is None else max(1, round(declared * self.rate))

    @property
    def problem(self) -> str | None:
        """What was wrong, once all frames were read."""
        declared = self._declared_seconds()
        wrong = self._refused
        if declared is not None and declared - self._end > max(1.0, 0.05 * declared):
            wrong = wrong or f"it ends after {self._end:.1f} of {declared:.1f} s"
        if not wrong:
            return None
        return f"{self.name} is damaged or was cut short ({wrong}); the frames it has are there"

    def __iter__(self) -> Iterator[Frame]:
        """Give the frames in the order of their times.

        Raises:
            DatasetError: there is none that can be decoded.
        """
        size: tuple[int, int] | None = None
        start, last, index = 0.0, 0.0, 0
        for frame in self._decoded():
            try:
                picture = self._upright(frame)
            except (self._av.FFmpegError, ValueError) as error:
                self._refuse(f"frame {index}: {error}")
                continue
            if size is None:
                size = picture.size
                self._check_size(*size)
            if picture.size != size:
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            # Times that are missing or run backwards are those of even frames.
            told = frame.time if frame.pts is not None else None
            if index == 0:
                start, seconds = told or 0.0, 0.0
            elif told is None:
                seconds = last + float(1 / self.rate)
            else:
                seconds = max(told - start, last + 1 / TICKS)
            last = seconds
            self._end = start + seconds + float(1 / self.rate)
            yield Frame(index, seconds, picture)
            index += 1
        if size is None:
            why = f" ({self._refused})" if self._refused else ""
            raise DatasetError(f"{self.name} has no frame that can be decoded{why}")

    def _decoded(self) -> Iterator[VideoFrame]:
        while True:
            try:
                for packet in self._container.demux(self._stream):
                    try:
                        yield from packet.decode()
                    except self._av.FFmpegError as error:  # players as well go on with the next
                        self._refuse(f"a part cannot be decoded: {error.strerror}")
                return
            except self._av.BlockingIOError:
                time.sleep(0.005)  # cameras of macOS say so until there is a frame
            except (self._av.FFmpegError, OSError) as error:
                self._refuse(f"it cannot be read to its end: {error.strerror}")
                return

    def _check_size(self, width: int, height: int) -> None:
        try:
            check_size(width, height)
        except DatasetError as error:
            raise DatasetError(f"{self.name}: {error}") from error

    def _refuse(self, what: str) -> None:
        self._refused = self._refused or what

    @staticmethod
    def _upright(frame: VideoFrame) -> Image.Image:
        pixels = frame.to_ndarray(format="rgb24")
        # Both count quarter turns against the clock.
        return Image.fromarray(np.rot90(pixels, round(frame.rotation / 90)))

    def _declared_seconds(self) -> float | None:
        stream = self._stream
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
        if tag:
            hours, minutes, seconds = (float(part) for part in tag.groups())
            return 3600 * hours + 60 * minutes + seconds
        # The whole file's may be that of its sound.
        if self._container.duration and len(self._container.streams) == 1:
            return self._container.duration / 1_000_000
        return None


def open_video(file: Path) -> VideoReader:
    """Open a video file; use what is returned in a with statement.

    Args:
        file: of a common format: MP4, QuickTime, Matroska, WebM, AVI, MPEG and their kin.

    Raises:
        ConfigError: there is no PyAV.
        DatasetError: it is no video that can be read.
    """
    require_av()
    try:
        # FFmpeg is given the open file and may open nothing else.
        source = open_regular(file)
    except OSError as error:
        raise DatasetError(
            f"{quoted(file)} cannot be opened as a video: {error.strerror}."
        ) from error
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    return VideoReader(source, quoted(file), options=options)
