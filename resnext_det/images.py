"""Opening images: one way for data sets, predictions, drawings and thumbnails.

What Detectron2 reads from an image of 8 bits a channel comes out the same here, byte for byte. The
differences keep a stranger's file harmless and a user's pixels whole:

- Only regular files of the formats in FORMATS are opened. Pillow knows others, and starts
  Ghostscript for one of them.
- A TIFF is turned once. Pillow turns it as it loads it, and Detectron2 turns it again.
- Of 16 bits a channel, the upper 8 are kept, in grey as Pillow does in colour: 0 to 65,535 becomes
  0 to 255. Detectron2 clips grey, so everything above 255 becomes white. A warning says so once.
- 32-bit integers and floats are refused, because only their owner knows their range.
- Every error names the file.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from resnext_det.errors import ConfigError, DatasetError, quoted
from resnext_det.files import open_regular

logger = logging.getLogger(__name__)

# MPO, which phones write, is opened as JPEG. TGA has no magic number, so it comes last.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF", "TGA")
"""Pillow's names of the formats that are opened."""
CHANNELS = {
    **{"BGR": 3, "RGB": 3, "YUV-BT.601": 3, "HSV": 3, "LAB": 3, "YCbCr": 3},
    **{"L": 1, "LA": 2, "RGBA": 4, "CMYK": 4},
}
"""The pixel formats that INPUT.FORMAT may name, and their channels."""

_BITS_PER_SAMPLE = 258  # TIFF 6.0, section 8
_TRANSPOSING = (5, 6, 7, 8)  # EXIF orientations


@dataclass(frozen=True)
class Header:
    """What is known of an image without decoding it.

    Attributes:
        width: in pixels, as the EXIF orientation turns it.
        height: likewise.
        bits: of a channel in the file.
        grey: whether there is one channel.
    """

    width: int
    height: int
    bits: int
    grey: bool


def read_header(file: str | Path) -> Header:
    """Read the header of an image.

    Args:
        file: as for `read_image`.

    Raises:
        DatasetError: `read_image` would refuse the file too, as far as the header tells.
    """
    with _opened(file) as image:
        width, height = image.size
        if _orientation(image) in _TRANSPOSING:
            width, height = height, width
        return Header(width, height, _bits(image), len(image.getbands()) == 1)


def read_image(file: str | Path, pixel_format: str = "RGB") -> NDArray[Any]:
    """Read an image upright, as its EXIF orientation says.

    Args:
        file: a path, or an address that a handler of Detectron2's PathManager serves. Of an
            animation, the first frame is read.
        pixel_format: one of CHANNELS.

    Returns:
        (height, width, channels) in uint8, 0 to 255; for YUV-BT.601 in float32, Y from 0 to 1.

    Raises:
        DatasetError: the file cannot be read, is of another format, or has floats or 32-bit
            integers as pixels. The message names it.
    """
    with _named(file):
        return as_array(read_picture(file), pixel_format)


def read_picture(file: str | Path, *, upright: bool = True) -> Image.Image:
    """Read an image as Pillow has it, in its own mode of 8 bits a channel.

    Args:
        file: as for `read_image`.
        upright: turn the image as its EXIF orientation says. A TIFF is always turned.

    Raises:
        DatasetError: as for `read_image`.
    """
    with _opened(file) as image:
        bits = _bits(image)
        image.load()  # turns a TIFF, which after that has no orientation
        # Detectron2's own function, since Pillow's fails on some EXIF data.
        turned = detection_utils._apply_exif_orientation(image) if upright else image
        if bits > 8:
            _warn_of_deep_images(bits)
        if bits > 8 and image.mode.startswith("I"):
            values = np.asarray(turned).astype(np.int64) >> (bits - 8)
            return Image.fromarray(values.clip(0, 255).astype(np.uint8))
        return cast(Image.Image, turned)


def read_labels(file: str | Path) -> NDArray[np.uint8]:
    """Read an image whose pixels are the numbers of classes.

    Args:
        file: as for `read_image`; colours become grey, as in Detectron2.

    Returns:
        (height, width).

    Raises:
        DatasetError: as for `read_image`, or a number is above 255.
    """
    with _opened(file) as image:
        image.load()  # as above
        turned = detection_utils._apply_exif_orientation(image)
        if image.mode.startswith("I") and (largest := int(np.asarray(turned).max())) > 255:
            raise ValueError(f"it has a class {largest}, and at most 255 can be read")
        labels: NDArray[np.uint8] = detection_utils.convert_PIL_to_numpy(turned, "L").squeeze(2)
        return labels


def largest_value(file: str | Path) -> int:
    """Return the largest value of a grey image, in the bits of the file.

    Raises:
        DatasetError: as for `read_image`.
    """
    with _opened(file) as image:
        return int(np.asarray(image).max())


def as_array(picture: Image.Image, pixel_format: str) -> NDArray[Any]:
    """Return the pixels of a picture in some format, as Detectron2 converts them.

    Args:
        picture: of 8 bits a channel, taken as its pixels lie.
        pixel_format: one of CHANNELS.

    Returns:
        As `read_image`.

    Raises:
        ValueError: the picture has more bits a channel.
    """
    if picture.mode.startswith(("I", "F")):
        raise ValueError(
            f"the picture is of mode {picture.mode}, and its range is not known: give one of 8 "
            "bits a channel."
        )
    pixels: NDArray[Any] = detection_utils.convert_PIL_to_numpy(picture, pixel_format)
    # Detectron2 gives 64 bits, which none of its models take.
    return pixels.astype(np.float32) if pixels.dtype == np.float64 else pixels


def check_pixel_format(pixel_format: str, channels: int) -> None:
    """Refuse an INPUT.FORMAT that no image can be converted to, or that the network does not take.

    Args:
        pixel_format: INPUT.FORMAT.
        channels: how many the network takes, which is the length of MODEL.PIXEL_MEAN.

    Raises:
        ConfigError: it is not in CHANNELS, or has another number of channels.
    """
    if pixel_format not in CHANNELS:
        raise ConfigError(
            f"INPUT.FORMAT is {quoted(pixel_format)}; it must be one of {', '.join(CHANNELS)}. "
            "BGR is what the weights of this package take."
        )
    if CHANNELS[pixel_format] != channels:
        raise ConfigError(
            f"INPUT.FORMAT {pixel_format} has {CHANNELS[pixel_format]} channels, and "
            f"MODEL.PIXEL_MEAN has {channels} values. Give MODEL.PIXEL_MEAN and MODEL.PIXEL_STD "
            "one value a channel, or set INPUT.FORMAT BGR."
        )


@contextlib.contextmanager
def _opened(file: str | Path) -> Iterator[ImageFile.ImageFile]:
    with (
        _named(file),
        open_regular(PathManager.get_local_path(str(file))) as stream,
        _identified(stream) as image,
    ):
        _check_mode(image)
        yield image


@contextlib.contextmanager
def _named(file: str | Path) -> Iterator[None]:
    """Turn every error of the body into a DatasetError that names the file."""
    try:
        yield
    except (MemoryError, DatasetError):
        raise
    except Exception as error:  # damaged files make Pillow raise errors of any class
        why = error.strerror if isinstance(error, OSError) else None
        why = why or quoted(error) or type(error).__name__
        name = quoted(Path(file))
        raise DatasetError(f"the image {name} cannot be read: {why.rstrip('.')}.") from error


def _identified(stream: BinaryIO) -> ImageFile.ImageFile:
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(stream, formats=known)
    except UnidentifiedImageError:
        raise ValueError(f"it is damaged, or in none of the formats {', '.join(known)}") from None


def _check_mode(image: ImageFile.ImageFile) -> None:
    # Pillow takes some files with 16 bits of grey for 32.
    unknown = image.mode == "I" and image.format not in ("PNG", "PPM")
    if image.mode == "F" or unknown:
        what = "signed or 32-bit integers" if unknown else "floats"
        raise ValueError(
            f"its pixels are {what}, whose range is not known. Convert it to 8 bits, or to 16 bits "
            "that use the whole range"
        )


def _bits(image: ImageFile.ImageFile) -> int:
    """Return how many bits a channel has in the file; Pillow keeps 8 of them in colour images."""
    if image.format == "TIFF":
        return int(max(cast(Any, image).tag_v2.get(_BITS_PER_SAMPLE, (1,))))
    if image.mode.startswith("I"):
        return 16
    # Nothing but Pillow's name for how the pixels are packed tells.
    return 16 if image.format == "PNG" and ";16" in str(image.tile) else 8


def _orientation(image: ImageFile.ImageFile) -> Any:
    # Pillow gives a TIFF's size turned already. A PNG may have its EXIF behind the pixels, and
    # Pillow would decode them to find it.
    if image.format == "TIFF":
        return None
    if image.format == "PNG" and "exif" not in image.info:
        return None
    return image.getexif().get(ExifTags.Base.Orientation)


@functools.cache
def _warn_of_deep_images(bits: int) -> None:
    logger.warning(
        "Images have %d bits a channel: only the upper 8 are used. tools/check_data.py names them. "
        "If they do not use the whole range, scale them to 8 bits first.",
        bits,
    )
