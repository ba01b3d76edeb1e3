"""The image reader of data sets, predictions, drawings and thumbnails.

It returns the same bytes as Detectron2's for images of 8 bits a channel, but is safe with files
from outside and keeps more of the pixels:

- Only regular files of the formats in FORMATS are opened. Pillow knows others, and starts
  Ghostscript for one of them.
- A TIFF is rotated once; Detectron2 repeats the rotation that Pillow did while loading.
- Of 16 bits a channel, the upper 8 are kept, with a warning. Pillow does so in colour images;
  Detectron2 clips grey ones, so that everything above 255 is white.
- 32-bit integers and floats are refused, because their range is unknown.
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
import simplejpeg
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
_TURNED = (2, 3, 4, *_TRANSPOSING)
_MOST_JPEG_BYTES = 2**26  # to read into memory; of 8 bits a pixel, 64 megapixels


@dataclass(frozen=True)
class Header:
    """Size of an upright image in pixels, and bits per channel in its file."""

    width: int
    height: int
    bits: int


def read_header(file: str | Path) -> Header:
    """Read the header of an image, without decoding its pixels.

    Raises:
        DatasetError: the header shows that `read_image` would refuse the file.
    """
    with _opened(file) as image:
        width, height = image.size
        if _orientation(image) in _TRANSPOSING:
            width, height = height, width
        return Header(width, height, _bits(image))


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
    with _naming(file), _opened(file) as image:
        pixels = _decoded(image, pixel_format) if fast else None
        return as_array(_loaded(image), pixel_format) if pixels is None else pixels


def read_picture(file: str | Path, *, upright: bool = True) -> Image.Image:
    """Read an image in Pillow's own mode, with 8 bits a channel.

    Args:
        file: as for `read_image`.
        upright: apply the EXIF orientation. It is always applied to a TIFF.

    Raises:
        DatasetError: as for `read_image`.
    """
    with _opened(file) as image:
        return _loaded(image, upright=upright)


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
        picture = detection_utils._apply_exif_orientation(image)
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
        raise ValueError(
            f"the picture has mode {picture.mode}, whose range is unknown: convert it to 8 bits a "
            "channel."
        )
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
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    with _naming(file), open_regular(PathManager.get_local_path(str(file))) as stream:
        try:
            image = Image.open(stream, formats=formats)
        except UnidentifiedImageError:
            raise ValueError(
                f"it is damaged, or in none of the formats {', '.join(formats)}"
            ) from None
        # Pillow reads some formats with 16 bits of grey as mode I, which also is 32-bit integers.
        integers = image.mode == "I" and image.format not in ("PNG", "PPM")
        if image.mode == "F" or integers:
            what = "signed or 32-bit integers" if integers else "floats"
            raise ValueError(
                f"its pixels are {what}, whose range is unknown. Convert it to 8 bits, or to 16 "
                "bits that use the whole range"
            )
        with image:
            yield image


def _loaded(image: ImageFile.ImageFile, *, upright: bool = True) -> Image.Image:
    """Decode an opened image with Pillow; see `read_picture`."""
    bits = _bits(image)
    image.load()  # rotates a TIFF, and removes its orientation
    # Detectron2's own function, because Pillow's fails on some EXIF data.
    picture = detection_utils._apply_exif_orientation(image) if upright else image
    if bits > 8:
        _warn_of_deep_images(bits)
    if bits > 8 and image.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64) >> (bits - 8)
        return Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return cast(Image.Image, picture)


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
        if _orientation(image) in _TURNED:
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


@contextlib.contextmanager
def _naming(file: str | Path) -> Iterator[None]:
    """Turn every error of the body into a DatasetError that names the file."""
    try:
        yield
    except (MemoryError, DatasetError):
        raise
    except Exception as error:  # damaged files make Pillow raise errors of any class
        reason = error.strerror if isinstance(error, OSError) else None
        reason = reason or quoted(error) or type(error).__name__
        name = quoted(Path(file))
        raise DatasetError(f"the image {name} cannot be read: {reason.rstrip('.')}.") from error


def _bits(image: ImageFile.ImageFile) -> int:
    """Return the bits of a channel in the file; Pillow keeps 8 of them in colour images."""
    if image.format == "TIFF":
        return int(max(cast(Any, image).tag_v2.get(_BITS_PER_SAMPLE, (1,))))
    if image.mode.startswith("I"):
        return 16
    # Only Pillow's name for how the pixels are packed shows it.
    return 16 if image.format == "PNG" and ";16" in str(image.tile) else 8


def _orientation(image: ImageFile.ImageFile) -> Any:
    # Pillow gives the size of a TIFF upright. It would decode a PNG to find EXIF behind the pixels.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return None
    return image.getexif().get(ExifTags.Base.Orientation)


@functools.cache
def _warn_of_deep_images(bits: int) -> None:
    logger.warning(
        "Images have %d bits a channel, of which only the upper 8 are used. If they do not use the "
        "whole range, scale them to 8 bits first; resnext-det check-data names them.",
        bits,
    )
