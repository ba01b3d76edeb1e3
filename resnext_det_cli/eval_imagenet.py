"""Measure top-1 and top-5 of ImageNet weights, to compare a file with its published figures.

    %(prog)s --weights resnext50_32x4d.tv_in1k --data imagenet/val
    %(prog)s --weights my.pth --data imagenet/val --resize 232 --json top1.json

--weights is a name that `resnext-det weights` lists, downloaded if necessary, or a file that still
has its classifier, in any layout that docs/weights.md lists. --data has one folder per class, in
the order of the classes by name (n01440764, ...).

A file of the catalog, recognised by its checksum, gets images cut as for its published figures, a
checkpoint of `resnext-det pretrain` as in its training's tests, unless --resize, --crop and
--interpolation say otherwise. --data may hold some of the classes of such a checkpoint: ImageNet-1K
for a model of ImageNet-5K. --resize 320 --crop 320 and --ten-crop are the paper's other tests. Not
tested on a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="a name of the catalog, or a file")
    parser.add_argument("--data", required=True, type=Path, help="a folder of class folders")
    parser.add_argument("--resize", type=int, help="shorter side, in pixels (default: 256)")
    parser.add_argument("--crop", type=int, help="side of the crop, in pixels (default: 224)")
    parser.add_argument(
        "--interpolation", choices=("bilinear", "bicubic"), help="(default: bilinear)"
    )
    parser.add_argument(
        "--ten-crop", action="store_true", help="the mean of ten crops instead of the central one"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="N images, evenly spread")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--workers", type=int, default=4, help="processes that read images (default: 4)"
    )
    parser.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="of the network (default: fp32)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and save."""
    from tabulate import tabulate

    from resnext_det.evaluation.classification import evaluate
    from resnext_det.files import write_json

    words = {name: value for name, value in vars(arguments).items() if name != "json"}
    found = evaluate(words.pop("weights"), words.pop("data"), **words)
    rows = [
        (name, f"{found[name]:.3f}", found["published"][name] or "-") for name in ("top1", "top5")
    ]
    given = found["preprocessing"]
    cut = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items() if value)
    print(f"{found['weights']}: {found['network']}, {found['images']} images, {cut}")
    rows += [
        (f"{name}, {way.replace('_', '-')}", f"{figures[name]:.3f}", "-")
        for way, figures in found.items()
        if way.endswith("_way")
        for name in ("top1", "top5")
    ]
    print(tabulate(rows, headers=("per cent", "measured", "published"), disable_numparse=True))
    if arguments.json:
        write_json(arguments.json, found)
