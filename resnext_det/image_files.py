"""Image files from outside, opened and decoded with Pillow alone.

- Only regular files of the formats in FORMATS are opened. Pillow knows others, and starts
  Ghostscript for one of them.
- A TIFF is rotated once; Detectron2 repeats the rotation that Pillow did while loading.
- Of 16 bits a channel, the upper 8 are kept, with a warning. Pillow does so in colour images;
  Detectron2 clips grey ones, so that everything above 255 is white.
- 32-bit integers and floats are refused, because their range is unknown.
- Every error names the file.

Imports neither torch nor Detectron2: the runtime of exported detectors reads images with it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from resnext_det.errors import ConfigError, DatasetError, quoted
from resnext_det.files import open_regular

logger = logging.getLogger(__name__)

# MPO, which phones write, is opened as JPEG. TGA has no magic number, so it comes last.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF", "TGA")
"""Pillow's names of the formats that are opened."""
# fmt: off
SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm",
    ".ppm", ".tga", ".tif", ".tiff", ".webp",
}
# fmt: on
"""The suffixes, in lower case, of the files in a folder that are read as images."""

_BITS_PER_SAMPLE = 258  # TIFF 6.0, section 8
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""
_METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # with an orientation

ImageSource = str | Path | Image.Image | NDArray[Any] | Any
"""What `picture_of` takes; Any is a tensor, as torch is not imported here."""


@contextlib.contextmanager
def opened(file: str | Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image without decoding its pixels.

    Raises:
        DatasetError: it cannot be read, is of another format, or has floats or 32-bit integers as
            pixels.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    with naming(file), open_regular(file) as stream:
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


def loaded(image: ImageFile.ImageFile, *, upright: bool = True) -> Image.Image:
    """Decode an opened image in Pillow's own mode, with 8 bits a channel.

    Args:
        image: as opened.
        upright: apply the EXIF orientation. It is always applied to a TIFF.
    """
    bits = bits_of(image)
    image.load()  # rotates a TIFF, and removes its orientation
    picture = turned(image) if upright else image
    if bits > 8:
        _warn_of_deep_images(bits)
    if bits > 8 and image.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64) >> (bits - 8)
        return Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return picture


def turned(image: Image.Image) -> Image.Image:
    """Return a decoded image upright, as Detectron2 turns it: Pillow fails on some EXIF data."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data make Pillow raise errors of any class
        return image
    if turn is None:
        return image
    upright = image.transpose(turn)
    for key in _METADATA:  # or the next reader would turn it again
        upright.info.pop(key, None)
    return upright


def picture_of(image: ImageSource, order: str | None = None) -> Image.Image:
    """Return an image of any kind in Pillow's form, upright, with 8 bits a channel.

    Args:
        image: a file, as for `opened`; Pillow's image; an array of uint8, (height, width, 3),
            or (height, width) for grey; or a tensor of uint8, (3 or 1, height, width).
        order: "RGB" or "BGR": the channels of an array or a tensor. Other images know theirs.

    Raises:
        ConfigError: `order` is missing or unknown.
        DatasetError: the image cannot be read, or is of no kind listed above.
    """
    if isinstance(image, str | Path):
        with opened(image) as file:
            return loaded(file)
    if isinstance(image, Image.Image):
        with naming(Path(getattr(image, "filename", "") or f"in memory, of mode {image.mode}")):
            if not (image.width and image.height):
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            if image.mode.startswith(("I", "F")):
                raise ValueError(unknown_range(image))
            image.load()
            return turned(image)
    planes: NDArray[Any] = np.empty(0)
    if hasattr(image, "detach"):
        kind, form = "a tensor", "(3, height, width)"
        if image.ndim == 3 and str(image.dtype) == "torch.uint8":  # NumPy has no bfloat16
            planes = image.detach().cpu().movedim(0, -1).numpy()
    elif isinstance(image, np.ndarray):
        kind, form = "an array", "(height, width, 3)"
        planes = image[..., None] if image.ndim == 2 else image
    else:
        raise DatasetError(
            f"{type(image).__name__} is not an image: give a file, Pillow's image, an array or a "
            "tensor."
        )
    if planes.dtype != np.uint8 or planes.shape[2:] not in ((1,), (3,)) or not planes.size:
        dtype = str(image.dtype).removeprefix("torch.")
        scale = " Scale floats to 0..255 and round them." if "float" in dtype else ""
        raise DatasetError(
            f"{kind} of {dtype} and shape {tuple(image.shape)} is not an image: give uint8, 0 to "
            f"255, of shape {form}.{scale}"
        )
    if planes.shape[2] == 1:
        return Image.fromarray(np.ascontiguousarray(planes[..., 0]))
    if order not in ("RGB", "BGR"):
        raise ConfigError(
            f'the channel order of arrays and tensors is {quoted(order)}: pass order="BGR" for '
            'images from OpenCV, order="RGB" for those from Pillow or torchvision.'
        )
    return Image.fromarray(np.ascontiguousarray(planes if order == "RGB" else planes[..., ::-1]))


def unknown_range(picture: Image.Image) -> str:
    """Return why pixels of mode I or F are refused."""
    return f"its mode is {picture.mode}, whose range is unknown: convert it to 8 bits a channel"


def bits_of(image: ImageFile.ImageFile) -> int:
    """Return the bits of a channel in the file; Pillow keeps 8 of them in colour images."""
    if image.format == "TIFF":
        return int(max(cast(Any, image).tag_v2.get(_BITS_PER_SAMPLE, (1,))))
    if image.mode.startswith("I"):
        return 16
    # Only Pillow's name for how the pixels are packed shows it.
    return 16 if image.format == "PNG" and ";16" in str(image.tile) else 8


def orientation(image: ImageFile.ImageFile) -> Any:
    """Return the EXIF orientation that applies to the decoded pixels; None if there is none."""
    # Pillow gives the size of a TIFF upright. It would decode a PNG to find EXIF behind the pixels.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return None
    return image.getexif().get(ExifTags.Base.Orientation)


@contextlib.contextmanager
def naming(file: str | Path) -> Iterator[None]:
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


@functools.cache
def _warn_of_deep_images(bits: int) -> None:
    logger.warning(
        "Images have %d bits a channel, of which only the upper 8 are used. If they do not use the "
        "whole range, scale them to 8 bits first; resnext-det check-data names them.",
        bits,
    )
