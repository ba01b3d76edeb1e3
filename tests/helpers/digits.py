"""scikit-learn's 1,797 handwritten digits, as CIFAR's files and as folders of images."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = [f"digit {number}" for number in range(10)]


def split_digits(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return "train", four fifths, and "test": images (N, 32, 32, 3) and labels (N,)."""
    found = load_digits()
    small = (found.images * 255 / 16).astype(np.uint8)
    large = np.stack(
        [np.asarray(Image.fromarray(each).resize((32, 32), Image.BICUBIC)) for each in small]
    )
    order = np.random.default_rng(seed).permutation(len(large))
    pixels, labels = np.repeat(large[order, :, :, None], 3, axis=3), found.target[order]
    held_out = len(order) // 5
    return {
        "test": (pixels[:held_out], labels[:held_out]),
        "train": (pixels[held_out:], labels[held_out:]),
    }


def write_cifar(root: Path) -> Path:
    """Write the digits in the layout of CIFAR-10's Python version, as Python 2 wrote it."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    digits = split_digits()
    parts = {"test_batch": digits["test"]}
    pieces = (np.array_split(each, 5) for each in digits["train"])
    for number, part in enumerate(zip(*pieces), start=1):
        parts[f"data_batch_{number}"] = part
    contents = {"batches.meta": {"label_names": NAMES}}
    for name, (pixels, labels) in parts.items():
        data = pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1)
        contents[name] = {"data": np.ascontiguousarray(data), "labels": labels.tolist()}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return root


def write_folders(root: Path, most: int = 10_000) -> Path:
    """Write the digits as PNG files in train/CLASS and val/CLASS, at most some of each split."""
    digits = split_digits()
    for split, (pixels, labels) in (("train", digits["train"]), ("val", digits["test"])):
        for number, (image, label) in enumerate(zip(pixels[:most], labels)):
            folder = root / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:04}.png")
    return root
