"""`resnext-det show-data`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from resnext_det.config import load_config
from resnext_det.data import custom
from resnext_det.data.checks import check_datasets
from resnext_det.engine.train_loop import shared_seed
from resnext_det.errors import plain, quoted, reported
from resnext_det.visualize.training_images import (
    SHEET,
    TrainingImage,
    evaluation_images,
    training_images,
    write_images,
)

HEADERS = ["iteration", "image id", "file", "width", "height", "boxes", "classes"]


def row(image: TrainingImage) -> list[object]:
    """Return one line of the table."""
    return [
        "-" if image.iteration is None else image.iteration,
        quoted(image.image_id, 40),
        plain(image.file.name),
        *image.picture.size,
        len(image.objects),
        ", ".join(plain(name) for name in dict.fromkeys(each.label for each in image.objects)),
    ]


def draw(arguments: argparse.Namespace) -> tuple[Path, list[list[object]]]:
    """Write the pictures; return their folder and the table."""
    cfg = load_config(arguments.config_file, arguments.opts)
    cfg = custom.from_arguments(cfg, arguments)
    names = list(cfg.DATASETS.TEST if arguments.eval_only else cfg.DATASETS.TRAIN)
    check_datasets(cfg, names, ignore_health=arguments.ignore_health)
    folder = arguments.output or Path(cfg.OUTPUT_DIR) / f"images_of_{arguments.split}"
    augmented = not arguments.no_augmentation
    if arguments.eval_only:
        images = evaluation_images(cfg, arguments.count, augmented=augmented)
    else:
        seed = shared_seed(cfg.SEED)
        chosen = "" if cfg.SEED >= 0 else ", drawn anew for each training, as SEED is negative"
        print(f"seed {seed}{chosen}")
        images = training_images(cfg, arguments.count, seed, augmented=augmented)
    bar = tqdm(images, total=arguments.count, unit="image", disable=None)
    return folder, [row(image) for image in write_images(bar, folder)]


def run(arguments: argparse.Namespace) -> None:
    """Draw, and print what was drawn."""
    with reported():
        folder, rows = draw(arguments)
    print(tabulate(rows, HEADERS, disable_numparse=True))
    print(f"\n{len(rows)} images drawn into {folder}, side by side in {folder / SHEET}")
