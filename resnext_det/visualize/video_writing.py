"""Videos that are written, whole or not at all, through FFmpeg's libraries (PyAV)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from resnext_det.errors import DatasetError
from resnext_det.files import written_beside
from resnext_det.visualize.video_reading import TICKS, require_av

if TYPE_CHECKING:
    from av.container import OutputContainer

ENCODERS = ("libx264", "libopenh264", "mpeg4")
"""The first that FFmpeg was built with is taken; it always has the last one."""


class VideoWriter:
    """The frames of a video that is written; see `written_video`."""

    def __init__(
        self, container: OutputContainer, rate: Fraction, encoders: Sequence[str], target: Path
    ) -> None:
        """Prepare; the first frame says how large all are.

        Args:
            container: to write to.
            rate: frames a second, about.
            encoders: FFmpeg's names; the first that there is will be taken.
            target: for messages.
        """
        self._av = require_av()
        self._container = container
        self._rate = rate
        self._encoder = next(name for name in encoders if name in self._av.codecs_available)
        self._target = target
        self._stream: Any = None
        self._last = -1

    def write(self, picture: Image.Image, seconds: float) -> None:
        """Write a frame.

        Args:
            picture: RGB; where a side is odd, the last row or column is repeated, since H.264
                halves the resolution of colours.
            seconds: its time; later than that of the frame before.

        Raises:
            DatasetError: the encoder does not take it.
        """
        pixels = np.asarray(picture.convert("RGB"))
        height, width = pixels.shape[:2]
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        # The colours of HD, told to players: they guess where nothing is said.
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
        )
        self._last = max(self._last + 1, round(seconds * TICKS))
        frame.pts, frame.time_base = self._last, Fraction(1, TICKS)
        with self._errors_named():
            if self._stream is None:
                self._stream = self._begin(frame.width, frame.height)
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        if self._stream is not None:
            with self._errors_named():
                self._container.mux(self._stream.encode(None))

    def _begin(self, width: int, height: int) -> Any:
        stream: Any = self._container.add_stream(self._encoder, rate=self._rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, TICKS)
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited, as is usual
        if self._encoder == "libx264":
            stream.options = {"crf": "20"}
        else:
            stream.bit_rate = int(max(500_000, 0.2 * width * height * float(self._rate)))
        return stream

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except self._av.FFmpegError as error:
            if isinstance(error, OSError):  # of the disk, not of the video
                raise
            raise DatasetError(f"{self._target} cannot be encoded: {error.strerror}") from error


@contextlib.contextmanager
def written_video(
    target: Path, rate: Fraction, encoders: Sequence[str] = ENCODERS
) -> Iterator[VideoWriter]:
    """Write an MP4 beside and rename it: H.264 where FFmpeg was built with it, else MPEG-4.

    Args:
        target: the file; nothing of it is left where the body ends with an error.
        rate: frames a second, about; each frame has a time of its own.
        encoders: FFmpeg's names; the first that there is will be taken.

    Raises:
        ConfigError: there is no PyAV.
        DatasetError: the encoder does not take the frames.
        ResNeXtError: the file cannot be written.
    """
    av = require_av()
    with (
        written_beside(target) as beside,
        av.open(
            str(beside.absolute()), "w", format="mp4", options={"movflags": "faststart"}
        ) as container,
    ):
        writer = VideoWriter(container, rate, encoders, target)
        yield writer
        writer.finish()
