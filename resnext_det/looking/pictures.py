"""Pictures as Detectron2 reads them, upright, and pictures that are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from resnext_det.errors import DatasetError
from resnext_det.files import written_beside

LONGEST_SIDE = 65_500
"""Pixels; libjpeg writes nothing larger (its JPEG_MAX_DIMENSION)."""
MOST_PIXELS = 178_956_970
"""Twice Pillow's MAX_IMAGE_PIXELS, from where on Pillow itself refuses a picture."""
LONGEST_PER_SHORTEST = 100
"""A longer strip is scaled to nothing for the network, and to gigabytes for its labels."""

_QUALITY = 92
_MAKER = "Software"  # a keyword of the PNG specification


def read_picture(file: Path) -> Image.Image:
    """Read a picture as an evaluation does: upright, as its EXIF orientation says.

    Of 16 bits of grey, the upper 8 are taken, as Pillow takes them of 16 bits of a colour; an
    evaluation clips them, which leaves next to nothing but white.

    Args:
        file: of any format that Pillow reads; of an animation, the first frame.

    Returns:
        An RGB picture.

    Raises:
        DatasetError: it cannot be read, or is of a size that no detector takes.
    """
    try:
        with Image.open(file) as header:
            check_size(*header.size)
            if _has_16_bits(header):
                return _in_8_bits(header)
        return Image.fromarray(read_image(str(file), "RGB"))
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow raise whatever came first
        raise DatasetError(f"{file} cannot be read as a picture: {error}") from error


def _has_16_bits(picture: Image.Image) -> bool:
    """Whether it is grey of 16 bits; Pillow takes some of those files for 32 bits."""
    return picture.mode.startswith("I;16") or (
        picture.mode == "I" and picture.format in ("PNG", "PPM")
    )


def _in_8_bits(picture: Image.Image) -> Image.Image:
    upper = np.asarray(ImageOps.exif_transpose(picture)).astype(np.int64) >> 8
    return Image.fromarray(upper.clip(0, 255).astype(np.uint8)).convert("RGB")


def check_size(width: int, height: int) -> None:
    """Refuse a picture that would take gigabytes, or that no network sees anything of.

    Args:
        width: in pixels.
        height: in pixels.

    Raises:
        DatasetError: it is too large, or too long a strip.
    """
    if max(width, height) > LONGEST_SIDE or width * height > MOST_PIXELS:
        raise DatasetError(
            f"it is {width} x {height} pixels, and at most {LONGEST_SIDE} a side and "
            f"{MOST_PIXELS} altogether are taken"
        )
    if max(width, height) > LONGEST_PER_SHORTEST * min(width, height):
        raise DatasetError(
            f"it is {width} x {height} pixels: one side may be at most {LONGEST_PER_SHORTEST} "
            "times the other"
        )


def save_jpeg(picture: Image.Image, target: Path) -> None:
    """Write a JPEG beside and rename it.

    Args:
        picture: an RGB picture.
        target: the file.

    Raises:
        ResNeXtError: it cannot be written.
    """
    with written_beside(target) as beside:
        picture.save(beside, format="JPEG", quality=_QUALITY)


def save_png(picture: Image.Image, target: Path, maker: str = "") -> None:
    """Write a PNG beside and rename it.

    Args:
        picture: of any mode that PNG has.
        target: the file.
        maker: to stand in the file, see `made_by`; "" for none.

    Raises:
        ResNeXtError: it cannot be written.
    """
    info = PngInfo()
    if maker:
        info.add_text(_MAKER, maker)
    with written_beside(target) as beside:
        picture.save(beside, format="PNG", pnginfo=info)


def made_by(file: Path, maker: str) -> bool:
    """Tell whether `save_png` wrote a file for somebody; False for what cannot be read."""
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            return picture.info.get(_MAKER) == maker
    except MemoryError:
        raise
    except Exception:  # damaged files make Pillow raise whatever came first
        return False
