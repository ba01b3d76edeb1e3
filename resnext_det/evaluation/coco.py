"""COCO's figures, computed by hotcoco (fast), by pycocotools (the reference), or by both."""

from __future__ import annotations

import contextlib
import io
from dataclasses import asdict, dataclass
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from resnext_det.errors import ConfigError, DatasetError, EvaluationError, plain, quoted
from resnext_det.evaluation.annotations import GroundTruth
from resnext_det.evaluation.detections import Detections

ENGINES = ("hotcoco", "pycocotools")
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
COCO_KEYPOINTS = 17
LIMITS = (100, 300, 1000)
"""Numbers of proposals per image at which average recall is computed."""
_SIZES = ("", "s", "m", "l")
PROPOSAL_FIGURES = tuple(f"AR{size}@{limit}" for limit in LIMITS for size in _SIZES)

_ROUNDING = 1e-12  # both engines add the same numbers in different orders


@dataclass(frozen=True)
class Engine:
    """Which engine computes; with `cross_check` both do, and must agree.

    pycocotools takes a hundred times as long as hotcoco.
    """

    name: str = "hotcoco"
    cross_check: bool = False

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ConfigError(f"unknown engine {quoted(self.name)}: name {' or '.join(ENGINES)}.")


@dataclass(frozen=True)
class Protocol:
    """The settings of COCO's evaluation.

    Attributes:
        kind: "bbox", "segm" or "keypoints".
        limits: detections per image and class at which recall is computed; precision uses the last.
        by_class: False for proposals, which have no class.
        sigmas: of the keypoints, for their similarity (OKS); empty for COCO's 17.
    """

    kind: str = "bbox"
    limits: tuple[int, ...] = (1, 10, 100)
    by_class: bool = True
    sigmas: tuple[float, ...] = ()

    @classmethod
    def of(cls, kind: str, sigmas: tuple[float, ...] = ()) -> Protocol:
        """Return COCO's own protocol for a kind; `sigmas` matter to keypoints only."""
        return cls(kind, (20,), sigmas=sigmas) if kind == "keypoints" else cls(kind)

    @property
    def figures(self) -> tuple[str, ...]:
        """Return the names of the figures in COCO's summary; none for proposals."""
        if not self.by_class:
            return ()
        return KEYPOINT_FIGURES if self.kind == "keypoints" else FIGURES


@dataclass(frozen=True)
class Accumulated:
    """The result of an engine in pycocotools' layout, from 0 to 1, or -1 without objects.

    Attributes:
        precision: (IoU thresholds, recalls, classes, areas, limits).
        recall: (IoU thresholds, classes, areas, limits).
        summary: `Protocol.figures`.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    summary: tuple[float, ...]


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one class in percent (None without objects), and its number of objects.

    APs, APm and APl are of objects below 32 x 32 pixels, up to 96 x 96, and larger; AR is the
    recall with 100 detections per image (20 for keypoints) over IoU 0.50 to 0.95. `instances`
    excludes crowds and, for keypoints, objects without any.
    """

    name: str
    AP: float | None
    AP50: float | None
    APs: float | None
    APm: float | None
    APl: float | None
    AR: float | None
    instances: int


@dataclass(frozen=True)
class Figures:
    """COCO's figures by name and by class, in percent; None without objects."""

    figures: dict[str, float | None]
    per_class: tuple[ClassFigures, ...]

    def table(self) -> str:
        """Return the figures and the classes as text for a terminal."""
        names = list(self.figures)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        tables = [
            tabulate([[shown(self.figures[n]) for n in half]], headers=half) for half in halves
        ]
        rows = [
            [plain(name), *map(shown, values), instances]
            for name, *values, instances in (asdict(each).values() for each in self.per_class)
        ]
        headers = ["class", "AP", "AP50", "APs", "APm", "APl", "AR", "instances"]
        return "\n\n".join([*tables, tabulate(rows, headers=headers, disable_numparse=True)])

    def flat(self) -> dict[str, float]:
        """Return all by name, classes as AP-NAME, NaN for None, as Detectron2's evaluator does."""
        return nan_for_none(self.figures | {f"AP-{row.name}": row.AP for row in self.per_class})

    def document(self) -> dict[str, Any]:
        """Return the figures as metrics.json holds them."""
        return {"figures": self.figures, "per_class": [asdict(row) for row in self.per_class]}


def nan_for_none(figures: dict[str, float | None]) -> dict[str, float]:
    """Return figures as Detectron2's evaluators do, with NaN instead of None."""
    return {name: float("nan") if value is None else value for name, value in figures.items()}


def shown(value: float | None) -> str:
    """Return a percentage for a table: two digits, or a dash for None."""
    return "-" if value is None else f"{value:.2f}"


def percent(value: float) -> float | None:
    """Return a share in percent; None for -1, which COCO gives without objects."""
    return None if value < 0 else 100 * float(value)


def compute(
    truth: GroundTruth,
    detections: Detections,
    protocol: Protocol = Protocol(),
    engine: Engine = Engine(),
) -> tuple[Accumulated, hotcoco.COCOeval]:
    """Evaluate detections by one engine or both.

    Returns:
        The engine's result, and hotcoco's evaluation in any case, for error analysis.

    Raises:
        DatasetError: the annotations or detections do not suit the protocol.
        EvaluationError: the engines differ in any class, area, threshold or recall.
    """
    evaluation = hotcoco_evaluation(truth, detections, protocol)
    found = _accumulated(evaluation, protocol)
    if engine == Engine():
        return found, evaluation
    reference = by_pycocotools(truth, detections, protocol)
    if engine.cross_check:
        differing = [
            f"{name} is {one!r} and {other!r}"
            for name, one, other in zip(protocol.figures, found.summary, reference.summary)
            if abs(one - other) > _ROUNDING
        ]
        for name in ("precision", "recall"):
            one, other = getattr(found, name), getattr(reference, name)
            if one.shape != other.shape or not np.allclose(one, other, rtol=0, atol=_ROUNDING):
                differing.append(f"{name} differs")
        if differing:
            raise EvaluationError(
                f"hotcoco and pycocotools differ: {'; '.join(differing)}. Trust pycocotools "
                "(--engine pycocotools), and report the files to hotcoco's authors."
            )
    return (reference if engine.name == "pycocotools" else found), evaluation


def hotcoco_evaluation(
    truth: GroundTruth, detections: Detections, protocol: Protocol = Protocol()
) -> hotcoco.COCOeval:
    """Match and accumulate by hotcoco.

    Raises:
        DatasetError: the annotations or detections do not suit the protocol.
    """
    _check_kind(truth, detections, protocol)
    document = _document(truth, protocol.kind, with_annotations=protocol.kind != "bbox")
    objects = truth.objects
    try:
        if protocol.kind == "bbox":
            # A tenth of the time of reading dicts; the bootstrap does this often.
            annotations = hotcoco.COCO.from_arrays(
                document["images"],
                document["categories"],
                objects.image_ids,
                objects.category_ids,
                objects.boxes,
                area=objects.areas,
                iscrowd=objects.crowds,
            )
        else:
            annotations = hotcoco.COCO(document)
        results = annotations.load_res(_results(detections, protocol.kind))
        evaluation = hotcoco.COCOeval(annotations, results, protocol.kind)
        evaluation.params.max_dets = list(protocol.limits)
        evaluation.params.use_cats = protocol.by_class
        if protocol.sigmas:
            evaluation.params.kpt_oks_sigmas = list(protocol.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
    except (ValueError, KeyError, RuntimeError) as error:
        raise DatasetError(
            f"cannot evaluate against {quoted(truth.file)}: {quoted(error)}"
        ) from error
    return evaluation


def by_pycocotools(
    truth: GroundTruth, detections: Detections, protocol: Protocol = Protocol()
) -> Accumulated:
    """Evaluate by pycocotools; 500,000 detections take about half a minute."""
    _check_kind(truth, detections, protocol)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        annotations = COCO()
        annotations.dataset = _document(truth, protocol.kind)
        annotations.createIndex()
        if len(detections):
            results = annotations.loadRes(_results(detections, protocol.kind))
        else:  # loadRes looks at the first detection
            results = COCO()
            results.dataset = {**annotations.dataset, "annotations": []}
            results.createIndex()
        evaluation = COCOeval(annotations, results, protocol.kind)
        evaluation.params.maxDets = list(protocol.limits)
        evaluation.params.useCats = int(protocol.by_class)
        if protocol.sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(protocol.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
    return _accumulated(evaluation, protocol)


def _accumulated(evaluation: Any, protocol: Protocol) -> Accumulated:
    """Return the result of either engine's evaluation."""
    summary = []
    if protocol.figures:
        with contextlib.redirect_stdout(io.StringIO()):  # both print a table
            evaluation.summarize()
        summary = list(evaluation.stats)
    arrays = evaluation.eval
    return Accumulated(
        np.asarray(arrays["precision"]), np.asarray(arrays["recall"]), tuple(map(float, summary))
    )


def _document(truth: GroundTruth, kind: str, *, with_annotations: bool = True) -> dict[str, Any]:
    """Return the ground truth in COCO's format, annotations numbered from 1."""
    images = zip(truth.image_ids.tolist(), truth.sizes.astype(int).tolist())
    document: dict[str, Any] = {
        "images": [{"id": n, "width": width, "height": height} for n, (width, height) in images],
        "categories": [{"id": n, "name": name} for n, name in truth.categories.items()],
    }
    if not with_annotations:
        return document
    objects = truth.objects
    columns: dict[str, Any] = {
        "id": range(1, len(objects.areas) + 1),
        "image_id": objects.image_ids.tolist(),
        "category_id": objects.category_ids.tolist(),
        "bbox": objects.boxes.tolist(),
        "area": objects.areas.tolist(),
        "iscrowd": objects.crowds.astype(int).tolist(),
    }
    if kind == "segm":
        columns["segmentation"] = truth.masks
    if kind == "keypoints":
        columns["keypoints"] = truth.poses.reshape(len(truth.poses), -1).tolist()
        columns["num_keypoints"] = (truth.poses[:, :, 2] > 0).sum(axis=1).tolist()
    document["annotations"] = [dict(zip(columns, row)) for row in zip(*columns.values())]
    return document


def _results(detections: Detections, kind: str) -> Any:
    """Return the detections as both engines load them.

    As in Detectron2, the area of a mask is its own, and that of keypoints is their box's.
    """
    if kind == "bbox" or not len(detections):
        return detections.table
    unwanted = {"segm": ("bbox", "keypoints"), "keypoints": ("segmentation",)}[kind]
    return [
        {key: value for key, value in each.items() if key not in unwanted}
        for each in detections.results()
    ]


def _check_kind(truth: GroundTruth, detections: Detections, protocol: Protocol) -> None:
    """Refuse masks of another size than their image, and unequal numbers of keypoints."""
    if protocol.kind == "segm" and detections.segmentations is not None:
        sizes = truth.sizes[truth.positions(detections.image_ids)][:, ::-1].astype(int).tolist()
        for number, size, mask in zip(detections.image_ids, sizes, detections.segmentations):
            if mask["size"] != size:
                raise DatasetError(
                    f"a mask of image {number} has height and width {mask['size']}, and the image "
                    f"{size} in {quoted(truth.file)}. Resize the masks to their images."
                )
    if protocol.kind == "keypoints":
        count = truth.poses.shape[1]
        sigmas = len(protocol.sigmas) or COCO_KEYPOINTS
        poses = detections.keypoints
        given = count if poses is None or not len(poses) else poses.shape[1]
        if not count == sigmas == given:
            raise DatasetError(
                f"objects of {quoted(truth.file)} have {count} keypoints, detections {given}, and "
                f"there are {sigmas} sigmas (COCO's {COCO_KEYPOINTS} by default). Give one sigma "
                "per keypoint: TEST.KEYPOINT_OKS_SIGMAS, or --oks-sigmas of `evaluate`."
            )


def figures_of(found: Accumulated, truth: GroundTruth, protocol: Protocol = Protocol()) -> Figures:
    """Return COCO's figures in percent, overall and by class."""
    counted = ~truth.objects.crowds
    areas: tuple[str, ...] = _SIZES
    if protocol.kind == "keypoints":
        counted &= (truth.poses[:, :, 2] > 0).any(axis=1)
        areas = ("", "m", "l")  # COCO has no keypoints of small objects
    rows = []
    for position, (number, name) in enumerate(truth.categories.items()):
        precision = found.precision[:, :, position, :, -1]
        by_area = {f"AP{size}": _mean(precision[:, :, n]) for n, size in enumerate(areas)}
        rows.append(
            ClassFigures(
                name,
                **{"APs": None, **by_area},
                AP50=_mean(precision[0, :, 0]),
                AR=_mean(found.recall[:, position, 0, -1]),
                instances=int((truth.objects.category_ids[counted] == number).sum()),
            )
        )
    return Figures(dict(zip(protocol.figures, map(percent, found.summary))), tuple(rows))


def _mean(values: NDArray[np.float64]) -> float | None:
    valid = values[values > -1]
    return 100 * float(valid.mean()) if valid.size else None


def proposal_figures(
    truth: GroundTruth, proposals: Detections, engine: Engine = Engine()
) -> dict[str, float | None]:
    """Compute the average recall of the best 100, 300 and 1000 proposals per image.

    This follows COCO's protocol without classes: recall averaged over IoU 0.50 to 0.95. Detectron2
    instead matches each object with the proposal that overlaps it most, whatever its score; the
    figures differ only for objects that share a proposal. The proposals must all have the same
    category of the annotations.

    Returns:
        `PROPOSAL_FIGURES` in percent; None without objects.
    """
    protocol = Protocol(limits=LIMITS, by_class=False)
    found, _ = compute(truth, proposals, protocol, engine)
    recalls = found.recall[:, 0].transpose(2, 1, 0).reshape(len(PROPOSAL_FIGURES), -1)
    return dict(zip(PROPOSAL_FIGURES, map(_mean, recalls)))


def proposal_table(figures: dict[str, float | None]) -> str:
    """Return `PROPOSAL_FIGURES` as text for a terminal, one row per number of proposals."""
    rows = [[limit, *(shown(figures[f"AR{size}@{limit}"]) for size in _SIZES)] for limit in LIMITS]
    headers = ["proposals", "AR", "ARs", "ARm", "ARl"]
    return tabulate(rows, headers=headers, disable_numparse=True)
