"""How long COCO's figures take: hotcoco, pycocotools and, where it is there, faster-coco-eval.

Each starts from the same arrays; dictionaries that it needs are made for it, and counted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from resnext_det.data.columns import Columns
from resnext_det.environment import hardware, versions
from resnext_det.errors import EvaluationError
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.coco import FIGURES, by_hotcoco, by_pycocotools
from resnext_det.evaluation.detections import Detections, read_detections
from resnext_det.evaluation.evaluator import evaluate_detections, write_evaluated
from resnext_det.evaluation.results_file import write_detections
from resnext_det.files import write_json

Summary = tuple[float, ...]
WHOLE = "from files to all tables"
_OTHER = "faster-coco-eval"
_AGREEMENT = 1e-9
_SIDES = 640, 480


@dataclass(frozen=True)
class Size:
    """How much is evaluated; the defaults are minival's size (facts of COCO), and 100 per image."""

    images: int = 5_000
    objects: int = 36_781
    detections: int = 500_000
    classes: int = 80


def made_up(size: Size = Size(), seed: int = 0) -> tuple[GroundTruth, Detections]:
    """Make annotations, and detections that are partly right, partly beside and partly nowhere.

    Args:
        size: how many.
        seed: of the random numbers.
    """
    generator = np.random.default_rng(seed)
    ids = np.sort(generator.choice(600_000, size.images, replace=False)).astype(np.int64)
    shares = 1 / np.arange(1, size.classes + 1)  # a few classes are frequent, as in COCO
    shares /= shares.sum()
    sides = np.exp(generator.normal(4, 1, (size.objects, 2))).clip(2, min(_SIDES))
    corners = generator.random((size.objects, 2)) * (np.array(_SIDES) - sides)
    boxes = np.hstack([corners, sides])
    owners = generator.integers(0, size.images, size.objects)
    classes = generator.choice(size.classes, size.objects, p=shares) + 1
    crowds = generator.random(size.objects) < 0.01
    objects = Columns(ids[owners], classes, boxes, boxes[:, 2] * boxes[:, 3] * 0.6, crowds)
    names = {number: f"class {number}" for number in range(1, size.classes + 1)}
    file_names = tuple(f"{number:012}.jpg" for number in ids)
    sizes = np.tile(np.array(_SIDES, np.float64), (size.images, 1))
    truth = GroundTruth(
        Path("made_up.json"), "", ids, tuple(ids.tolist()), file_names, sizes, names, objects
    )

    of = generator.integers(0, size.objects, size.detections)
    scores = generator.random(size.detections)
    spread = (0.05 + 0.6 * (1 - scores))[:, None] * boxes[of][:, [2, 3, 2, 3]]
    found = boxes[of] + generator.normal(0, 1, (size.detections, 4)) * spread
    found[:, 2:] = np.abs(found[:, 2:]) + 1
    elsewhere = generator.random(size.detections) < 0.4
    found[elsewhere, :2] = generator.random((int(elsewhere.sum()), 2)) * min(_SIDES)
    confused = generator.random(size.detections) < 0.3 * (1 - scores)
    other = generator.choice(size.classes, size.detections, p=shares) + 1
    kinds = np.where(confused, other, classes[of])
    # Sure ones are right more often; the steps make ties, which networks give as well.
    scores = np.round(np.where(elsewhere, 0.5, 1) * scores, 4)
    return truth, Detections(objects.image_ids[of], kinds, found, scores).in_order(ids)


def save(truth: GroundTruth, detections: Detections, folder: Path) -> tuple[Path, Path]:
    """Write both in COCO's formats, and return the annotation file and that of the detections."""
    objects = truth.objects
    columns = objects.image_ids, objects.category_ids, objects.boxes, objects.areas
    rows = zip(*(column.tolist() for column in (*columns, objects.crowds.astype(int))))
    keys = "image_id", "category_id", "bbox", "area", "iscrowd"
    document = {
        "images": [
            {"id": number, "file_name": name, "width": _SIDES[0], "height": _SIDES[1]}
            for number, name in zip(truth.image_ids.tolist(), truth.file_names)
        ],
        "categories": [{"id": number, "name": name} for number, name in truth.categories.items()],
        "annotations": [{"id": n, **dict(zip(keys, row))} for n, row in enumerate(rows, start=1)],
    }
    write_json(folder / "annotations.json", document, indent=None)
    write_detections(folder / "detections.json", detections)
    return folder / "annotations.json", folder / "detections.json"


def measure(size: Size = Size(), rounds: int = 3, *, slow: bool = True) -> dict[str, Any]:
    """Time the engines in turn, on the same annotations and detections, and compare their figures.

    Args:
        size: how much is evaluated.
        rounds: how often.
        slow: with pycocotools, which takes minutes.

    Returns:
        {"seconds": {engine: [of each round]}, "figures": ..., "size": ..., "versions": ...}.

    Raises:
        EvaluationError: the figures differ.
    """
    subjects: dict[str, Callable[[GroundTruth, Detections], Summary]] = {
        "hotcoco": lambda truth, found: by_hotcoco(truth, found).summary
    }
    with_other = importlib.util.find_spec("faster_coco_eval") is not None
    if with_other:
        subjects[_OTHER] = _by_faster_coco_eval
    if slow:
        subjects["pycocotools"] = lambda truth, found: by_pycocotools(truth, found).summary
    small = made_up(Size(50, 400, 2_000, 10))
    for evaluate in subjects.values():
        evaluate(*small)
    truth, detections = made_up(size)
    seconds: dict[str, list[float]] = {name: [] for name in (*subjects, WHOLE)}
    figures: dict[str, Summary] = {}
    with tempfile.TemporaryDirectory() as name:
        files = save(truth, detections, Path(name))
        runs = {key: functools.partial(each, truth, detections) for key, each in subjects.items()}
        runs[WHOLE] = functools.partial(_everything, *files)
        bar = tqdm(total=rounds * len(runs), desc="measuring", disable=None, leave=False)
        for _ in range(rounds):
            for key, run in runs.items():
                start = time.perf_counter()
                figures[key] = run()
                seconds[key].append(time.perf_counter() - start)
                bar.update()
        bar.close()
    _check_figures(figures)
    return {
        "size": vars(size),
        "seconds": seconds,
        "figures": dict(zip(FIGURES, figures["hotcoco"])),
        "versions": versions()
        | ({_OTHER: importlib.metadata.version(_OTHER)} if with_other else {}),
        "hardware": hardware(),
    }


def ratio(seconds: dict[str, list[float]], engine: str, to: str = "hotcoco") -> float:
    """Return how many times as long one took as another: the median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(seconds[engine], seconds[to]))


def _everything(annotations: Path, results: Path) -> Summary:
    """Do all that tools/evaluate.py --output does but the page."""
    truth, detections = read_ground_truth(annotations), read_detections(results)
    evaluated = evaluate_detections(truth, detections)
    evaluated.figures.table()
    with tempfile.TemporaryDirectory() as folder:
        entry = {"images": ""}
        write_evaluated(Path(folder), "made_up", {}, truth, results, {"bbox": evaluated}, entry)
    return tuple(
        -1 if value is None else value / 100 for value in evaluated.figures.figures.values()
    )


def _by_faster_coco_eval(truth: GroundTruth, detections: Detections) -> Summary:
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        objects = truth.objects
        columns = objects.image_ids, objects.category_ids, objects.boxes, objects.areas
        annotations = [
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": a, "iscrowd": crowd}
            for n, (i, c, b, a, crowd) in enumerate(
                zip(*(column.tolist() for column in (*columns, objects.crowds.astype(int)))), 1
            )
        ]
        known = COCO(
            {
                "images": [{"id": number} for number in truth.image_ids.tolist()],
                "categories": [{"id": n, "name": text} for n, text in truth.categories.items()],
                "annotations": annotations,
            }
        )
        evaluation = COCOeval_faster(known, known.loadRes(detections.results()), "bbox")
        evaluation.run()
    return tuple(map(float, evaluation.stats[: len(FIGURES)]))


def _check_figures(figures: dict[str, Summary]) -> None:
    expected = figures["hotcoco"]
    for name, found in figures.items():
        if not np.allclose(found, expected, rtol=0, atol=_AGREEMENT):
            raise EvaluationError(
                f"the figures of {name} are not those of hotcoco: {json.dumps(found)} and "
                f"{json.dumps(expected)}"
            )
