"""Pictures that are drawn on, and pictures that are written."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from resnext_det.errors import DatasetError, quoted
from resnext_det.files import open_regular, written_beside
from resnext_det.images import read_header, read_picture

LONGEST_SIDE = 65_500
"""Pixels; libjpeg writes nothing larger (its JPEG_MAX_DIMENSION)."""
MOST_PIXELS = 178_956_970
"""Twice Pillow's MAX_IMAGE_PIXELS, from where on Pillow itself refuses a picture."""

_QUALITY = 92
_MAKER = "Software"  # a keyword of the PNG specification


def read_drawable(file: Path) -> Image.Image:
    """Read a picture as training and evaluation do, unless it is too large to be written again.

    Args:
        file: as for `resnext_det.images.read_image`.

    Raises:
        DatasetError: it cannot be read, or is too large.
    """
    header = read_header(file)
    try:
        check_size(header.width, header.height)
    except DatasetError as error:
        raise DatasetError(f"the image {quoted(file)} cannot be drawn on: {error}") from error
    return read_picture(file)


def check_size(width: int, height: int) -> None:
    """Refuse a picture that would take gigabytes, or that no JPEG can hold.

    Args:
        width: in pixels.
        height: in pixels.

    Raises:
        DatasetError: it is too large.
    """
    if max(width, height) > LONGEST_SIDE or width * height > MOST_PIXELS:
        raise DatasetError(
            f"it is {width} x {height} pixels, and at most {LONGEST_SIDE} a side and "
            f"{MOST_PIXELS} altogether are allowed. Scale it down, or cut it into tiles."
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
        maker: recorded in the file, see `made_by`; "" for none.

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
        with open_regular(file) as stream, Image.open(stream, formats=("PNG",)) as picture:
            return picture.info.get(_MAKER) == maker
    except MemoryError:
        raise
    except Exception:  # damaged files make Pillow raise whatever came first
        return False
