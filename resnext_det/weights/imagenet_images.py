"""The images of a folder like ImageNet's validation set, cut as a network is to see them."""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes
from torchvision.transforms import InterpolationMode, functional

from resnext_det.errors import ConfigError, DatasetError, quoted
from resnext_det.images import read_picture
from resnext_det.weights.catalog import Accuracy

logger = logging.getLogger(__name__)

INTERPOLATIONS = ("bilinear", "bicubic")
_DEFAULTS = {"resize": 256, "crop": 224, "interpolation": "bilinear"}
# An image with one side this many times as long as the other is none, and fills the memory when
# its shorter side is resized.
_LONGEST = 100
_WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of an image before the network sees it.

    Attributes:
        resize: the shorter side that it is resized to, in pixels.
        crop: side of the central crop, in pixels.
        interpolation: of the resizing, "bilinear" or "bicubic".
        assumed: which of these are not from a source or the user, but the defaults: 256 and 224 are
            the paper's (section 4), which does not name an interpolation.

    Raises:
        ConfigError: a value outside its range.
    """

    resize: int
    crop: int
    interpolation: str
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize <= 4096:
            raise ConfigError(
                f"images are resized to {self.resize} and cropped to {self.crop}; both must be 1 "
                "to 4096, and the crop no larger than the shorter side it is cut from."
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"there is no interpolation {self.interpolation!r}; there are "
                f"{', '.join(INTERPOLATIONS)}."
            )

    def __str__(self) -> str:
        text = f"shorter side {self.resize}, crop {self.crop}, {self.interpolation}"
        if not self.assumed:
            return text
        paper = "; 256 and 224 are the paper's" if {"resize", "crop"} & {*self.assumed} else ""
        return f"{text} (by default: {', '.join(self.assumed)}{paper})"

    @classmethod
    def of(
        cls,
        published: Accuracy | None,
        resize: int | None = None,
        crop: int | None = None,
        interpolation: str | None = None,
    ) -> Preprocessing:
        """Return what was asked for, else what goes with a published figure, else the default.

        Args:
            published: the figure, if there is one; it may not tell everything.
            resize: as the attribute.
            crop: as the attribute.
            interpolation: as the attribute.

        Raises:
            ConfigError: a value outside its range.
        """
        asked = {"resize": resize, "crop": crop, "interpolation": interpolation}
        chosen: dict[str, Any] = {
            name: getattr(published, name, None) if value is None else value
            for name, value in asked.items()
        }
        assumed = tuple(name for name, value in chosen.items() if value is None)
        chosen |= {name: _DEFAULTS[name] for name in assumed}
        return cls(**chosen, assumed=assumed)

    def cut(self, picture: Image.Image) -> Tensor:
        """Return the pixels that are looked at, (3, crop, crop) in uint8, RGB."""
        interpolation = InterpolationMode(self.interpolation)
        image = cast(Any, picture)  # torchvision's functions take one, and say a tensor
        resized = functional.resize(image, [self.resize], interpolation)
        cropped: Tensor = functional.pil_to_tensor(functional.center_crop(resized, [self.crop]))
        return cropped


def open_image(file: str | Path) -> Image.Image:
    """Read an image as RGB, as torchvision does: its EXIF orientation is ignored.

    Raises:
        DatasetError: it cannot be read, or is so long a strip that resizing it fills the memory.
    """
    picture = read_picture(file, upright=False)
    width, height = picture.size
    if max(width, height) > _LONGEST * min(width, height):
        raise DatasetError(
            f"the image {quoted(Path(file))} is {width} x {height} pixels, and one side may be at "
            f"most {_LONGEST} times the other. Take it out of the folder."
        )
    return picture.convert("RGB")


def validation_images(
    folder: Path, classes: int, preprocessing: Preprocessing, limit: int | None = None
) -> Dataset[tuple[Tensor, int]]:
    """Return the images of a folder that has one folder for each class.

    Args:
        folder: such as the one with n01440764 to n15075141.
        classes: of the classifier.
        preprocessing: of each image.
        limit: as many images at most, spread evenly over all of them, class by class.

    Returns:
        (3, crop, crop) in uint8, RGB, and the number of the class, for each image.

    Raises:
        DatasetError: no such folder, a class without images, or folders that are not the classes.
        ConfigError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"there must be 1 image or more, and the limit is {limit}.")
    try:
        names, _ = find_classes(folder)
        numbers = class_numbers(names, classes)
        images = ImageFolder(str(folder), preprocessing.cut, numbers.__getitem__, loader=open_image)
    except OSError as error:
        raise DatasetError(
            f"{folder} is not a folder with images in one folder for each class, as ImageNet's "
            f"validation set is evaluated: {error}"
        ) from error
    _report_left_out(folder, [Path(file) for file, _ in images.samples])
    if limit is None or limit >= len(images):
        return images
    return Subset(images, [number * len(images) // limit for number in range(limit)])


def _report_left_out(folder: Path, images: Sequence[Path]) -> None:
    found = {
        Path(place, file)
        for place, _, files in os.walk(folder, followlinks=True)
        for file in files
        if not file.startswith(".")
    }
    others = sorted(found - set(images))
    if others:
        logger.warning(
            "%d files in %s are left out, as they are not called as images are or are in no "
            "class's folder; the first is %s",
            len(others),
            folder,
            others[0],
        )


def class_numbers(folders: Sequence[str], classes: int) -> list[int]:
    """Return which output of a classifier stands for each folder.

    By default it is their order by name, which must be complete. Folders that are called 0, 1, 2
    are the outputs of these numbers; some of ImageNet-1K's WordNet ids are looked up in timm's list
    where timm is installed.

    Args:
        folders: their names, sorted.
        classes: how many outputs there are.

    Raises:
        DatasetError: the folders are not the classes.
    """
    if all(name.isdecimal() for name in folders):
        # By name, 10 comes before 2.
        numbers = [int(name) for name in folders]
        if sorted(numbers) == list(range(classes)):
            return numbers
        raise DatasetError(
            f"{len(folders)} folders are called by numbers, from {min(numbers)} to {max(numbers)}; "
            f"the classifier has {classes} outputs, and numbers must be all of 0 to {classes - 1}."
        )
    synsets = None
    if classes == 1000 and all(_WORDNET.fullmatch(name) for name in folders):
        synsets = _synsets()
    if synsets is not None:
        unknown = [name for name in folders if name not in synsets]
        if unknown:
            raise DatasetError(
                f"{len(unknown)} of {len(folders)} folders are no classes of ImageNet-1K, the "
                f"first being {unknown[0]}: the classifier has no output for them."
            )
        return [synsets.index(name) for name in folders]
    if len(folders) == classes:
        return list(range(classes))
    raise DatasetError(
        f"there are {len(folders)} folders ({', '.join(folders[:3])}, ...) and the classifier has "
        f"{classes} outputs, so which output stands for which folder is not known: there must be "
        "one folder for each, in the order of their names. Some classes of ImageNet-1K alone can "
        "be evaluated where timm is installed, which has the list of its 1000 WordNet ids."
    )


def _synsets() -> list[str] | None:
    """Return the WordNet ids of ImageNet-1K in the order of its classes; None without timm."""
    try:
        data: Any = importlib.import_module("timm.data")
    except ImportError:
        return None
    names: list[str] = data.ImageNetInfo("imagenet-1k").label_names()
    return names
