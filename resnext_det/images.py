"""The image reader of data sets, predictions, drawings and thumbnails.

It returns the same bytes as Detectron2's for images of 8 bits a channel, but is safe with files
from outside and keeps more of the pixels; see `resnext_det.image_files`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import simplejpeg
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from PIL import Image, ImageFile

from resnext_det.errors import ConfigError, quoted
from resnext_det.image_files import (
    bits_of,
    loaded,
    naming,
    opened,
    orientation,
    turned,
    unknown_range,
)

CHANNELS = {
    **{"BGR": 3, "RGB": 3, "YUV-BT.601": 3, "HSV": 3, "LAB": 3, "YCbCr": 3},
    **{"L": 1, "LA": 2, "RGBA": 4, "CMYK": 4},
}
"""The pixel formats that INPUT.FORMAT may name, and their channels."""

_TRANSPOSING = (5, 6, 7, 8)  # EXIF orientations
_TURNED = (2, 3, 4, *_TRANSPOSING)
_MOST_JPEG_BYTES = 2**26  # to read into memory; of 8 bits a pixel, 64 megapixels


@dataclass(frozen=True)
class Header:
    """Size of an upright image in pixels, bits per channel, and whether EXIF data turn it."""

    width: int
    height: int
    bits: int
    turned: bool = False


def read_header(file: str | Path) -> Header:
    """Read the header of an image, without decoding its pixels.

    Raises:
        DatasetError: the header shows that `read_image` would refuse the file.
    """
    with _opened(file) as image:
        width, height = image.size
        turn = orientation(image)
        if turn in _TRANSPOSING:
            width, height = height, width
        return Header(width, height, bits_of(image), turn in _TURNED)


def read_image(file: str | Path, pixel_format: str = "RGB", *, fast: bool = False) -> NDArray[Any]:
    """Read an image upright, by its EXIF orientation.

    Args:
        file: a path, or an address that Detectron2's PathManager handles. Of an animation, the
            first frame is read.
        pixel_format: one of CHANNELS.
        fast: decode ordinary JPEGs with simplejpeg instead of Pillow: the same pixels.

    Returns:
        (height, width, channels) in uint8, 0 to 255; for YUV-BT.601 in float32, Y from 0 to 1.

    Raises:
        DatasetError: the file cannot be read, is of another format, or has floats or 32-bit
            integers as pixels.
    """
    with _opened(file) as image:
        pixels = _decoded(image, pixel_format) if fast else None
        return as_array(loaded(image), pixel_format) if pixels is None else pixels


def read_picture(file: str | Path, *, upright: bool = True) -> Image.Image:
    """Read an image in Pillow's own mode, with 8 bits a channel.

    Args:
        file: as for `read_image`.
        upright: apply the EXIF orientation. It is always applied to a TIFF.

    Raises:
        DatasetError: as for `read_image`.
    """
    with _opened(file) as image:
        return loaded(image, upright=upright)


def read_labels(file: str | Path) -> NDArray[np.uint8]:
    """Read an image whose pixels are class numbers.

    Args:
        file: as for `read_image`; colours become grey, as in Detectron2.

    Returns:
        (height, width).

    Raises:
        DatasetError: as for `read_image`, or a number is above 255.
    """
    with _opened(file) as image:
        image.load()
        picture = turned(image)
        if image.mode.startswith("I") and (largest := int(np.asarray(picture).max())) > 255:
            raise ValueError(f"it has class {largest}, but at most 255 can be read")
        labels: NDArray[np.uint8] = detection_utils.convert_PIL_to_numpy(picture, "L").squeeze(2)
        return labels


def as_array(picture: Image.Image, pixel_format: str) -> NDArray[Any]:
    """Return the pixels of a picture as `read_image` does; its EXIF orientation is ignored.

    Raises:
        ValueError: the picture has more than 8 bits a channel.
    """
    if picture.mode.startswith(("I", "F")):
        raise ValueError(unknown_range(picture))
    pixels: NDArray[Any] = detection_utils.convert_PIL_to_numpy(picture, pixel_format)
    # Detectron2 returns float64, which none of its models accept.
    return pixels.astype(np.float32) if pixels.dtype == np.float64 else pixels


def check_pixel_format(pixel_format: str, channels: int) -> None:
    """Refuse an INPUT.FORMAT that no image can be converted to, or that does not fit the network.

    Raises:
        ConfigError: it is not in CHANNELS, or has another number of channels.
    """
    if pixel_format not in CHANNELS:
        raise ConfigError(
            f"INPUT.FORMAT is {quoted(pixel_format)}; it must be one of {', '.join(CHANNELS)}. The "
            "weights of this package need BGR."
        )
    if CHANNELS[pixel_format] != channels:
        raise ConfigError(
            f"INPUT.FORMAT {pixel_format} has {CHANNELS[pixel_format]} channels, but "
            f"MODEL.PIXEL_MEAN has {channels} values. Give MODEL.PIXEL_MEAN and MODEL.PIXEL_STD "
            "one value per channel, or set INPUT.FORMAT BGR."
        )


@contextlib.contextmanager
def _opened(file: str | Path) -> Iterator[ImageFile.ImageFile]:
    with naming(file), opened(PathManager.get_local_path(str(file))) as image:
        yield image


def _decoded(image: ImageFile.ImageFile, pixel_format: str) -> NDArray[np.uint8] | None:
    """Decode an opened image with simplejpeg, or return None to leave it to Pillow.

    Both have libjpeg-turbo inside. Pillow's header has the checks of size and format, and only
    Pillow knows which damaged files are readable.
    """
    if (
        image.format != "JPEG"
        or image.mode not in ("L", "RGB")
        or pixel_format not in ("BGR", "RGB")
    ):
        return None
    try:
        if orientation(image) in _TURNED:
            return None
        stream = cast(BinaryIO, image.fp)
        stream.seek(0)
        content = stream.read(_MOST_JPEG_BYTES)
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        # It raises ValueError on all that libjpeg warns of, such as truncated data.
        found = simplejpeg.decode_jpeg(content, pixel_format, buffer=pixels)
    except Exception:  # Pillow tells what is wrong, or accepts it
        return None
    return pixels if found.shape == pixels.shape else None
