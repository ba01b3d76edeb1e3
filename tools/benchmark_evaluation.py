"""Time COCO's evaluation of 5,000 images and 500,000 detections by every engine that is installed.

    python tools/benchmark_evaluation.py [--rounds 3] [--output times.json]

hotcoco, pycocotools (several minutes; --fast leaves it out) and, if it is installed,
faster-coco-eval, each from the same arrays of made-up boxes; then all of tools/evaluate.py but the
page, from two JSON files. All must give the same figures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--detections", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fast", action="store_true", help="without pycocotools")
    parser.add_argument("--output", type=Path, metavar="JSON")
    arguments = parser.parse_args()
    if min(arguments.images, arguments.detections, arguments.rounds) < 1:
        parser.error("--images, --detections and --rounds must be 1 or more")
    return arguments


if __name__ == "__main__":
    ARGUMENTS = parse()  # answers --help before torch and Detectron2 are imported

import numpy as np  # noqa: E402
from tabulate import tabulate  # noqa: E402

from resnext_det.environment import hardware, versions  # noqa: E402
from resnext_det.errors import EvaluationError, reported  # noqa: E402
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth  # noqa: E402
from resnext_det.evaluation.coco import by_hotcoco, by_pycocotools  # noqa: E402
from resnext_det.evaluation.detections import Detections, read_detections  # noqa: E402
from resnext_det.evaluation.evaluator import evaluate_detections, write_evaluated  # noqa: E402
from resnext_det.files import write_json  # noqa: E402

WHOLE = "from files to all tables"
CLASSES = 80
OBJECTS_PER_IMAGE = 36_781 / 5_000  # of COCO minival
WIDTH, HEIGHT = 640, 480
AGREEMENT = 1e-9


def make_up(folder: Path, images: int, detections: int) -> tuple[Path, Path]:
    """Write annotations, and detections of them that are right, beside an object, or nowhere.

    Returns:
        The annotation file and that of the detections, in COCO's formats.
    """
    random = np.random.default_rng(0)
    objects = max(1, round(images * OBJECTS_PER_IMAGE))
    frequency = 1 / np.arange(1, CLASSES + 1)  # a few classes are frequent, as in COCO
    frequency /= frequency.sum()
    sides = np.exp(random.normal(4, 1, (objects, 2))).clip(2, HEIGHT)
    boxes = np.hstack([random.random((objects, 2)) * ([WIDTH, HEIGHT] - sides), sides])
    owners = random.integers(1, images + 1, objects)
    classes = random.choice(CLASSES, objects, p=frequency) + 1
    crowds = random.random(objects) < 0.01
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": a, "iscrowd": int(crowd)}
        for n, (i, c, b, a, crowd) in enumerate(
            zip(*map(np.ndarray.tolist, (owners, classes, boxes, sides.prod(1) * 0.6, crowds))), 1
        )
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


def by_faster_coco_eval(document: dict[str, Any], detections: Detections) -> tuple[float, ...]:
    """Return the 12 figures as faster-coco-eval computes them; it needs detections as dicts."""
    from faster_coco_eval import COCO, COCOeval_faster  # optional

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(document)
        evaluation = COCOeval_faster(truth, truth.loadRes(detections.results()), "bbox")
        evaluation.run()
    return tuple(map(float, evaluation.stats[:12]))


def from_files(annotations: Path, results: Path) -> tuple[float, ...]:
    """Do all that tools/evaluate.py --output does but the page, and return the 12 figures."""
    truth = read_ground_truth(annotations)
    detections = read_detections(results, truth)
    evaluated = {"bbox": evaluate_detections(truth, detections)}
    with tempfile.TemporaryDirectory() as folder:
        write_evaluated(Path(folder), "made_up", {}, truth, results, evaluated, {"images": ""})
    figures = evaluated["bbox"].figures.figures
    return tuple(-1 if value is None else value / 100 for value in figures.values())


def subjects(files: tuple[Path, Path], *, slow: bool) -> dict[str, Callable[[], tuple[float, ...]]]:
    """Return what is timed, by name."""
    truth: GroundTruth = read_ground_truth(files[0])
    detections: Detections = read_detections(files[1], truth)
    found: dict[str, Callable[[], tuple[float, ...]]] = {
        "hotcoco": lambda: by_hotcoco(truth, detections).summary
    }
    if slow:
        found["pycocotools"] = lambda: by_pycocotools(truth, detections).summary
    if importlib.util.find_spec("faster_coco_eval") is not None:
        document = json.loads(files[0].read_text())
        found["faster-coco-eval"] = lambda: by_faster_coco_eval(document, detections)
    found[WHOLE] = lambda: from_files(*files)
    return found


def main(arguments: argparse.Namespace) -> None:
    """Check that the figures agree, measure in turn, print."""
    with reported(), tempfile.TemporaryDirectory() as folder:
        runs = subjects(
            make_up(Path(folder), arguments.images, arguments.detections), slow=not arguments.fast
        )
        figures: dict[str, tuple[float, ...]] = {}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                space = {"run": run, "figures": figures, "name": name}
                # Once, as pycocotools takes minutes: torch's Timer would warm up twice each time.
                seconds[name].append(
                    timeit.timeit("figures[name] = run()", globals=space, number=1)
                )
        for name, found in figures.items():
            if not np.allclose(found, figures["hotcoco"], rtol=0, atol=AGREEMENT):
                raise EvaluationError(
                    f"{name} gives {found}, and hotcoco gives {figures['hotcoco']}: one of the two "
                    "is wrong, so the times are not printed."
                )
        if arguments.output:
            told = {"seconds": seconds, "versions": versions(), "hardware": hardware()}
            write_json(arguments.output, {**told, "figures": figures["hotcoco"]})
    first = np.array(seconds["hotcoco"])
    rows = [
        [name, f"{np.median(times):.2f}", f"{np.median(np.array(times) / first):.1f}"]
        for name, times in seconds.items()
    ]
    print(tabulate(rows, headers=["", "seconds", "times hotcoco's"], disable_numparse=True))
    print(f"\nMedians of {arguments.rounds} rounds in turn; the figures agree.\n{hardware()}")


if __name__ == "__main__":
    main(ARGUMENTS)
