"""Draw the images a training sees, after augmentation, with boxes, masks and keypoints.

    %(prog)s --config-file F --count 16 --output DIR
    %(prog)s --config-file F --train-json J --train-images D SEED 1
    %(prog)s --config-file F --split test

The first images are those of the first iterations of a training with the same SEED, pixel by pixel.
--split test draws the evaluated images. Writes 0000.png, 0001.png, ... and contact_sheet.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det_cli import flags

HEADERS = ["drawn", "iteration", "image id", "file", "width", "height", "boxes", "classes"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_config(parser)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--count", type=int, default=16, help="of images (default: 16)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="(default: OUTPUT_DIR/images_of_SPLIT)"
    )
    parser.add_argument("--no-augmentation", action="store_true", help="the images as on disk")
    flags.add_own_data(parser)
    flags.add_overrides(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.count < 1:
        parser.error(f"--count is {arguments.count}; it must be 1 or more")
    arguments.eval_only = arguments.split == "test"
    if arguments.eval_only and arguments.train_json and not arguments.test_json:
        parser.error("--split test draws --test-json, which is missing")


def run(arguments: argparse.Namespace) -> None:
    """Draw, and print a table of the images."""
    from tabulate import tabulate

    from resnext_det.config import load_config
    from resnext_det.console import progress_bar
    from resnext_det.data import custom
    from resnext_det.data.checks import check_datasets
    from resnext_det.engine.train_loop import shared_seed
    from resnext_det.errors import plain, quoted
    from resnext_det.visualize import dataset as drawing

    cfg = load_config(arguments.config_file, arguments.opts)
    cfg = custom.from_arguments(cfg, arguments)
    names = list(cfg.DATASETS.TEST if arguments.eval_only else cfg.DATASETS.TRAIN)
    check_datasets(cfg, names, ignore_health=arguments.ignore_health)
    folder = arguments.output or Path(cfg.OUTPUT_DIR) / f"images_of_{arguments.split}"
    augmented = not arguments.no_augmentation
    if arguments.eval_only:
        images = drawing.evaluation_images(cfg, arguments.count, augmented=augmented)
    else:
        seed = shared_seed(cfg.SEED)
        print(f"seed {seed}{'' if cfg.SEED >= 0 else ', a random one, as SEED is negative'}")
        images = drawing.training_images(cfg, arguments.count, seed, augmented=augmented)
    bar = progress_bar(images, total=arguments.count, desc="drawing", unit="image")
    rows = [
        [
            f"{position:04d}.png",
            "-" if image.iteration is None else image.iteration,
            quoted(image.image_id, 40),
            plain(image.file.name),
            *image.picture.size,
            len(image.objects),
            ", ".join(plain(name) for name in dict.fromkeys(each.label for each in image.objects)),
        ]
        for position, image in enumerate(drawing.write_images(bar, folder))
    ]
    print(tabulate(rows, HEADERS, disable_numparse=True))
    print(f"\n{len(rows)} images drawn to {quoted(folder)}, all of them in {drawing.SHEET}")
