"""COCO's protocol, computed by hotcoco (fast) or by pycocotools (the reference), or by both."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnext_det.errors import DatasetError, EvaluationError, quoted
from resnext_det.evaluation.annotations import GroundTruth
from resnext_det.evaluation.detections import Detections

logger = logging.getLogger(__name__)

FIGURES = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
"""The 12 figures of boxes and masks, in the order of COCO's own summary."""
KEYPOINT_FIGURES = (
    *("AP", "AP50", "AP75", "APm", "APl"),
    *("AR", "AR50", "AR75", "ARm", "ARl"),
)
"""The 10 figures of keypoints."""

DEFAULT_LIMITS = (1, 10, 100)
KEYPOINT_LIMITS = (20,)
_AGREEMENT = 1e-12
"""Both add the same numbers, in orders of their own: more than rounding is a difference."""
COCO_KEYPOINTS = 17


@dataclass(frozen=True)
class Protocol:
    """What is computed.

    Attributes:
        limits: the numbers of detections per image (and class) that recall is computed for; the
            last holds for precision.
        by_class: False for proposals, which have no class.
        kind: what is compared: "bbox", "segm" or "keypoints".
        sigmas: of K keypoints, for their similarity (OKS); empty for COCO's 17.
    """

    limits: tuple[int, ...] = DEFAULT_LIMITS
    by_class: bool = True
    kind: str = "bbox"
    sigmas: tuple[float, ...] = ()

    @classmethod
    def of(cls, kind: str, sigmas: tuple[float, ...] = ()) -> Protocol:
        """Return COCO's own protocol for a kind."""
        limits = KEYPOINT_LIMITS if kind == "keypoints" else DEFAULT_LIMITS
        return cls(limits, kind=kind, sigmas=sigmas if kind == "keypoints" else ())

    @property
    def figures(self) -> tuple[str, ...]:
        """Return the names of what COCO's summary has, none for proposals."""
        if not self.by_class:
            return ()
        return KEYPOINT_FIGURES if self.kind == "keypoints" else FIGURES


@dataclass(frozen=True)
class Accumulated:
    """Precision and recall by everything, as pycocotools orders them; -1 without any object.

    Attributes:
        precision: (IoU thresholds, recalls, classes, areas, limits).
        recall: (IoU thresholds, classes, areas, limits).
        summary: COCO's 12 figures (10 of keypoints), -1 where there is nothing to find; empty for
            proposals.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    summary: tuple[float, ...]


def hotcoco_evaluation(
    truth: GroundTruth, detections: Detections, protocol: Protocol = Protocol()
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
    _check_kind(truth, detections, protocol)
    try:
        annotations = _hotcoco_annotations(truth, protocol.kind)
        results = annotations.load_res(_results(detections, protocol.kind))
        evaluation = hotcoco.COCOeval(annotations, results, protocol.kind)
        evaluation.params.max_dets = list(protocol.limits)
        evaluation.params.use_cats = protocol.by_class
        if protocol.sigmas:
            evaluation.params.kpt_oks_sigmas = list(protocol.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
    except (ValueError, KeyError, RuntimeError) as error:
        raise DatasetError(f"cannot evaluate against {truth.file}: {error}") from error
    return evaluation


def _hotcoco_annotations(truth: GroundTruth, kind: str) -> hotcoco.COCO:
    if kind == "keypoints":
        return hotcoco.COCO(_document(truth, kind))
    objects = truth.objects
    return hotcoco.COCO.from_arrays(
        _images(truth),
        [{"id": number, "name": name} for number, name in truth.categories.items()],
        objects.image_ids,
        objects.category_ids,
        objects.boxes,
        area=objects.areas,
        iscrowd=objects.crowds,
        segmentation=truth.masks if kind == "segm" else None,
    )


def _images(truth: GroundTruth) -> list[dict[str, int]]:
    return [
        {"id": number, "width": int(width), "height": int(height)}
        for number, (width, height) in zip(truth.image_ids.tolist(), truth.sizes.tolist())
    ]


def _document(truth: GroundTruth, kind: str) -> dict[str, Any]:
    """Return the annotations as a file has them, with ids from 1 on.

    To pycocotools, an object with the id 0 counts as never found.
    """
    objects = truth.objects
    columns: dict[str, list[Any]] = {
        "image_id": objects.image_ids.tolist(),
        "category_id": objects.category_ids.tolist(),
        "bbox": objects.boxes.tolist(),
        "area": objects.areas.tolist(),
        "iscrowd": objects.crowds.astype(int).tolist(),
    }
    if kind == "segm":
        columns["segmentation"] = truth.masks
    if kind == "keypoints":
        poses = truth.poses
        columns["keypoints"] = poses.reshape(len(poses), -1).tolist()
        columns["num_keypoints"] = (poses[:, :, 2] > 0).sum(axis=1).tolist()
    rows = zip(*columns.values())
    return {
        "images": _images(truth),
        "categories": [{"id": n, "name": name} for n, name in truth.categories.items()],
        "annotations": [
            {"id": number, **dict(zip(columns, row))} for number, row in enumerate(rows, start=1)
        ],
    }


def _results(detections: Detections, kind: str) -> Any:
    """Return the detections as both engines load them.

    The area of a mask is its own, and that of keypoints is their box's, as in Detectron2.
    """
    if kind == "bbox" or not len(detections):
        return detections.table
    unwanted = {"segm": ("bbox", "keypoints"), "keypoints": ("segmentation",)}[kind]
    return [
        {key: value for key, value in each.items() if key not in unwanted}
        for each in detections.results()
    ]


def _check_kind(truth: GroundTruth, detections: Detections, protocol: Protocol) -> None:
    """Refuse masks of another size than their images', and keypoints of another number."""
    if protocol.kind == "segm" and detections.segmentations is not None:
        sizes = dict(zip(truth.image_ids.tolist(), truth.sizes[:, ::-1].astype(int).tolist()))
        found = zip(detections.image_ids.tolist(), detections.segmentations.tolist())
        other = [(n, each["size"]) for n, each in found if each["size"] != sizes[n]]
        if other:
            number, size = other[0]
            raise DatasetError(
                f"{len(other)} of {len(detections)} masks have another size than their image in "
                f"{truth.file}: of image {number}, height and width are {size} and "
                f"{sizes[number]}. Resize the masks to the images."
            )
    if protocol.kind == "keypoints":
        count = truth.poses.shape[1]
        sigmas = len(protocol.sigmas) or COCO_KEYPOINTS
        poses = detections.keypoints
        given = count if poses is None or not len(poses) else poses.shape[1]
        if not count == sigmas == given:
            raise DatasetError(
                f"objects of {truth.file} have {count} keypoints, detections {given}, and there "
                f"are {sigmas} sigmas: they must be as many. Set TEST.KEYPOINT_OKS_SIGMAS (in "
                "tools/evaluate.py: --oks-sigmas) to one number for each keypoint; the default is "
                f"COCO's for {COCO_KEYPOINTS}."
            )


def accumulated(evaluation: hotcoco.COCOeval, protocol: Protocol = Protocol()) -> Accumulated:
    """Return what hotcoco accumulated.

    Args:
        evaluation: of `hotcoco_evaluation`.
        protocol: that it was made with.
    """
    summary: tuple[float, ...] = ()
    if protocol.figures:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the table as it computes it
            evaluation.summarize()
        summary = tuple(float(value) for value in evaluation.stats)
    arrays = evaluation.eval or {}
    return Accumulated(np.asarray(arrays["precision"]), np.asarray(arrays["recall"]), summary)


def by_hotcoco(
    truth: GroundTruth, detections: Detections, protocol: Protocol = Protocol()
) -> Accumulated:
    """Return what hotcoco accumulates; the arguments are those of `hotcoco_evaluation`."""
    return accumulated(hotcoco_evaluation(truth, detections, protocol), protocol)


def by_pycocotools(
    truth: GroundTruth, detections: Detections, protocol: Protocol = Protocol()
) -> Accumulated:
    """Return what pycocotools accumulates; the arguments are those of `hotcoco_evaluation`.

    500,000 detections take it over a minute.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints each of its steps
        annotations = COCO()
        annotations.dataset = _document(truth, protocol.kind)
        annotations.createIndex()
        results = _pycocotools_results(annotations, detections, protocol.kind)
        evaluation = COCOeval(annotations, results, protocol.kind)
        evaluation.params.maxDets = list(protocol.limits)
        evaluation.params.useCats = int(protocol.by_class)
        if protocol.sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(protocol.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        summary: Sequence[float] = ()
        if protocol.figures:
            evaluation.summarize()
            summary = evaluation.stats
    arrays = evaluation.eval
    return Accumulated(arrays["precision"], arrays["recall"], tuple(map(float, summary)))


def _pycocotools_results(annotations: COCO, detections: Detections, kind: str) -> COCO:
    if len(detections):
        loaded: COCO = annotations.loadRes(_results(detections, kind))
        return loaded
    results = COCO()  # its loadRes takes the first detection for what all are like
    results.dataset = {**annotations.dataset, "annotations": []}
    results.createIndex()
    return results


_Compute = Callable[[GroundTruth, Detections, Protocol], Accumulated]
ENGINES: dict[str, _Compute] = {"hotcoco": by_hotcoco, "pycocotools": by_pycocotools}


def compute(
    truth: GroundTruth,
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
    if truth.id_faults:
        logger.warning(
            "%s: pycocotools by itself gives other figures: %s. They are compared with ids from 1 "
            "on for both engines.",
            quoted(truth.file),
            "; ".join(truth.id_faults),
        )
    found = {name: each(truth, detections, protocol) for name, each in ENGINES.items()}
    check_agreement(found["hotcoco"], found["pycocotools"], protocol.figures)
    return found[engine]


def check_agreement(one: Accumulated, other: Accumulated, figures: Sequence[str] = FIGURES) -> None:
    """Refuse two accumulations that differ, in any class, area, threshold or recall.

    Args:
        one: by hotcoco.
        other: by pycocotools, of the same annotations and detections.
        figures: names of their summaries.

    Raises:
        EvaluationError: they differ; the message says where.
    """
    differing = [
        f"{name} is {ours!r} and {theirs!r}"
        for name, ours, theirs in zip(figures, one.summary, other.summary)
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
