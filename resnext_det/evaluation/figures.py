"""COCO's figures, overall and by class, and the average recall of proposals."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from resnext_det.errors import plain
from resnext_det.evaluation.annotations import GroundTruth
from resnext_det.evaluation.coco import Accumulated, Protocol, compute
from resnext_det.evaluation.detections import Detections

_LAST = -1  # of the limits: 100 detections, 20 of keypoints
_AREAS = {"bbox": ("", "s", "m", "l"), "segm": ("", "s", "m", "l"), "keypoints": ("", "m", "l")}

LIMITS = (100, 300, 1000)
PROTOCOL = Protocol(LIMITS, by_class=False)
_SIZES = ("", "s", "m", "l")
PROPOSAL_FIGURES = tuple(f"AR{size}@{limit}" for limit in LIMITS for size in _SIZES)


@dataclass(frozen=True)
class ClassFigures:
    """What one class reached; figures are in percent, None without any object to find.

    Attributes:
        name: of the class.
        AP: averaged over IoU 0.50 to 0.95.
        AP50: at IoU 0.50.
        APs: AP of objects below 32 x 32 pixels; None for keypoints, as COCO ignores those.
        APm: of those up to 96 x 96.
        APl: of larger ones.
        AR: the greatest recall with 100 detections per image (20 for keypoints), averaged over
            IoU 0.50 to 0.95.
        instances: objects of the class in the annotations, crowds not counted, and for keypoints
            only those with any.
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
    """COCO's figures by name, in percent (None where there is nothing to find), and by class.

    Attributes:
        figures: the 12 of boxes or masks, or the 10 of keypoints.
        per_class: one entry for every class.
    """

    figures: dict[str, float | None]
    per_class: tuple[ClassFigures, ...]

    def table(self) -> str:
        """Return the figures and the classes as text for a terminal."""
        names = list(self.figures)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        upper = "\n\n".join(
            tabulate([[shown(self.figures[name]) for name in half]], headers=half)
            for half in halves
        )
        keys = list(asdict(self.per_class[0]))
        rows = [
            [
                plain(entry.name),
                *(shown(getattr(entry, key)) for key in keys[1:-1]),
                entry.instances,
            ]
            for entry in self.per_class
        ]
        return f"{upper}\n\n{tabulate(rows, headers=['class', *keys[1:]], disable_numparse=True)}"

    def flat(self) -> dict[str, float]:
        """Return all by name, classes as AP-NAME, NaN for None, as Detectron2's evaluator does."""
        values = self.figures | {f"AP-{row.name}": row.AP for row in self.per_class}
        return {name: float("nan") if v is None else v for name, v in values.items()}

    def document(self) -> dict[str, Any]:
        """Return the figures as metrics.json holds them."""
        return {"figures": self.figures, "per_class": [asdict(row) for row in self.per_class]}


def shown(value: float | None) -> str:
    """Return a percentage for a table: two digits, or a dash for None."""
    return "-" if value is None else f"{value:.2f}"


def figures_of(found: Accumulated, truth: GroundTruth, protocol: Protocol = Protocol()) -> Figures:
    """Return the figures of an evaluation.

    Args:
        found: what an engine accumulated.
        truth: the annotations.
        protocol: that was computed.
    """
    figures = dict(zip(protocol.figures, map(percent, found.summary)))
    objects = truth.objects
    counted = ~objects.crowds
    if protocol.kind == "keypoints":
        counted &= (truth.poses[:, :, 2] > 0).any(axis=1)
    areas = _AREAS[protocol.kind]
    rows = []
    for position, (number, name) in enumerate(truth.categories.items()):
        precision = found.precision[:, :, position, :, _LAST]
        by_area = {size: mean_percent(precision[:, :, place]) for place, size in enumerate(areas)}
        instances = (objects.category_ids == number) & counted
        rows.append(
            ClassFigures(
                name,
                AP=by_area[""],
                AP50=mean_percent(precision[0, :, 0]),
                APs=by_area.get("s"),
                APm=by_area["m"],
                APl=by_area["l"],
                AR=mean_percent(found.recall[:, position, 0, _LAST]),
                instances=int(instances.sum()),
            )
        )
    return Figures(figures, tuple(rows))


def percent(value: float) -> float | None:
    """Return a share in percent; None for -1, COCO's value without any object to find."""
    return None if value < 0 else 100 * float(value)


def mean_percent(values: NDArray[np.float64]) -> float | None:
    """Return the mean in percent of what is not -1, and None where all is."""
    valid = values[values > -1]
    return 100 * float(valid.mean()) if valid.size else None


def proposal_figures(
    truth: GroundTruth, proposals: Detections, *, engine: str = "hotcoco", cross_check: bool = False
) -> dict[str, float | None]:
    """Compute the average recall of the best 100, 300 and 1000 proposals per image.

    The protocol is COCO's, classes left out: recall averaged over IoU 0.50 to 0.95. Detectron2's
    own evaluator matches every object with the proposal that overlaps it most instead, whatever
    its score, which gives the same, except for objects that share a proposal.

    Args:
        truth: the annotations.
        proposals: their categories do not count.
        engine: a key of `coco.ENGINES`.
        cross_check: compute by both engines.

    Returns:
        "AR@100", "ARs@100", "ARm@100", "ARl@100" and so on, in percent; None without any object.

    Raises:
        EvaluationError: `cross_check`, and the engines differ.
    """
    ordered = proposals.in_order(truth.image_ids)
    # pycocotools leaves out detections of classes that are not there, even without classes.
    only = np.full(len(ordered), next(iter(truth.categories)), np.int64)
    ordered = Detections(ordered.image_ids, only, ordered.boxes, ordered.scores)
    found = compute(truth, ordered, PROTOCOL, engine=engine, cross_check=cross_check)
    places = itertools.product(range(len(LIMITS)), range(len(_SIZES)))
    return {
        name: mean_percent(found.recall[:, 0, area, position])
        for name, (position, area) in zip(PROPOSAL_FIGURES, places)
    }


def proposal_table(figures: dict[str, float | None]) -> str:
    """Return the figures as text for a terminal, a row for each number of proposals."""
    rows = [[limit, *(shown(figures[f"AR{size}@{limit}"]) for size in _SIZES)] for limit in LIMITS]
    headers = ["proposals", "AR", "ARs", "ARm", "ARl"]
    return tabulate(rows, headers=headers, disable_numparse=True)
