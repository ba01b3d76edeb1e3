"""Top-1 and top-5 of a checkpoint with its classifier, on a folder like ImageNet's validation set.

What a file is worth is known before a long training starts from it: its published figure, or not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from resnext_det.environment import hardware, versions
from resnext_det.errors import ConfigError, DatasetError, WeightsError
from resnext_det.files import file_digest
from resnext_det.weights.catalog import Entry
from resnext_det.weights.classifier import Classifier
from resnext_det.weights.imagenet_images import Preprocessing
from resnext_det.weights.verifying import network_input

IMAGES = 50_000
"""Of ImageNet-1K's validation set, on which published figures are measured."""


@dataclass(frozen=True)
class Score:
    """How often a classifier was right.

    Attributes:
        images: how many were looked at.
        right: for how many the class with the highest score was the true one.
        right_of_five: for how many the true class was among the five highest.
    """

    images: int
    right: int
    right_of_five: int

    @property
    def top1(self) -> float:
        """In per cent."""
        return 100 * self.right / self.images

    @property
    def top5(self) -> float:
        """In per cent."""
        return 100 * self.right_of_five / self.images


def wilson_interval(right: int, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return between which shares, in per cent, the one of all images lies.

    The score interval of Wilson (1927), as Brown, Cai and DasGupta give it ("Interval Estimation
    for a Binomial Proportion", 2001, equation 4): the images are taken for a random sample. Those
    spread evenly over all classes vary a little less.
    """
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = right / images, z * z / images
    centre = (share + spread / 2) / (1 + spread)
    reach = z * math.sqrt(share * (1 - share) / images + spread / images / 4) / (1 + spread)
    # Rounding is all that keeps these two from being exact.
    low = centre - reach if right else 0.0
    high = centre + reach if right < images else 1.0
    return 100 * low, 100 * high


def choose_device(device: str | None = None) -> str:
    """Return the device to run on: by default the GPU if there is one, else the CPU.

    Raises:
        ConfigError: the one asked for is not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the device {device!r} cannot be used: {reason}") from error
    return device


def measure(
    classifier: Classifier,
    images: Dataset[tuple[Tensor, int]],
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
) -> Score:
    """Classify images and count, with a progress bar on a terminal.

    The code for a GPU was not run on one.

    Args:
        classifier: moved to `device`.
        images: what `validation_images` gave.
        batch_size: images at once.
        workers: processes that read images; 0 for this one.
        device: see `choose_device`.

    Raises:
        ConfigError: a number below its range, or a device that is not there.
        DatasetError: an image cannot be read.
        WeightsError: scores that are not finite.
    """
    if batch_size < 1 or workers < 0:
        raise ConfigError(
            f"a batch of {batch_size} images read by {workers} processes cannot be: a batch has 1 "
            "or more, and processes are 0 or more."
        )
    device = choose_device(device)
    network = classifier.network.to(device)
    on_gpu = device.startswith("cuda")
    careful = _Careful(images)
    loader = DataLoader(
        careful, batch_size, num_workers=workers, collate_fn=_together, pin_memory=on_gpu
    )
    seen = right = right_of_five = 0
    with torch.inference_mode(), tqdm(total=len(careful), unit="image", disable=None) as bar:
        for found in loader:
            if isinstance(found, DatasetError):
                raise found
            batch, labels = found
            scores = network(network_input(batch.to(device), classifier.pixels))["linear"].cpu()
            if not torch.isfinite(scores).all():
                raise WeightsError(
                    f"{classifier.weights.source} gives scores that are NaN or infinite: it is "
                    "broken, or was trained for other images than those it is given."
                )
            seen += len(labels)
            hits = scores.topk(min(5, classifier.classes)).indices == labels[:, None]
            right += int(hits[:, 0].sum())
            right_of_five += int(hits.sum())
            bar.update(len(labels))
            bar.set_postfix_str(f"top-1 {100 * right / seen:.2f} %")
    return Score(seen, right, right_of_five)


class _Careful(Dataset[Any]):
    """Images, or the error where one cannot be read.

    Raised in a worker, an error would arrive within a traceback of the worker's.
    """

    def __init__(self, images: Dataset[tuple[Tensor, int]]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> Any:
        try:
            return self.images[number]
        except DatasetError as error:
            return error


def _together(items: Sequence[Any]) -> Any:
    """Make a batch, or return the first error."""
    errors = [item for item in items if isinstance(item, DatasetError)]
    return errors[0] if errors else default_collate(list(items))


@dataclass(frozen=True)
class Evaluation:
    """What was measured, of what, and what is published.

    Attributes:
        classifier: the network.
        known: its entry in the catalog; None if it has none.
        preprocessing: of each image.
        folder: with the images.
        device: that it ran on.
        score: what was measured.
    """

    classifier: Classifier
    known: Entry | None
    preprocessing: Preprocessing
    folder: Path
    device: str
    score: Score

    @property
    def published(self) -> dict[str, float | None]:
        """The published "top1" and "top5" of this very file, in per cent; None where unknown."""
        accuracy = self.known.accuracy if self.known is not None else None
        return {name: getattr(accuracy, name, None) for name in ("top1", "top5")}

    @property
    def differences(self) -> dict[str, float | None]:
        """Measured less published, in points."""
        measured = {"top1": self.score.top1, "top5": self.score.top5}
        return {
            name: None if published is None else measured[name] - published
            for name, published in self.published.items()
        }

    @property
    def intervals(self) -> dict[str, tuple[float, float]] | None:
        """95 % intervals in per cent; None for all 50,000 images, where nothing was sampled."""
        if self.score.images == IMAGES:
            return None
        return {
            "top1": wilson_interval(self.score.right, self.score.images),
            "top5": wilson_interval(self.score.right_of_five, self.score.images),
        }

    @property
    def other_preprocessing(self) -> bool:
        """Whether the published figure is known to be of images that were cut in another way."""
        accuracy = self.known.accuracy if self.known is not None else None
        if accuracy is None:
            return False
        wanted = Preprocessing.of(accuracy)
        return any(
            getattr(wanted, name) != getattr(self.preprocessing, name)
            for name in ("resize", "crop", "interpolation")
            if name not in wanted.assumed
        )

    def document(self) -> dict[str, Any]:
        """Return all of it, with versions and hardware, as JSON takes it."""
        weights = self.classifier.weights
        return {
            "file": weights.source.name,
            "sha256": file_digest(weights.source),
            "catalog": None if self.known is None else self.known.name,
            "network": str(weights),
            "layout": weights.layout,
            "classes": self.classifier.classes,
            "preprocessing": asdict(self.preprocessing),
            "data": str(self.folder),
            **asdict(self.score),
            "top1": self.score.top1,
            "top5": self.score.top5,
            "interval_95": self.intervals,
            "published": self.published,
            "difference": self.differences,
            "device": self.device,
            "hardware": hardware(),
            "versions": {**versions(), "pillow": PIL.__version__},
        }
