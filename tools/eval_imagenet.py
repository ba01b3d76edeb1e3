"""Measure top-1 and top-5 of ImageNet weights, to hold a file against its published figures.

Usage: python tools/eval_imagenet.py --weights resnext50_32x4d.tv_in1k --data imagenet/val

--weights is a name of tools/list_weights.py, fetched where it is not there, or a file that still
has its classifier, in any layout that the README names. --data has one folder for each class,
called so that their order is that of the classes (n01440764, ...).

A file of the catalog, known by its checksum, is given images as for its published figures. For
another one --like takes those of an entry; --resize, --crop and --interpolation go before both.
On a GPU this was not run.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tabulate import tabulate

from resnext_det.errors import ConfigError, reported
from resnext_det.files import write_json
from resnext_det.pretrained.catalog import entry
from resnext_det.pretrained.classifier import load_classifier, locate
from resnext_det.pretrained.imagenet import IMAGES, Evaluation, choose_device, measure
from resnext_det.pretrained.imagenet_images import (
    INTERPOLATIONS,
    Preprocessing,
    validation_images,
)


def main() -> None:
    """Parse the arguments, measure, print and save."""
    arguments = parse()
    with reported():
        evaluated = evaluate(arguments)
        print(described(evaluated))
        if arguments.json:
            try:
                write_json(arguments.json, evaluated.document())
            except OSError as error:
                raise ConfigError(f"{arguments.json} cannot be written: {error}") from error


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="a name of the catalog, or a file")
    parser.add_argument("--data", required=True, type=Path, help="a folder of class folders")
    parser.add_argument("--like", metavar="NAME", help="give images as for this entry's figures")
    parser.add_argument("--resize", type=int, help="shorter side, in pixels (default: 256)")
    parser.add_argument("--crop", type=int, help="side of the crop, in pixels (default: 224)")
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, help="(default: bilinear)")
    parser.add_argument("--limit", type=int, metavar="N", help="N images, evenly spread")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that read images (default: one per core, at most 8)",
    )
    parser.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all that was measured")
    return parser.parse_args()


def evaluate(arguments: argparse.Namespace) -> Evaluation:
    """Do what the arguments say."""
    device = choose_device(arguments.device)
    like = entry(arguments.like.removeprefix("resnext://")) if arguments.like else None
    if like is not None and like.accuracy is None:
        raise ConfigError(f"no figures of {like.name} are published, so --like cannot take them.")
    file, known = locate(arguments.weights)
    published = (like or known).accuracy if like or known else None
    preprocessing = Preprocessing.of(
        published, arguments.resize, arguments.crop, arguments.interpolation
    )
    classifier = load_classifier(file, known, like)
    images = validation_images(arguments.data, classifier.classes, preprocessing, arguments.limit)
    weights = classifier.weights
    print(
        f"{known.name if known else file}: {weights} ({weights.layout} layout), "
        f"{classifier.classes} classes, on {device}\n"
        f"{len(images)} images, {preprocessing}",
        flush=True,
    )
    score = measure(
        classifier,
        images,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=device,
    )
    return Evaluation(classifier, known, preprocessing, arguments.data, device, score)


def described(evaluated: Evaluation) -> str:
    """Return the figures as a table, and what one must know to compare them."""
    score, intervals = evaluated.score, evaluated.intervals
    measured = {"top1": score.top1, "top5": score.top5}
    rows = []
    for name, label in (("top1", "top-1 %"), ("top5", "top-5 %")):
        published, difference = evaluated.published[name], evaluated.differences[name]
        low, high = intervals[name] if intervals else (None, None)
        rows.append(
            (
                label,
                f"{measured[name]:.3f}",
                "-" if low is None else f"{low:.2f} to {high:.2f}",
                "-" if published is None else f"{published:.3f}",
                "-" if difference is None else f"{difference:+.3f}",
            )
        )
    headers = ("", "measured", "95 % interval", "published", "difference")
    lines = [tabulate(rows, headers=headers, disable_numparse=True)]
    accuracy = evaluated.known.accuracy if evaluated.known else None
    if evaluated.known is None:
        lines.append("This file is none of the catalog's, so no published figure is known.")
    elif accuracy is None:
        lines.append(f"No figures of {evaluated.known.name} are published.")
    if accuracy is None:
        return "\n".join(lines)
    lines.append(f"Published: {accuracy.source}, on the {IMAGES:,} images of ImageNet-1K.")
    if evaluated.other_preprocessing:
        lines.append(f"Those images were cut otherwise: {Preprocessing.of(accuracy)}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
