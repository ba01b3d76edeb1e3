"""Measure top-1 and top-5 of a checkpoint with its classifier, on ImageNet's validation images.

Compared with the published figures, this finds a wrong file before a long training starts from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from resnext_det.environment import versions
from resnext_det.errors import ConfigError, DatasetError, WeightsError
from resnext_det.images import read_picture
from resnext_det.weights.catalog import SCHEME, Entry, entry, of_file
from resnext_det.weights.converting import BackboneWeights, backbone_of
from resnext_det.weights.fetching import cache_folder, published_file
from resnext_det.weights.layouts import recognise
from resnext_det.weights.reading import read_checkpoint
from resnext_det.weights.verifying import network_of

# Detectron2's names, those that its converter of torchvision's files writes, and mmpretrain's.
_CLASSIFIERS = ("linear.", "stem.fc.", "head.fc.")


@dataclass(frozen=True)
class Preprocessing:
    """Resizing of the shorter side and a central crop; the defaults are the paper's (section 4)."""

    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize <= 4096:
            raise ConfigError(
                f"--resize is {self.resize} and --crop is {self.crop}; both must be from 1 to "
                "4096, and the crop no larger than the shorter side."
            )


def locate(weights: str) -> tuple[Path, Entry | None]:
    """Return a published file and its catalog entry; download it if necessary.

    Raises:
        ConfigError: there is neither such a file nor such a name.
        WeightsError: it cannot be read or downloaded.
    """
    if not weights.startswith(SCHEME) and (Path(weights).is_file() or "/" in weights):
        return Path(weights), of_file(Path(weights))
    known = entry(weights)
    return published_file(known, cache_folder()), known


def load_classifier(source: Path, known: Entry | None = None) -> tuple[BackboneWeights, Any, int]:
    """Read a checkpoint with its classifier, in any known layout.

    Returns:
        The weights of its backbone; the network, whose output is {"linear": (N, classes)}; classes.

    Raises:
        WeightsError: it cannot be read, has no classifier, or does not say which pixels it expects.
    """
    checkpoint = read_checkpoint(source)
    weights = backbone_of(source, checkpoint, known.pixels if known else None)
    if weights.pixels is None:
        raise WeightsError(
            f"{source} ({weights.layout} layout) does not say which pixels it expects: evaluate "
            "the file it was converted from."
        )
    tensors = {**checkpoint.tensors, **recognise(checkpoint.tensors).tensors}
    for prefix in _CLASSIFIERS:
        weight, bias = tensors.get(f"{prefix}weight"), tensors.get(f"{prefix}bias")
        if weight is not None and bias is not None:
            # In Caffe2 it may be a convolution, (classes, channels, 1, 1).
            linear = {"linear.weight": weight.flatten(1), "linear.bias": bias}
            classes = len(bias)
            network = network_of(weights, {**weights.tensors, **linear}, classes=classes)
            return weights, network, classes
    raise WeightsError(
        f"{source} has no classifier (fc.weight and fc.bias, by torchvision's names). Converted "
        "files have none: evaluate the file they were made from."
    )


def _open(file: str) -> Image.Image:
    return read_picture(file, upright=False).convert("RGB")  # torchvision ignores EXIF as well


def validation_images(
    folder: Path, classes: int, preprocessing: Preprocessing, limit: int | None = None
) -> Dataset[Any]:
    """Return the images of a folder with one folder for each class, in order of their names.

    Args:
        folder: such as one with n01440764 to n15075141. Folders 0, 1, 2, ... are sorted by number.
        classes: the number of classes.
        preprocessing: of each image.
        limit: take only this many images, evenly spread.

    Returns:
        For each image, (3, crop, crop) in uint8 and RGB, and the class.

    Raises:
        DatasetError: there is no such folder, or its folders are not the classes.
        ConfigError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; it must be 1 or more.")
    interpolation = transforms.InterpolationMode(preprocessing.interpolation)
    library: Any = transforms  # untyped
    cut = library.Compose(
        [
            library.Resize(preprocessing.resize, interpolation),
            library.CenterCrop(preprocessing.crop),
            library.PILToTensor(),
        ]
    )
    try:
        images = ImageFolder(str(folder), cut, loader=_open)
    except OSError as error:
        raise DatasetError(
            f"{folder} does not have one folder of images for each class: {error}"
        ) from error
    names = images.classes
    if all(name.isdecimal() for name in names):  # by name, 10 comes before 2
        numbers = [int(name) for name in names]
        images.target_transform = numbers.__getitem__
    else:
        numbers = list(range(len(names)))
    if sorted(numbers) != list(range(classes)):
        raise DatasetError(
            f"{folder} has {len(names)} folders ({', '.join(names[:3])}, ...), and the classifier "
            f"has {classes} classes: there must be one folder for each, in their order by name."
        )
    if limit is None or limit >= len(images):
        return images
    return Subset(images, [number * len(images) // limit for number in range(limit)])


@torch.inference_mode()
def evaluate(
    weights: str,
    folder: Path,
    *,
    resize: int | None = None,
    crop: int | None = None,
    interpolation: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure top-1 and top-5, with a progress bar on a terminal. Not tested on a GPU.

    Images are cut as for the published figures of the file, unless the arguments say otherwise.

    Returns:
        For JSON: the figures in per cent, the published ones, and the settings.

    Raises:
        ConfigError: an argument out of range.
        DatasetError: an image cannot be read, or the folders are not the classes.
        WeightsError: the file cannot be read, or gives scores that are not finite.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    file, known = locate(weights)
    published = known.accuracy if known else None
    asked = {"resize": resize, "crop": crop, "interpolation": interpolation}
    chosen: dict[str, Any] = {}
    for name, value in asked.items():
        value = getattr(published, name, None) if value is None else value
        if value is not None:
            chosen[name] = value
    preprocessing = Preprocessing(**chosen)
    described, network, classes = load_classifier(file, known)
    images: Any = validation_images(folder, classes, preprocessing, limit)
    try:
        network.to(device)
        loader = DataLoader(images, batch_size, num_workers=workers)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(f"--device, --batch-size or --workers cannot be used: {error}") from error
    assert described.pixels is not None
    right = right_of_five = 0
    with tqdm(total=len(images), unit="image", disable=None) as bar:
        for batch, labels in loader:
            scores = network(described.pixels.normalize(batch.to(device)))["linear"].cpu()
            if not torch.isfinite(scores).all():
                raise WeightsError(f"{file} gives scores that are NaN or infinite.")
            hits = scores.topk(min(5, classes)).indices == labels[:, None]
            right += int(hits[:, 0].sum())
            right_of_five += int(hits.sum())
            bar.update(len(labels))
    return {
        "weights": known.name if known else str(file),
        "network": str(described),
        "images": len(images),
        "top1": 100 * right / len(images),
        "top5": 100 * right_of_five / len(images),
        "published": {key: getattr(published, key, None) for key in ("top1", "top5")},
        "preprocessing": vars(preprocessing),
        "device": device,
        "versions": versions(),
    }
