"""Apply the label edits that you chose in a report to a copy of the annotations.

    %(prog)s patch.json --annotations instances_val.json --output fixed.json
    %(prog)s patch.json --annotations ... --output ... --run output/run   AP against both files

The patch must have been made for exactly this annotation file, which stays as it is. A box that
moves or is added has no mask: draw it again.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("patch", type=Path, metavar="PATCH", help="downloaded from a report")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the copy")
    parser.add_argument("--run", type=Path, metavar="DIR", help="whose AP to compare")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.output.resolve() == arguments.annotations.resolve():
        parser.error("--output must be another file than --annotations, which stays as it is")


def run(arguments: argparse.Namespace) -> None:
    """Write the copy, and print what changed."""
    from tabulate import tabulate

    from resnext_det.data.patch import apply_patch
    from resnext_det.errors import quoted
    from resnext_det.evaluation.annotations import read_ground_truth
    from resnext_det.evaluation.coco import FIGURES, compute, percent, shown
    from resnext_det.evaluation.compare import read_baseline
    from resnext_det.files import write_json

    document, counts = apply_patch(arguments.patch, arguments.annotations)
    if arguments.run:  # refuse another run before anything is written
        truth = read_ground_truth(arguments.annotations, checked=True)
        detections = read_baseline(arguments.run, truth)
    write_json(arguments.output, document, indent=None)
    unmasked = counts.pop("without mask", 0)
    done = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    print(f"{counts.total():,} labels changed: {done or 'none'}")
    if unmasked:
        print(f"{unmasked:,} moved boxes had a mask or keypoints, which are left out")
    count = len(document["annotations"])
    print(f"wrote {quoted(arguments.output)}: {count:,} labels, for --train-json or --test-json")
    if not arguments.run:
        return
    after = read_ground_truth(arguments.output, checked=True)
    summaries = [compute(each, detections)[0].summary for each in (truth, after)]
    rows = [
        [name, *(shown(percent(each)) for each in pair)] for name, *pair in zip(FIGURES, *summaries)
    ]
    print(f"\n{quoted(arguments.run)}, the same detections")
    print(tabulate(rows, headers=["", "before", "after"], disable_numparse=True))
    print(
        "The edits agree with this detector, so a higher AP proves nothing. Whether the labels are "
        "better shows in a training with them, compared by `evaluate --baseline`."
    )
