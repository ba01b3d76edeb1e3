"""Images with one class each: folders of classes, CIFAR's files, and crops of a detection data set.

The training's stream draws from them as from detection data (`stream.py`), so order and
augmentation are a function of seed and position.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as library
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from resnext_det.console import progress_bar
from resnext_det.data.crops import cut_crops
from resnext_det.data.records import Record
from resnext_det.errors import ConfigError, DatasetError, ResNeXtError, named, quoted
from resnext_det.files import open_regular
from resnext_det.images import read_header, read_picture
from resnext_det.weights.reading import read_pickle

logger = logging.getLogger(__name__)

transforms: Any = library  # untyped

LAYOUTS = ("folder", "cifar10", "cifar100", "coco")
_CIFAR: dict[str, Any] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
_MOST_BYTES = 2**28  # of a file of CIFAR; the largest has 155 MB
# Principal components of ImageNet's colours, RGB from 0 to 1 (fb.resnet.torch, datasets/imagenet).
_EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """The images of one split.

    Attributes:
        source: of the images, for messages.
        classes: names, in the order of the labels.
        labels: of each image, (N,).
        files: of each image; empty if `pixels` holds them.
        pixels: RGB, (N, H, W, 3); None if `files` holds them.
    """

    source: Path
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    files: tuple[str, ...] = ()
    pixels: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, number: int) -> str:
        """Return a file, or the number of an image in its source."""
        return self.files[number] if self.files else f"{self.source}, image {number}"

    def picture(self, number: int) -> Image.Image:
        """Return an image in RGB.

        Raises:
            DatasetError: it cannot be read.
        """
        if self.pixels is not None:
            return Image.fromarray(self.pixels[number])
        # torchvision ignores EXIF as well
        return read_picture(self.files[number], upright=False).convert("RGB")

    def records(self) -> list[Record]:
        """Return a record of each image for the stream; `Augmented` maps it."""
        return [
            {"index": number, "label": int(label), "file_name": self.name(number)}
            for number, label in enumerate(self.labels)
        ]


@functools.lru_cache(maxsize=4)
def read_split(root: Path, layout: str, split: str, synsets: str = "") -> LabelledImages:
    """Read the list of a split's images, or the images themselves if they are in few files.

    Args:
        root: the folder of the data.
        layout: "folder", for `root`/`split`/CLASS/IMAGE as torchvision's ImageFolder; "cifar10" or
            "cifar100", for the official files of the Python version, split "train" or "test";
            "coco", for crops of the objects of a detection data set, split "train2017".
        split: as above.
        synsets: with "folder", a file that lists the classes to take, one a line; "" for all.

    Raises:
        DatasetError: there are no such images, or a file is damaged or holds more than data.
        ConfigError: there is no such layout, or synsets in a layout without folders.
    """
    if layout not in LAYOUTS:
        raise ConfigError(
            f"CLASSIFICATION.LAYOUT is {quoted(layout)}; it must be one of {', '.join(LAYOUTS)}."
        )
    if synsets and layout != "folder":
        raise ConfigError(
            f"CLASSIFICATION.SYNSETS needs CLASSIFICATION.LAYOUT folder, which is {layout}."
        )
    if layout == "folder":
        return read_folder(root / split, _listed(Path(synsets)) if synsets else ())
    if layout == "coco":
        crops, labels, classes = cut_crops(root, split)
        return LabelledImages(root / split, classes, labels, pixels=crops)
    return _read_cifar(root, layout, split)


class _Folders(ImageFolder):
    """torchvision's ImageFolder, of some of the folders; 0, 1, 2, ... are ordered by number."""

    def __init__(self, folder: Path, only: Sequence[str]) -> None:
        self._only = set(only)
        super().__init__(str(folder))

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the class folders, in the order of the labels."""
        found: list[str] = super().find_classes(str(directory))[0]
        if self._only:
            missing = sorted(self._only.difference(found))
            if missing:
                raise FileNotFoundError(
                    f"{len(missing)} of {len(self._only)} listed classes have no folder: "
                    f"{named(missing)}"
                )
            found = [name for name in found if name in self._only]
        if all(name.isdecimal() for name in found):  # by name, 10 comes before 2
            found.sort(key=int)
        return found, {name: number for number, name in enumerate(found)}


def read_folder(folder: Path, only: Sequence[str] = ()) -> LabelledImages:
    """Return the images of a folder with one folder for each class.

    Args:
        folder: such as one with n01440764 to n15075141.
        only: take only these classes; all if empty.

    Raises:
        DatasetError: there is no such folder, or one of its folders has no image.
    """
    try:
        found = _Folders(folder, only)
    except OSError as error:
        raise DatasetError(
            f"{quoted(folder)} does not have one folder of images for each class: {quoted(error)}"
        ) from error
    files, labels = zip(*found.samples)
    return LabelledImages(folder, tuple(found.classes), np.array(labels, np.int64), files)


def _listed(file: Path) -> tuple[str, ...]:
    """Return the classes in a file, one a line."""
    try:
        with open_regular(file) as stream:
            lines = stream.read(_MOST_BYTES).decode("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DatasetError(f"the list of classes {quoted(file)} cannot be read: {error}") from error
    return tuple(dict.fromkeys(line.split()[0] for line in lines if line.strip()))


def _read_cifar(root: Path, layout: str, split: str) -> LabelledImages:
    """Read CIFAR's pickles, which torchvision would execute."""
    if split not in ("train", "test"):
        raise ConfigError(f"CIFAR has the splits train and test, and {quoted(split)} is neither.")
    kind = _CIFAR[layout]
    folder = root / kind.base_folder
    files = kind.train_list if split == "train" else kind.test_list
    if not folder.is_dir():
        raise DatasetError(
            f"{quoted(folder)} does not exist. Unpack {kind.filename} from {kind.url} in "
            f"{quoted(root)}, or add --download."
        )
    try:
        names = read_pickle(folder / kind.meta["filename"])[kind.meta["key"]]
        parts = [_part(folder / name, digest) for name, digest in files]
        pixels = np.concatenate([pixels for pixels, _ in parts])
        labels = np.concatenate([labels for _, labels in parts])
        classes = tuple(str(name) for name in names)
        if labels.min() < 0 or labels.max() >= len(classes):
            raise ValueError(f"labels outside the {len(classes)} classes")
    except (ResNeXtError, LookupError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{quoted(folder)} cannot be read as {layout}: {quoted(error, 400)}"
        ) from error
    return LabelledImages(folder, classes, labels, pixels=pixels)


def _part(file: Path, digest: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = read_pickle(file)
    labels = content["labels"] if "labels" in content else content["fine_labels"]
    pixels = content["data"].numpy().reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
    if pixels.dtype != np.uint8:
        raise ValueError(f"{file.name} holds {pixels.dtype} instead of bytes")
    if hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() != digest:
        logger.warning("%s is not CIFAR's official file", quoted(file))
    return np.ascontiguousarray(pixels), np.array(labels, np.int64)


def download_cifar(root: Path, layout: str) -> None:
    """Download CIFAR's official files by torchvision, which verifies them, unless they are there.

    Raises:
        DatasetError: it fails.
    """
    try:
        _CIFAR[layout](str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise DatasetError(f"{layout} cannot be downloaded: {quoted(error, 400)}") from error


def check_readable(images: LabelledImages) -> None:
    """Read the header of every image.

    Raises:
        DatasetError: names the first images that cannot be read.
    """

    def problem(file: str) -> str | None:
        try:
            read_header(file)
        except DatasetError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        found = list(
            progress_bar(
                pool.map(problem, images.files),
                total=len(images.files),
                desc=f"checking {images.source.name}",
                unit="image",
            )
        )
    problems = [each for each in found if each is not None]
    if problems:
        more = f" and {len(problems) - 5:,} more" if len(problems) > 5 else ""
        raise DatasetError(
            f"{len(problems):,} of {len(found):,} images of {quoted(images.source)} cannot be "
            f"used: {' '.join(problems[:5])}{more} Remove or replace them, or set "
            "DATALOADER.BAD_IMAGES skip."
        )


def check_same_labels(
    learned: Sequence[str], tested: Sequence[str], of_learned: str, of_tested: str, *, subset: bool
) -> None:
    """Refuse classes to test that differ from those that were learned.

    Args:
        learned: names.
        tested: names.
        of_learned: the owner of the names, for messages.
        of_tested: likewise.
        subset: whether some may be missing, as from ImageNet-1K's images for ImageNet-5K's models.

    Raises:
        DatasetError: names the classes that only one of them has.
    """
    missing = [name for name in learned if name not in tested]
    unknown = [name for name in tested if name not in learned]
    if unknown or (missing and not subset):
        parts = [
            f"{len(names)} only in {owner}: {named(map(quoted, names))}"
            for names, owner in ((missing, of_learned), (unknown, of_tested))
            if names
        ]
        raise DatasetError(
            f"the classes of {of_learned} and {of_tested} differ: {'; '.join(parts)}. Give both "
            "the same class folders."
        )


def relabelled(val: LabelledImages, classes: Sequence[str]) -> LabelledImages:
    """Return images with the labels of other images' classes, of which theirs are a part."""
    numbers = np.array([classes.index(name) for name in val.classes], np.int64)
    return LabelledImages(val.source, tuple(classes), numbers[val.labels], val.files, val.pixels)


@dataclass(frozen=True)
class Preprocessing:
    """How an image is cut for an evaluation; the defaults are the paper's (section 4).

    Attributes:
        resize: of the shorter side, in pixels.
        crop: side of the crop.
        interpolation: "bilinear" or "bicubic".
        ten_crop: the four corners and the centre, each also flipped, instead of the centre alone.
    """

    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"
    ten_crop: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize <= 4096:
            raise ConfigError(
                f"--resize is {self.resize} and --crop is {self.crop}; both must be from 1 to "
                "4096, and the crop no larger than the shorter side."
            )

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Return the function from a picture to crops in RGB, uint8: (1 or 10, 3, crop, crop)."""
        mode = transforms.InterpolationMode(self.interpolation)
        resize = transforms.Resize(self.resize, mode)
        crops = transforms.TenCrop(self.crop) if self.ten_crop else transforms.CenterCrop(self.crop)
        to_tensor = transforms.PILToTensor()

        def cut(picture: Image.Image) -> Tensor:
            found = crops(resize(picture))
            return torch.stack([to_tensor(each) for each in (found if self.ten_crop else [found])])

        return cut


class Views(Dataset[tuple[Tensor, int]]):
    """Images cut for an evaluation: crops, (1 or 10, 3, H, W) in uint8 and RGB, and the class."""

    def __init__(
        self, images: LabelledImages, preprocessing: Preprocessing, chosen: Sequence[int]
    ) -> None:
        """Take the images with these numbers."""
        self.images = images
        self.chosen = chosen
        self._cut = preprocessing.transform()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        index = self.chosen[number]
        return self._cut(self.images.picture(index)), int(self.images.labels[index])


class Augmented:
    """Maps a record of `LabelledImages.records` to a training sample.

    The sample has "image", (3, crop, crop) in RGB from 0 to 255, "label" and "file_name".
    """

    def __init__(
        self,
        images: LabelledImages,
        *,
        augmentation: str = "inception",
        crop: int = 224,
        interpolation: str = "bicubic",
        flip: str = "horizontal",
        colour_jitter: float = 0.0,
        lighting: float = 0.0,
        padding: Sequence[float] = (0, 0, 0),
    ) -> None:
        """Choose the augmentation.

        Args:
            images: of the records.
            augmentation: "inception" cuts out a random part of 8 to 100 % of the area and an aspect
                ratio from 3/4 to 4/3; "padded" pads an eighth of the side and cuts out a square
                (32 pixels of 40 in CIFAR); "none" takes the whole image.
            crop: side of the result.
            interpolation: of "inception".
            flip: "horizontal", "vertical" or "none".
            colour_jitter: largest relative change of brightness, contrast and saturation.
            lighting: standard deviation of the noise along the principal components of colour.
            padding: the colour of "padded", RGB.
        """
        flips = {"horizontal": "RandomHorizontalFlip", "vertical": "RandomVerticalFlip"}
        mode = transforms.InterpolationMode(interpolation)
        steps = {
            "inception": [transforms.RandomResizedCrop(crop, interpolation=mode)],
            "padded": [
                transforms.Resize((crop, crop), mode),
                transforms.RandomCrop(crop, crop // 8, fill=tuple(map(round, padding))),
            ],
            "none": [transforms.Resize((crop, crop), mode)],
        }[augmentation]
        if flip in flips:
            steps.append(getattr(transforms, flips[flip])())
        if colour_jitter:
            steps.append(transforms.ColorJitter(*[colour_jitter] * 3))
        steps.append(transforms.PILToTensor())
        self._images = images
        self._transform = transforms.Compose(steps)
        self._lighting = lighting

    def __call__(self, record: Record) -> Record:
        """Read and augment an image.

        Raises:
            DatasetError: it cannot be read.
        """
        image: Tensor = self._transform(self._images.picture(record["index"]))
        if self._lighting:
            # AlexNet's, as in fb.resnet.torch.
            alpha = torch.randn(3) * self._lighting
            image = image + 255 * (_EIGENVECTORS @ (alpha * _EIGENVALUES)).view(3, 1, 1)
        return {"image": image, "label": record["label"], "file_name": record["file_name"]}
