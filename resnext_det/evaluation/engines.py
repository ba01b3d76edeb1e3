"""COCO's protocol, computed by hotcoco (fast) or by pycocotools (the reference), or by both."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import hotcoco
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnext_det.errors import DatasetError, EvaluationError
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.truth import Truth

FIGURES = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
"""The 12 figures in the order of COCO's own summary."""

DEFAULT_LIMITS = (1, 10, 100)
_AGREEMENT = 1e-12
"""Both add the same numbers, in orders of their own: more than rounding is a difference."""


@dataclass(frozen=True)
class Protocol:
    """What is computed.

    Attributes:
        limits: the numbers of detections per image (and class) that recall is computed for; the
            last holds for precision.
        by_class: False for proposals, which have no class.
    """

    limits: tuple[int, ...] = DEFAULT_LIMITS
    by_class: bool = True


@dataclass(frozen=True)
class Accumulated:
    """Precision and recall by everything, as pycocotools orders them; -1 without any object.

    Attributes:
        precision: (IoU thresholds, recalls, classes, areas, limits).
        recall: (IoU thresholds, classes, areas, limits).
        summary: COCO's 12 figures, -1 where there is nothing to find; empty for proposals.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    summary: tuple[float, ...]


def hotcoco_evaluation(
    truth: Truth, detections: Detections, protocol: Protocol = Protocol()
) -> hotcoco.COCOeval:
    """Match detections with the truth and accumulate, by hotcoco.

    Args:
        truth: the annotations.
        detections: of its images.
        protocol: what is computed.

    Returns:
        hotcoco's evaluation, to which it can put further questions.

    Raises:
        DatasetError: hotcoco refuses them.
    """
    try:
        annotations = hotcoco.COCO.from_arrays(
            [{"id": number} for number in truth.image_ids.tolist()],
            [{"id": number, "name": name} for number, name in truth.categories.items()],
            truth.objects.image_ids,
            truth.objects.category_ids,
            truth.objects.boxes,
            area=truth.objects.areas,
            iscrowd=truth.objects.crowds,
        )
        evaluation = hotcoco.COCOeval(annotations, annotations.load_res(detections.table), "bbox")
        evaluation.params.max_dets = list(protocol.limits)
        evaluation.params.use_cats = protocol.by_class
        evaluation.evaluate()
        evaluation.accumulate()
    except (ValueError, KeyError, RuntimeError) as error:
        raise DatasetError(f"cannot evaluate against {truth.file}: {error}") from error
    return evaluation


def accumulated(evaluation: hotcoco.COCOeval, protocol: Protocol = Protocol()) -> Accumulated:
    """Return what hotcoco accumulated.

    Args:
        evaluation: of `hotcoco_evaluation`.
        protocol: that it was made with.
    """
    summary: tuple[float, ...] = ()
    if protocol == Protocol():
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the table as it computes it
            evaluation.summarize()
        summary = tuple(float(value) for value in evaluation.stats)
    arrays = evaluation.eval or {}
    return Accumulated(np.asarray(arrays["precision"]), np.asarray(arrays["recall"]), summary)


def by_hotcoco(
    truth: Truth, detections: Detections, protocol: Protocol = Protocol()
) -> Accumulated:
    """Return what hotcoco accumulates; the arguments are those of `hotcoco_evaluation`."""
    return accumulated(hotcoco_evaluation(truth, detections, protocol), protocol)


def by_pycocotools(
    truth: Truth, detections: Detections, protocol: Protocol = Protocol()
) -> Accumulated:
    """Return what pycocotools accumulates; the arguments are those of `hotcoco_evaluation`.

    500,000 detections take it over a minute.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints each of its steps
        annotations = COCO()
        objects = truth.objects
        columns = objects.image_ids, objects.category_ids, objects.boxes, objects.areas
        rows = zip(*(column.tolist() for column in (*columns, objects.crowds.astype(int))))
        keys = "image_id", "category_id", "bbox", "area", "iscrowd"
        annotations.dataset = {
            "images": [{"id": number} for number in truth.image_ids.tolist()],
            "categories": [{"id": n, "name": name} for n, name in truth.categories.items()],
            # From 1 on: an object with the id 0 counts as never found.
            "annotations": [
                {"id": number, **dict(zip(keys, row))} for number, row in enumerate(rows, start=1)
            ],
        }
        annotations.createIndex()
        results = _results(annotations, detections)
        evaluation = COCOeval(annotations, results, "bbox")
        evaluation.params.maxDets = list(protocol.limits)
        evaluation.params.useCats = int(protocol.by_class)
        evaluation.evaluate()
        evaluation.accumulate()
        summary: Sequence[float] = ()
        if protocol == Protocol():
            evaluation.summarize()
            summary = evaluation.stats
    arrays = evaluation.eval
    return Accumulated(arrays["precision"], arrays["recall"], tuple(map(float, summary)))


def _results(annotations: COCO, detections: Detections) -> COCO:
    if len(detections):
        loaded: COCO = annotations.loadRes(detections.table)
        return loaded
    results = COCO()  # its loadRes takes the first detection for what all are like
    results.dataset = {**annotations.dataset, "annotations": []}
    results.createIndex()
    return results


Engine = Callable[[Truth, Detections, Protocol], Accumulated]
ENGINES: dict[str, Engine] = {"hotcoco": by_hotcoco, "pycocotools": by_pycocotools}


def compute(
    truth: Truth,
    detections: Detections,
    protocol: Protocol = Protocol(),
    *,
    engine: str = "hotcoco",
    cross_check: bool = False,
) -> Accumulated:
    """Accumulate by one engine, or by both.

    Args:
        truth: the annotations.
        detections: of its images.
        protocol: what is computed.
        engine: a key of `ENGINES`.
        cross_check: compute by both, and refuse any difference.

    Raises:
        EvaluationError: `cross_check`, and the engines differ.
    """
    if not cross_check:
        return ENGINES[engine](truth, detections, protocol)
    found = {name: each(truth, detections, protocol) for name, each in ENGINES.items()}
    check_agreement(found["hotcoco"], found["pycocotools"])
    return found[engine]


def check_agreement(one: Accumulated, other: Accumulated) -> None:
    """Refuse two accumulations that differ, in any class, area, threshold or recall.

    Args:
        one: by hotcoco.
        other: by pycocotools, of the same annotations and detections.

    Raises:
        EvaluationError: they differ; the message says where.
    """
    differing = [
        f"{name} is {ours!r} and {theirs!r}"
        for name, ours, theirs in zip(FIGURES, one.summary, other.summary)
        if abs(ours - theirs) > _AGREEMENT
    ]
    for what, mine, yours in (
        ("precision", one.precision, other.precision),
        ("recall", one.recall, other.recall),
    ):
        if mine.shape != yours.shape:
            differing.append(f"{what} has the shapes {mine.shape} and {yours.shape}")
            continue
        off = int((np.abs(mine - yours) > _AGREEMENT).sum())
        if off:
            differing.append(f"{off} of {mine.size} values of {what}")
    if differing:
        raise EvaluationError(
            f"hotcoco and pycocotools differ: {'; '.join(differing)}. Trust pycocotools (--engine "
            "pycocotools), and report it to hotcoco with the files."
        )
