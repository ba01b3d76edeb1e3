"""Pretraining in miniature: a small ResNeXt learns to classify crops of the toy shapes.

It replaces ImageNet-1K in the demonstration. The checkpoint has torchvision's
layout and pixel convention (RGB, 0 to 1, ImageNet's mean and std), so that it takes the same way
into a detector as published ImageNet weights do.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from resnext_det.console import progress_bar
from resnext_det.errors import ConfigError, DatasetError
from resnext_det.files import written_beside
from resnext_det.images import read_picture
from resnext_det.modeling.resnext import ResNeXt
from resnext_det.weights.layouts import to_torchvision

logger = logging.getLogger(__name__)

# ImageNet's statistics as torchvision publishes them, RGB, for pixels of 0 to 1.
RGB_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
RGB_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

Crops = NDArray[np.uint8]


@dataclass(frozen=True)
class PretrainingPlan:
    """A small ResNeXt and how it learns.

    Attributes:
        depth: layers.
        template: cardinality and width.
        stem_channels: channels out of the stem.
        res2_channels: channels out of res2.
        crop: side of the crops, in pixels.
        batch: crops in an update.
        updates: how many.
        learning_rate: the highest; it rises linearly and falls as a cosine.
        seed: decides initialisation, order and augmentation.
    """

    depth: int = 26
    template: str = "8x4d"
    stem_channels: int = 32
    res2_channels: int = 64
    crop: int = 48
    batch: int = 32
    updates: int = 1200
    learning_rate: float = 0.1
    seed: int = 0


def cut_crops(root: Path, split: str, side: int, seed: int) -> tuple[Crops, NDArray[np.int64]]:
    """Cut every object out of a COCO split, with a little of what is around it, and backgrounds.

    Args:
        root: the data set's folder, in COCO's layout.
        split: "train2017" or "val2017".
        side: of the square crops, in pixels.
        seed: decides how much is around an object.

    Returns:
        RGB crops of shape (N, side, side, 3), and their classes: 0 is background, the others are
        the positions of the categories in the file, from 1.

    Raises:
        DatasetError: the split is not there.
    """
    annotations = root / "annotations" / f"instances_{split}.json"
    if not annotations.is_file():
        raise DatasetError(f"{annotations} is not there: write the toy data first.")
    document = json.loads(annotations.read_text())
    classes = {entry["id"]: n for n, entry in enumerate(document["categories"], start=1)}
    boxes: dict[int, list[tuple[list[float], int]]] = {}
    for entry in document["annotations"]:
        if not entry["iscrowd"]:
            found = (entry["bbox"], classes[entry["category_id"]])
            boxes.setdefault(entry["image_id"], []).append(found)
    generator = np.random.default_rng(seed)
    crops, labels = [], []
    for record in document["images"]:
        picture = read_picture(root / split / record["file_name"]).convert("RGB")
        for box, label in boxes.get(record["id"], []):
            crops.append(_crop(picture, box, side, generator))
            labels.append(label)
        for box in _backgrounds(record, [box for box, _ in boxes.get(record["id"], [])], generator):
            crops.append(_crop(picture, box, side, generator))
            labels.append(0)
    return np.stack(crops), np.array(labels, dtype=np.int64)


def _crop(
    picture: Image.Image, box: list[float], side: int, generator: np.random.Generator
) -> NDArray[np.uint8]:
    x, y, width, height = box
    reach = max(width, height) * generator.uniform(0.5, 0.75)
    centre_x = x + width / 2 + generator.uniform(-0.15, 0.15) * width
    centre_y = y + height / 2 + generator.uniform(-0.15, 0.15) * height
    corners = (centre_x - reach, centre_y - reach, centre_x + reach, centre_y + reach)
    square = tuple(round(corner) for corner in corners)
    cut = picture.crop((square[0], square[1], square[2], square[3]))
    return np.asarray(cut.resize((side, side), Image.Resampling.BILINEAR), dtype=np.uint8)


def _backgrounds(
    record: dict[str, int], boxes: list[list[float]], generator: np.random.Generator
) -> list[list[float]]:
    """Return one box that holds no object's centre, where a few tries find one."""
    for _ in range(5):
        size = generator.uniform(30, 80)
        x = generator.uniform(0, record["width"] - size)
        y = generator.uniform(0, record["height"] - size)
        inside = [
            x < left + width / 2 < x + size and y < top + height / 2 < y + size
            for left, top, width, height in boxes
        ]
        if not any(inside):
            return [[x, y, size, size]]
    return []


def pretrain(root: Path, output: Path, plan: PretrainingPlan = PretrainingPlan()) -> float:
    """Train a small ResNeXt on the crops of a toy data set and save it in torchvision's layout.

    Args:
        root: the toy data set's folder.
        output: the checkpoint to write, .pth; written beside and then renamed.
        plan: the network and its schedule.

    Returns:
        The share of the crops of val2017 that are classified right, 0 to 1.

    Raises:
        DatasetError: the toy data set is not there.
        ConfigError: no updates, or a negative seed.
    """
    for name, value, least in (("updates", plan.updates, 1), ("seed", plan.seed, 0)):
        if value < least:
            raise ConfigError(f"--{name} is {value}: give a whole number from {least} on.")
    torch.manual_seed(plan.seed)
    crops, labels = cut_crops(root, "train2017", plan.crop, plan.seed)
    network = ResNeXt(
        plan.depth,
        plan.template,
        stem_out_channels=plan.stem_channels,
        res2_out_channels=plan.res2_channels,
        norm="BN",
        num_classes=int(labels.max()) + 1,
    )
    _start_as_identity(network)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=plan.learning_rate,
        momentum=0.9,
        weight_decay=1e-4,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        plan.learning_rate,
        total_steps=plan.updates,
        pct_start=0.2,
        cycle_momentum=False,
    )
    pixels, targets = torch.from_numpy(crops), torch.from_numpy(labels)
    progress = progress_bar(range(plan.updates), desc="pretraining", unit="update")
    for _ in progress:
        chosen = torch.randint(len(pixels), (plan.batch,))
        images = _mirror(normalised(pixels[chosen]))
        loss = functional.cross_entropy(network(images)["linear"], targets[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    right = accuracy(network, *cut_crops(root, "val2017", plan.crop, plan.seed))
    save_atomically(to_torchvision(network.state_dict()), output)
    return right


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Return RGB bytes of shape (N, H, W, 3) as torchvision's models take them, (N, 3, H, W)."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - RGB_MEAN) / RGB_STD


def _mirror(images: torch.Tensor) -> torch.Tensor:
    """Mirror each image, left to right and upside down, half of the time."""
    for side in (2, 3):
        mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
        images = torch.where(mirrored, images.flip(side), images)
    return images


def _start_as_identity(network: ResNeXt) -> None:
    """Let every residual branch start at zero (Goyal et al., arXiv 1706.02677, section 5.1)."""
    for name, module in network.named_modules():
        if name.endswith("conv3.norm"):
            torch.nn.init.zeros_(module.weight)


@torch.no_grad()
def accuracy(network: ResNeXt, crops: Crops, labels: NDArray[np.int64]) -> float:
    """Return the share of crops (N, side, side, 3) that a network classifies right, 0 to 1."""
    network.eval()
    right = 0
    for start in range(0, len(crops), 256):
        scores = network(normalised(torch.from_numpy(crops[start : start + 256])))["linear"]
        expected = torch.from_numpy(labels[start : start + 256])
        right += int((scores.argmax(1) == expected).sum())
    return right / len(crops)


def save_atomically(tensors: dict[str, torch.Tensor], output: Path) -> None:
    """Write tensors with torch.save beside `output`, then rename: never half a file."""
    with written_beside(output) as beside:
        torch.save(tensors, beside)
