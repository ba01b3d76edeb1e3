"""Draw the images that a training sees, after augmentation, with boxes, masks and keypoints.

    python tools/visualize_data.py --config-file F [--count 16] [--output DIR] [KEY VALUE ...]

The first images are those of the first iterations of a training with the same SEED, pixel by pixel.
--split test shows what is evaluated. Writes one PNG per image and contact_sheet.png, in place of
those that an earlier run wrote to the same folder.
"""

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
from resnext_det.looking.training_images import (
    SHEET,
    TrainingImage,
    evaluation_images,
    training_images,
    write_images,
)

HEADERS = ["iteration", "image id", "file", "width", "height", "boxes", "classes"]


def parse() -> argparse.Namespace:
    """Return the command line, overrides in `opts`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="or a shipped name")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--count", type=int, default=16, help="of images (default: 16)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="(default: OUTPUT_DIR/images_of_SPLIT)"
    )
    parser.add_argument(
        "--no-augmentation", action="store_true", help="the same images as they are on disk"
    )
    custom.add_arguments(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    arguments = parser.parse_intermixed_args()
    if arguments.count < 1:
        parser.error(f"--count is {arguments.count}; it must be 1 or more")
    arguments.eval_only = arguments.split == "test"
    if arguments.eval_only and arguments.train_json and not arguments.test_json:
        parser.error("--split test looks at --test-json, which is not given")
    return arguments


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


def run(arguments: argparse.Namespace) -> tuple[Path, list[list[object]]]:
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


def main() -> None:
    """Parse the arguments, draw, tell what was drawn."""
    arguments = parse()
    with reported():
        folder, rows = run(arguments)
    print(tabulate(rows, HEADERS, disable_numparse=True))
    print(f"\n{len(rows)} images drawn into {folder}, side by side in {folder / SHEET}")


if __name__ == "__main__":
    main()
