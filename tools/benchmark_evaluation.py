"""Time COCO's evaluation of 5,000 images and 500,000 detections by hotcoco and pycocotools.

    python tools/benchmark_evaluation.py [--rounds 3] [--output times.json]

Both engines get the same arrays of made-up boxes and must give the same figures. "from files" is
hotcoco again, from two JSON files to all that `evaluate --output` writes except the page.
pycocotools takes some 30 seconds a round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

CLASSES = 80
OBJECTS_PER_IMAGE = 36_781 / 5_000  # in COCO minival
WIDTH, HEIGHT = 640, 480


def make_up(folder: Path, images: int, detections: int) -> tuple[Path, Path]:
    """Write random annotations, and detections that are right, beside an object, or anywhere.

    Returns:
        The annotation file and that of the detections, in COCO's formats.
    """
    import numpy as np

    from resnext_det.files import write_json

    random = np.random.default_rng(0)
    objects = max(1, round(images * OBJECTS_PER_IMAGE))
    frequency = 1 / np.arange(1, CLASSES + 1)  # as in COCO, a few classes are frequent
    frequency /= frequency.sum()
    sides = np.exp(random.normal(4, 1, (objects, 2))).clip(2, HEIGHT)
    boxes = np.hstack([random.random((objects, 2)) * ([WIDTH, HEIGHT] - sides), sides])
    owners = random.integers(1, images + 1, objects)
    classes = random.choice(CLASSES, objects, p=frequency) + 1
    crowds = random.random(objects) < 0.01
    columns = map(np.ndarray.tolist, (owners, classes, boxes, sides.prod(1) * 0.6, crowds))
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": a, "iscrowd": int(crowd)}
        for n, (i, c, b, a, crowd) in enumerate(zip(*columns), 1)
    ]
    document = {
        "images": [
            {"id": n, "file_name": f"{n:012}.jpg", "width": WIDTH, "height": HEIGHT}
            for n in range(1, images + 1)
        ],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(1, CLASSES + 1)],
        "annotations": annotations,
    }
    of, scores = random.integers(0, objects, detections), random.random(detections)
    noise = (0.05 + 0.6 * (1 - scores))[:, None] * sides[of][:, [0, 1, 0, 1]]
    found = boxes[of] + random.normal(0, 1, (detections, 4)) * noise
    found[:, 2:] = np.abs(found[:, 2:]) + 1
    nowhere = random.random(detections) < 0.4
    found[nowhere, :2] = random.random((int(nowhere.sum()), 2)) * HEIGHT
    confused = random.random(detections) < 0.3 * (1 - scores)
    kinds = np.where(confused, random.choice(CLASSES, detections, p=frequency) + 1, classes[of])
    # Confident ones are right more often; rounding makes ties, as networks do.
    scores = np.round(np.where(nowhere, 0.5, 1) * scores, 4)
    results = [
        {"image_id": i, "category_id": c, "bbox": b, "score": s}
        for i, c, b, s in zip(*map(np.ndarray.tolist, (owners[of], kinds, found, scores)))
    ]
    write_json(folder / "annotations.json", document, indent=None)
    write_json(folder / "detections.json", results, indent=None)
    return folder / "annotations.json", folder / "detections.json"


def evaluate_files(annotations: Path, results: Path, folder: Path) -> None:
    """Do all that `evaluate --output` does except the page."""
    from resnext_det.evaluation.annotations import read_ground_truth
    from resnext_det.evaluation.detections import read_detections
    from resnext_det.evaluation.evaluator import evaluate_detections, write_evaluated

    truth = read_ground_truth(annotations)
    evaluated = {"bbox": evaluate_detections(truth, read_detections(results, truth))}
    write_evaluated(folder / "out", "made_up", {}, truth, results, evaluated, {"images": ""})


def main() -> None:
    """Measure in alternating rounds, check that the figures agree, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--detections", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="JSON")
    arguments = parser.parse_args()
    if min(arguments.images, arguments.detections, arguments.rounds) < 1:
        parser.error("--images, --detections and --rounds must be 1 or more")

    import numpy as np
    from tabulate import tabulate

    from resnext_det.environment import hardware, versions
    from resnext_det.errors import EvaluationError, reported
    from resnext_det.evaluation.annotations import read_ground_truth
    from resnext_det.evaluation.coco import by_pycocotools, compute
    from resnext_det.evaluation.detections import read_detections
    from resnext_det.files import write_json

    seconds: dict[str, list[float]] = {"hotcoco": [], "pycocotools": [], "from files": []}
    with reported(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_up(folder, arguments.images, arguments.detections)
        truth = read_ground_truth(files[0])
        detections = read_detections(files[1], truth)
        for _ in range(arguments.rounds):
            times = [time.perf_counter()]
            ours = compute(truth, detections)[0].summary
            times.append(time.perf_counter())
            theirs = by_pycocotools(truth, detections).summary
            times.append(time.perf_counter())
            evaluate_files(*files, folder)
            times.append(time.perf_counter())
            for each, duration in zip(seconds.values(), np.diff(times)):
                each.append(float(duration))
            if not np.allclose(ours, theirs, rtol=0, atol=1e-9):
                raise EvaluationError(f"hotcoco gives {ours}, and pycocotools {theirs}.")
        if arguments.output:
            measured = {"seconds": seconds, "figures": ours}
            where = {"versions": versions(), "hardware": hardware()}
            write_json(arguments.output, measured | where)
    first = statistics.median(seconds["hotcoco"])
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    rows = [(name, f"{middle:.2f}", f"{middle / first:.1f}") for name, middle in medians.items()]
    print(tabulate(rows, headers=["", "seconds", "relative"], disable_numparse=True))
    print(f"\nMedians of {arguments.rounds} rounds; the figures agree.\n{hardware()}")


if __name__ == "__main__":
    main()
