"""Average recall of proposals, which have a score but no class."""

from __future__ import annotations

import itertools

import numpy as np
from tabulate import tabulate

from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.engines import Protocol, compute
from resnext_det.evaluation.figures import mean_percent, shown
from resnext_det.evaluation.truth import Truth

LIMITS = (100, 300, 1000)
PROTOCOL = Protocol(LIMITS, by_class=False)
_SIZES = ("", "s", "m", "l")
PROPOSAL_FIGURES = tuple(f"AR{size}@{limit}" for limit in LIMITS for size in _SIZES)


def proposal_figures(
    truth: Truth, proposals: Detections, *, engine: str = "hotcoco", cross_check: bool = False
) -> dict[str, float | None]:
    """Compute the average recall of the best 100, 300 and 1000 proposals per image.

    The protocol is COCO's, classes left out: recall averaged over IoU 0.50 to 0.95. Detectron2's
    own evaluator matches every object with the proposal that overlaps it most instead, whatever
    its score, which gives the same but for objects that share a proposal.

    Args:
        truth: the annotations.
        proposals: their categories do not count.
        engine: a key of `engines.ENGINES`.
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
