"""Measure top-1 and top-5 of ImageNet weights, and compare them with the published figures.

    %(prog)s --weights resnext50_32x4d.tv_in1k --data imagenet/val
    %(prog)s --weights my.pth --data imagenet/val --like resnext50_32x4d.tv_in1k --json top1.json

--weights is a name that `resnext-det weights` lists, which is downloaded if necessary, or a file
that still has its classifier, in any layout that docs/weights.md lists. --data has one folder per
class, sorted like the classes (n01440764, ...).

A file of the catalog, recognized by its checksum, gets the preprocessing of its published figures.
For another file --like takes that of an entry; --resize, --crop and --interpolation override both.
This was not run on a GPU.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

INTERPOLATIONS = ("bilinear", "bicubic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="a name of the catalog, or a file")
    parser.add_argument("--data", required=True, type=Path, help="a folder of class folders")
    parser.add_argument("--like", metavar="NAME", help="use this entry's preprocessing")
    parser.add_argument("--resize", type=int, help="shorter side, in pixels (default: 256)")
    parser.add_argument("--crop", type=int, help="side of the crop, in pixels (default: 224)")
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, help="(default: bilinear)")
    parser.add_argument("--limit", type=int, metavar="N", help="only N images, evenly spread")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that read images (default: one per core, at most 8)",
    )
    parser.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save everything measured")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and save."""
    from resnext_det.errors import ConfigError
    from resnext_det.files import write_json
    from resnext_det.weights.catalog import entry
    from resnext_det.weights.classifier import load_classifier, locate
    from resnext_det.weights.imagenet import Evaluation, choose_device, measure
    from resnext_det.weights.imagenet_images import Preprocessing, validation_images

    device = choose_device(arguments.device)
    like = entry(arguments.like.removeprefix("resnext://")) if arguments.like else None
    if like is not None and like.accuracy is None:
        raise ConfigError(f"no figures of {like.name} are published, so --like cannot use them.")
    file, known = locate(arguments.weights)
    trained_as = like or known
    published = trained_as.accuracy if trained_as else None
    preprocessing = Preprocessing.of(
        published, arguments.resize, arguments.crop, arguments.interpolation
    )
    classifier = load_classifier(file, known, like)
    images = validation_images(arguments.data, classifier.classes, preprocessing, arguments.limit)
    weights = classifier.weights
    print(
        f"{known.name if known else file}: {weights} ({weights.layout} layout), "
        f"{classifier.classes} classes, on {device}\n"
        f"{len(images)} images, {preprocessing}",  # type: ignore[arg-type]  # it has a length
        flush=True,
    )
    score = measure(
        classifier,
        images,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=device,
    )
    evaluated = Evaluation(classifier, known, preprocessing, arguments.data, device, score)
    print(_described(evaluated))
    if arguments.json:
        write_json(arguments.json, evaluated.document())


def _described(evaluated: Any) -> str:
    """Return the figures as a table, and what a comparison needs to consider."""
    from tabulate import tabulate

    from resnext_det.weights.imagenet import IMAGES
    from resnext_det.weights.imagenet_images import Preprocessing

    score, intervals = evaluated.score, evaluated.intervals
    rows = []
    for name, label, measured in (
        ("top1", "top-1 %", score.top1),
        ("top5", "top-5 %", score.top5),
    ):
        published, difference = evaluated.published[name], evaluated.differences[name]
        interval = "{:.2f} to {:.2f}".format(*intervals[name]) if intervals else "-"
        rows.append(
            (
                label,
                f"{measured:.3f}",
                interval,
                "-" if published is None else f"{published:.3f}",
                "-" if difference is None else f"{difference:+.3f}",
            )
        )
    headers = ("", "measured", "95 % interval", "published", "difference")
    lines = [tabulate(rows, headers=headers, disable_numparse=True)]
    accuracy = evaluated.known.accuracy if evaluated.known else None
    if evaluated.known is None:
        lines.append("This file is not in the catalog, so no published figure is known.")
    elif accuracy is None:
        lines.append(f"No figures of {evaluated.known.name} are published.")
    else:
        lines.append(f"Published: {accuracy.source}, on the {IMAGES:,} images of ImageNet-1K.")
        if evaluated.other_preprocessing:
            lines.append(f"It preprocessed the images differently: {Preprocessing.of(accuracy)}.")
    return "\n".join(lines)
