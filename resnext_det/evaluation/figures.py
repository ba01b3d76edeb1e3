"""COCO's 12 figures of detected boxes, and the same for every class."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from resnext_det.evaluation.engines import FIGURES, Accumulated
from resnext_det.evaluation.truth import Truth

_LAST = -1  # of the limits: 100 detections
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # of the areas


@dataclass(frozen=True)
class ClassFigures:
    """What one class reached; figures are in percent, None without any object to find.

    Attributes:
        name: of the class.
        AP: averaged over IoU 0.50 to 0.95.
        AP50: at IoU 0.50.
        APs: AP of objects below 32 x 32 pixels.
        APm: of those up to 96 x 96.
        APl: of larger ones.
        AR: the greatest recall with 100 detections per image, averaged over IoU 0.50 to 0.95.
        instances: objects of the class in the annotations, crowds not counted.
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
class BoxFigures:
    """COCO's 12 figures by name, in percent (None where there is nothing to find), and by class."""

    figures: dict[str, float | None]
    per_class: tuple[ClassFigures, ...]

    def table(self) -> str:
        """Return the figures and the classes as text for a terminal."""
        halves = FIGURES[:6], FIGURES[6:]
        upper = "\n\n".join(
            tabulate([[shown(self.figures[name]) for name in names]], headers=names)
            for names in halves
        )
        keys = list(asdict(self.per_class[0]))
        rows = [
            [entry.name, *(shown(getattr(entry, key)) for key in keys[1:-1]), entry.instances]
            for entry in self.per_class
        ]
        return f"{upper}\n\n{tabulate(rows, headers=['class', *keys[1:]], disable_numparse=True)}"

    def flat(self) -> dict[str, float]:
        """Return all by name, classes as AP-NAME, NaN for None, as Detectron2's evaluator does."""
        values = self.figures | {f"AP-{row.name}": row.AP for row in self.per_class}
        return {name: float("nan") if v is None else v for name, v in values.items()}

    def document(self) -> dict[str, Any]:
        """Return what stands in metrics.json."""
        return {"figures": self.figures, "per_class": [asdict(row) for row in self.per_class]}


def shown(value: float | None) -> str:
    """Return a percentage for a table: two digits, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


def figures_of(found: Accumulated, truth: Truth) -> BoxFigures:
    """Return the figures of an evaluation.

    Args:
        found: what an engine accumulated.
        truth: the annotations.
    """
    figures = dict(zip(FIGURES, map(percent, found.summary)))
    objects = truth.objects
    rows = []
    for position, (number, name) in enumerate(truth.categories.items()):
        precision = found.precision[:, :, position, :, _LAST]
        instances = (objects.category_ids == number) & ~objects.crowds
        rows.append(
            ClassFigures(
                name,
                AP=mean_percent(precision[:, :, _ALL]),
                AP50=mean_percent(precision[0, :, _ALL]),
                APs=mean_percent(precision[:, :, _SMALL]),
                APm=mean_percent(precision[:, :, _MEDIUM]),
                APl=mean_percent(precision[:, :, _LARGE]),
                AR=mean_percent(found.recall[:, position, _ALL, _LAST]),
                instances=int(instances.sum()),
            )
        )
    return BoxFigures(figures, tuple(rows))


def percent(value: float) -> float | None:
    """Return a share in percent; None for the -1 that stands where there is nothing to find."""
    return None if value < 0 else 100 * float(value)


def mean_percent(values: NDArray[np.float64]) -> float | None:
    """Return the mean in percent of what is not -1, and None where all is."""
    valid = values[values > -1]
    return 100 * float(valid.mean()) if valid.size else None
