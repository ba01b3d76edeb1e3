"""Classification: top-1 and top-5 of a network on labelled images, and of a checkpoint.

Compared with the published figures, the latter finds a wrong file before a long training starts
from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from resnext_det.checkpoint_file import Run, read_run
from resnext_det.config import parse_config
from resnext_det.console import progress_bar
from resnext_det.data.classification import (
    Preprocessing,
    Views,
    check_same_labels,
    read_folder,
    relabelled,
)
from resnext_det.data.stream import with_lasting_workers
from resnext_det.environment import versions
from resnext_det.errors import ConfigError, DatasetError, WeightsError, named, quoted
from resnext_det.modeling.fast import Precision, accelerate
from resnext_det.weights.catalog import SCHEME, Entry, entry, of_file
from resnext_det.weights.converting import BackboneWeights, backbone_of, naming
from resnext_det.weights.fetching import cache_folder, published_file
from resnext_det.weights.layouts import recognise
from resnext_det.weights.reading import read_checkpoint
from resnext_det.weights.verifying import network_of

# Detectron2's names, those that its converter of torchvision's files writes, and mmpretrain's.
_CLASSIFIERS = ("linear.", "stem.fc.", "head.fc.")


@dataclass(frozen=True)
class Predictions:
    """What a classifier said about labelled images.

    Attributes:
        numbers: of the images in their split, (N,), ascending.
        labels: their classes, (N,).
        best: the classes of the highest scores, descending, (N, 5) or fewer.
        confidence: the softmax of the best class, (N,).
        losses: the cross entropy of each image, (N,).
    """

    numbers: Tensor
    labels: Tensor
    best: Tensor
    confidence: Tensor
    losses: Tensor

    @property
    def top1(self) -> float:
        """The share of images whose best class is right, in per cent."""
        return 100 * int((self.best[:, 0] == self.labels).sum()) / len(self.labels)

    @property
    def top5(self) -> float:
        """The share of images whose class is among the best five, in per cent."""
        return 100 * int((self.best == self.labels[:, None]).sum()) / len(self.labels)

    @property
    def figures(self) -> dict[str, float]:
        """Both, by name."""
        return {"top1": self.top1, "top5": self.top5}

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Return the predictions of several processes, in the order of the images."""
        order = torch.cat([part.numbers for part in parts]).argsort()
        names = [field.name for field in fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts])[order] for name in names))


@torch.inference_mode()
def predict(
    scores: Callable[[Tensor], Tensor],
    views: Views,
    *,
    batch_size: int = 64,
    workers: int = 0,
    among: Sequence[Sequence[int] | None] = (None,),
    interrupting: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Predictions]:
    """Classify images, with a progress bar.

    Args:
        scores: from RGB images, (N, 3, H, W) in uint8, to (N, classes). The scores of several crops
            of an image are averaged, as in RX (train.lua).
        views: the images.
        batch_size: images at once.
        workers: processes that read images.
        among: the classes to choose from, None for all, as for the 5000-way and the 1000-way test
            of ImageNet-5K's models.
        interrupting: may end the loop over the batches.

    Returns:
        The predictions for each item of `among`.

    Raises:
        DatasetError: an image cannot be read.
        WeightsError: scores that are not finite.
    """
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in among]
    loader = with_lasting_workers(DataLoader(views, batch_size, num_workers=workers))
    source = views.images.source.name
    with progress_bar(total=len(views), desc=f"testing {source}", unit="image") as bar:
        for crops, labels in interrupting(loader):
            each = scores(crops.flatten(0, 1)).cpu()
            if not torch.isfinite(each).all():
                raise WeightsError(
                    "the network gives scores that are NaN or infinite: its training diverged, or "
                    "was too short for the statistics of its batch norms."
                )
            # Averaging one crop would only turn -0.0 into 0.0.
            mean = each.view(len(labels), -1, each.shape[1]).mean(1) if crops.shape[1] > 1 else each
            for kept, classes in zip(found, among):
                kept.append((labels, *_likeliest(mean, labels, classes)))
            bar.update(len(labels))
    numbers = torch.tensor(list(views.chosen))
    return [Predictions(numbers, *(torch.cat(part) for part in zip(*kept))) for kept in found]


def _likeliest(
    scores: Tensor, labels: Tensor, classes: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best classes, the confidence in the first of them, and the losses."""
    if classes is not None:
        left_out = torch.ones(scores.shape[1], dtype=torch.bool)
        left_out[list(classes)] = False
        scores = scores.masked_fill(left_out, -math.inf)
    likelihood = scores.log_softmax(1)
    confidence, best = likelihood.topk(min(5, scores.shape[1]))
    return best, confidence[:, 0].exp(), -likelihood.gather(1, labels[:, None])[:, 0]


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


def validation_images(
    folder: Path,
    classes: int,
    preprocessing: Preprocessing,
    limit: int | None = None,
    names: Sequence[str] = (),
) -> Views:
    """Return the images of a folder with one folder for each class, in order of their names.

    Args:
        folder: such as one with n01440764 to n15075141. Folders 0, 1, 2, ... are sorted by number.
        classes: the number of classes.
        preprocessing: of each image.
        limit: take only this many images, evenly spread.
        names: of the classes, if known; the folders may be some of them.

    Raises:
        DatasetError: there is no such folder, or its folders are not the classes.
        ConfigError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; it must be 1 or more.")
    images = read_folder(folder)
    if len(names) == classes:
        check_same_labels(names, images.classes, "the weights", quoted(folder), subset=True)
        images = relabelled(images, names)
    elif len(images.classes) != classes:
        raise DatasetError(
            f"{folder} has {len(images.classes)} folders ({named(images.classes, 3)}), and the "
            f"classifier has {classes} classes: there must be one folder for each, in their order "
            "by name."
        )
    count = len(images) if limit is None else min(limit, len(images))
    chosen = [number * len(images) // count for number in range(count)]
    return Views(images, preprocessing, chosen)


def _recorded(run: Run | None, name: str) -> int | None:
    """Return CLASSIFICATION.RESIZE or CROP of the training that wrote a checkpoint."""
    if run is None or not run.config:
        return None
    settings = parse_config(run.config, "the recorded config").get("CLASSIFICATION")
    value = settings.get(name.upper()) if isinstance(settings, dict) else None
    return value if type(value) is int else None


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
    ten_crop: bool = False,
    precision: Precision | None = None,
) -> dict[str, Any]:
    """Measure top-1 and top-5, with a progress bar on a terminal. Not tested on a GPU.

    Images are cut as for the published figures of the file, or as in the tests of its training by
    this package, unless the arguments say otherwise.

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
    described, network, classes = load_classifier(file, known)
    run = read_run(file)
    names = run.class_names if run else ()
    chosen: dict[str, Any] = {"ten_crop": ten_crop}
    for name, value in asked.items():
        if value is None:
            value = getattr(published, name, None) or _recorded(run, name)
        if value is not None:
            chosen[name] = value
    preprocessing = Preprocessing(**chosen)
    views = validation_images(folder, classes, preprocessing, limit, names)
    assert described.pixels is not None
    pixels = described.pixels
    try:
        accelerate(network, precision or "fp32").to(device)
        DataLoader(views, batch_size, num_workers=workers)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(f"--device, --batch-size or --workers cannot be used: {error}") from error

    def scores(images: Tensor) -> Tensor:
        found: Tensor = network(pixels.normalize(images.to(device)))["linear"]
        return found

    shown = np.unique(views.images.labels).tolist()
    # A limit may leave out classes of the folder, but not those of the weights.
    among = [None, shown] if limit is None and len(shown) < classes else [None]
    with naming(file):
        found = predict(scores, views, batch_size=batch_size, workers=workers, among=among)
    return {
        "weights": known.name if known else str(file),
        "network": str(described),
        "images": len(views),
        **found[0].figures,
        **({f"{len(shown)}_way": found[1].figures} if len(among) > 1 else {}),
        "published": {key: getattr(published, key, None) for key in ("top1", "top5")},
        "preprocessing": vars(preprocessing),
        "device": device,
        "precision": precision or "fp32",
        "versions": versions(),
    }
