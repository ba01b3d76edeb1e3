"""Time COCO's evaluation of 5,000 images and 500,000 detections by every engine there is.

    python tools/benchmark_evaluation.py [--rounds 3] [--output times.json]

hotcoco, pycocotools (several minutes; --fast leaves it out) and, where it is installed,
faster-coco-eval, on the same made-up detections; and the whole way of tools/evaluate.py from two
JSON files to all tables. The figures of all must agree.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from tabulate import tabulate

from resnext_det.errors import reported
from resnext_det.evaluation.benchmark import Size, measure, ratio
from resnext_det.files import write_json


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Size()
    parser.add_argument("--images", type=int, default=default.images)
    parser.add_argument("--detections", type=int, default=default.detections)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fast", action="store_true", help="without pycocotools")
    parser.add_argument("--output", type=Path, metavar="JSON")
    arguments = parser.parse_args()
    if min(arguments.images, arguments.detections, arguments.rounds) < 1:
        parser.error("--images, --detections and --rounds must be 1 or more")
    objects = max(1, default.objects * arguments.images // default.images)
    size = Size(arguments.images, objects, arguments.detections)
    with reported():
        found = measure(size, arguments.rounds, slow=not arguments.fast)
        if arguments.output:
            write_json(arguments.output, found)
    seconds = found["seconds"]
    rows = [
        [name, f"{statistics.median(times):.2f}", f"{ratio(seconds, name):.1f}"]
        for name, times in seconds.items()
    ]
    print(tabulate(rows, headers=["", "seconds", "times hotcoco's"], disable_numparse=True))
    print(
        f"\nMedians of {arguments.rounds} rounds in turn, each from arrays but the last one; the "
        "figures agree."
    )
    print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    print(found["hardware"])


if __name__ == "__main__":
    main()
