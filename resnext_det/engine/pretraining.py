"""Pretraining in miniature: a small ResNeXt learns to classify crops of the toy shapes.

In the demonstration this replaces ImageNet-1K pretraining. The checkpoint has torchvision's layout
and pixel convention, so it is loaded into a detector like published ImageNet weights.
"""

from __future__ import annotations

import json
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

# torchvision's ImageNet statistics, RGB, for pixels from 0 to 1.
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
_BATCH = 32
_LEARNING_RATE = 0.1

Crops = NDArray[np.uint8]
Labels = NDArray[np.int64]
Box = list[float]


def pretrain(
    root: Path,
    output: Path,
    *,
    updates: int = 1200,
    seed: int = 0,
    crop: int = 48,
    stem_channels: int = 32,
    res2_channels: int = 64,
) -> float:
    """Train a ResNeXt-26 (8x4d) on crops of the toy data and write torchvision's layout.

    Args:
        root: toy data in COCO's layout.
        output: checkpoint to write.
        updates: number of updates, of 32 crops each.
        seed: decides initialization, order and augmentation.
        crop: side of the crops, in pixels.
        stem_channels: output channels of the stem.
        res2_channels: output channels of res2.

    Returns:
        The share of validation crops that are classified correctly.

    Raises:
        DatasetError: the data does not exist.
        ConfigError: no updates, or a negative seed.
    """
    for name, value, least in (("updates", updates, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"--{name} is {value}; it must be a whole number, {least} or more.")
    torch.manual_seed(seed)
    crops, labels = cut_crops(root, "train2017", crop, seed)
    network = ResNeXt(
        26,
        "8x4d",
        stem_out_channels=stem_channels,
        res2_out_channels=res2_channels,
        norm="BN",
        num_classes=int(labels.max()) + 1,
    )
    for name, module in network.named_modules():
        if name.endswith("conv3.norm"):  # 1706.02677, section 5.1
            torch.nn.init.zeros_(module.weight)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=_LEARNING_RATE, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=updates, pct_start=0.2, cycle_momentum=False
    )
    pixels, targets = torch.from_numpy(crops), torch.from_numpy(labels)
    for _ in (progress := progress_bar(range(updates), desc="pretraining", unit="update")):
        chosen = torch.randint(len(pixels), (_BATCH,))
        images = _normalized(pixels[chosen])
        for axis in (2, 3):
            flipped = torch.rand(len(images), 1, 1, 1) < 0.5
            images = torch.where(flipped, images.flip(axis), images)
        loss = functional.cross_entropy(network(images)["linear"], targets[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    accuracy = _accuracy(network, *cut_crops(root, "val2017", crop, seed))
    with written_beside(output) as beside:
        torch.save(to_torchvision(network.state_dict()), beside)
    return accuracy


@torch.no_grad()
def _accuracy(network: ResNeXt, crops: Crops, labels: Labels) -> float:
    network.eval()
    correct = 0
    for start in range(0, len(crops), 256):
        scores = network(_normalized(torch.from_numpy(crops[start : start + 256])))["linear"]
        expected = torch.from_numpy(labels[start : start + 256])
        correct += int((scores.argmax(1) == expected).sum())
    return correct / len(crops)


def _normalized(pixels: torch.Tensor) -> torch.Tensor:
    """Return RGB bytes of shape (N, H, W, 3) as torchvision's models take them, (N, 3, H, W)."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD


def cut_crops(root: Path, split: str, side: int, seed: int) -> tuple[Crops, Labels]:
    """Cut every object out of a COCO split, with some context, and a background per image.

    Args:
        root: the data set's folder, in COCO's layout.
        split: "train2017" or "val2017".
        side: side of the crops, in pixels.
        seed: decides how much context is cut out.

    Returns:
        RGB crops of shape (N, side, side, 3), and their classes: 0 for background, otherwise the
        position of the category in the file, from 1.

    Raises:
        DatasetError: the split does not exist.
    """
    annotations = root / "annotations" / f"instances_{split}.json"
    if not annotations.is_file():
        raise DatasetError(f"{annotations} does not exist: write the toy data first.")
    document = json.loads(annotations.read_text())
    classes = {entry["id"]: n for n, entry in enumerate(document["categories"], start=1)}
    objects: dict[int, list[tuple[Box, int]]] = {}
    for entry in document["annotations"]:
        if not entry["iscrowd"]:
            found = entry["bbox"], classes[entry["category_id"]]
            objects.setdefault(entry["image_id"], []).append(found)
    generator = np.random.default_rng(seed)
    crops, labels = [], []
    for record in document["images"]:
        picture = read_picture(root / split / record["file_name"]).convert("RGB")
        boxes = objects.get(record["id"], [])
        for box, label in boxes:
            crops.append(_crop(picture, box, side, generator))
            labels.append(label)
        background = _background(record, [box for box, _ in boxes], generator)
        if background is not None:
            crops.append(_crop(picture, background, side, generator))
            labels.append(0)
    return np.stack(crops), np.array(labels, dtype=np.int64)


def _crop(picture: Image.Image, box: Box, side: int, generator: np.random.Generator) -> Crops:
    """Cut out a square around a box, larger than it and slightly shifted."""
    x, y, width, height = box
    reach = max(width, height) * generator.uniform(0.5, 0.75)
    center_x = x + width / 2 + generator.uniform(-0.15, 0.15) * width
    center_y = y + height / 2 + generator.uniform(-0.15, 0.15) * height
    corners = (center_x - reach, center_y - reach, center_x + reach, center_y + reach)
    left, top, right, bottom = (round(corner) for corner in corners)
    square = picture.crop((left, top, right, bottom))
    return np.asarray(square.resize((side, side), Image.Resampling.BILINEAR), dtype=np.uint8)


def _background(
    record: dict[str, int], boxes: list[Box], generator: np.random.Generator
) -> Box | None:
    """Return a box that contains no object's center, or None if five tries find none."""
    for _ in range(5):
        size = generator.uniform(30, 80)
        x = generator.uniform(0, record["width"] - size)
        y = generator.uniform(0, record["height"] - size)
        if not any(
            x < left + width / 2 < x + size and y < top + height / 2 < y + size
            for left, top, width, height in boxes
        ):
            return [x, y, size, size]
    return None
