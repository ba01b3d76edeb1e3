"""COCO's evaluation of made-up detections, by hotcoco and by pycocotools."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from resnext_det.benchmark.measure import Row, Run, Setup, Table, alternate
from resnext_det.errors import EvaluationError
from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.coco import by_pycocotools, compute
from resnext_det.evaluation.detections import read_detections
from resnext_det.evaluation.evaluator import evaluate_detections, write_evaluated
from resnext_det.files import write_json

CLASSES = 80
OBJECTS_PER_IMAGE = 36_781 / 5_000  # in COCO minival
WIDTH, HEIGHT = 640, 480


def evaluation(setup: Setup) -> list[Table]:
    """Measure both engines on the same arrays, and check that their figures agree.

    Raises:
        EvaluationError: they do not.
    """
    images, count = setup.sizes.evaluated
    with TemporaryDirectory() as name:
        files = make_up(Path(name), images, count)
        truth = read_ground_truth(files[0])
        detections = read_detections(files[1], truth)
        found = []
        reference: dict[str, Run] = {
            "pycocotools": lambda: found.append(by_pycocotools(truth, detections).summary)
        }
        # It takes half a minute: once, without a warm-up.
        seconds = alternate(reference, 1, "pycocotools", warm_up=0)
        runs: dict[str, Run] = {
            "hotcoco": lambda: found.append(compute(truth, detections)[0].summary),
            "hotcoco, from files to all tables": partial(_evaluate_files, *files, Path(name)),
        }
        seconds |= alternate(runs, setup.rounds, "hotcoco")
    if not np.allclose(found[0], found[1], rtol=0, atol=1e-9):
        raise EvaluationError(f"hotcoco gives {found[1]}, and pycocotools {found[0]}.")
    note = (
        f"COCO's figures of {count:,} made-up detections on {images:,} images; both engines give "
        f"the same, such as AP {100 * found[0][0]:.2f}. pycocotools runs once. The last row reads "
        "two JSON files and writes all that `resnext-det evaluate --output` does except the page."
    )
    rows = [Row(f"{count:,} detections", name, times) for name, times in seconds.items()]
    return [Table("Evaluation", note, rows)]


def make_up(folder: Path, images: int, detections: int) -> tuple[Path, Path]:
    """Write random annotations, and detections that are right, beside an object, or anywhere.

    Returns:
        The annotation file and that of the detections, in COCO's formats.
    """
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


def _evaluate_files(annotations: Path, results: Path, folder: Path) -> None:
    """Do all that `evaluate --output` does except the page."""
    truth = read_ground_truth(annotations)
    evaluated = {"bbox": evaluate_detections(truth, read_detections(results, truth))}
    write_evaluated(folder / "out", "made_up", {}, truth, results, evaluated, {"images": ""})
