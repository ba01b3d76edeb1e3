"""What others published for the same networks on COCO minival, and what differs from a run."""

from __future__ import annotations

import math

from resnext_det.modeling.template import Template
from resnext_det.published.rows import PAPER, ROWS, PublishedResult
from resnext_det.published.setting import (
    COCO_TRAIN_IMAGES,
    MINIVAL,
    TRAINVAL35K,
    Setting,
    setting_of,
)

__all__ = [
    "PAPER",
    "ROWS",
    "SHIPPED",
    "PublishedResult",
    "Setting",
    "published_results",
    "setting_of",
    "what_differs",
]

SHIPPED = Setting(
    detector="Faster R-CNN",
    neck="FPN",
    norm="FrozenBN",
    images=180_000 * 16,
    rate_falls=1,
    train_size=(640, 800),
    test_size=800,
    test_longest=1333,
    train_set=TRAINVAL35K,
    test_set=MINIVAL,
)
"""Of the configs that are shipped as faster_rcnn_*_FPN_paper."""

# 12 epochs and 12.17 are one schedule in two notations.
_SAME_LENGTH = 0.05


def published_results(
    depth: int, template: Template | str, setting: Setting = SHIPPED
) -> tuple[PublishedResult, ...]:
    """Return what is published for a network: the paper first, then the nearest in setting.

    Args:
        depth: such as 50.
        template: such as "32x4d"; a ResNet is "1x64d".
        setting: to be near to: the same neck and norm, then the length of the schedule, then sizes.

    Returns:
        The rows; none for a network that nobody published.
    """
    return tuple(
        sorted(
            (row for row in ROWS if (row.depth, row.template) == (depth, str(template))),
            key=lambda row: (row.who != PAPER, *_distance(row.setting, setting)),
        )
    )


def what_differs(row: PublishedResult, setting: Setting) -> str:
    """Return in one line what a published result has otherwise than a run.

    What either side does not tell is passed over, but for the row's own words about it.

    Args:
        row: what is published.
        setting: the run's, see `setting_of`.
    """
    parts = [*_apart(row.setting, setting), *row.differences]
    if row.weights:
        parts.append(f"from {row.weights}")
    return "; ".join(parts) or "nothing in what is compared"


def _distance(row: Setting, run: Setting) -> tuple[bool, bool, float, bool, bool]:
    theirs, ours = row.images or 0, run.images or 0
    return (
        _unlike(row.neck, run.neck),
        _unlike(row.norm, run.norm),
        round(abs(math.log(theirs / ours)), 1) if min(theirs, ours) > 0 else 0.0,
        _unlike(row.train_size, run.train_size),
        _unlike(row.rate_falls, run.rate_falls),
    )


def _unlike(one: object, other: object) -> bool:
    return one is not None and other is not None and one != other


def _apart(row: Setting, run: Setting) -> list[str]:
    parts = []
    if _unlike(row.test_set, run.test_set):
        parts.append(f"evaluated on {row.test_set}, not {run.test_set}")
    if _unlike(row.train_set, run.train_set):
        parts.append(f"trained on {row.train_set}, not {run.train_set}")
    for theirs, ours in ((row.detector, run.detector), (row.neck, run.neck)):
        if _unlike(theirs, ours):
            parts.append(f"{theirs}, not {ours}")
    if _unlike(row.norm, run.norm):
        parts.append(f"norm {row.norm}, not {run.norm}")
    return [*parts, *_apart_in_schedule(row, run), *_apart_in_sizes(row, run)]


def _apart_in_schedule(row: Setting, run: Setting) -> list[str]:
    parts = []
    long, short = max(row.images or 0, run.images or 0), min(row.images or 0, run.images or 0)
    if short > 0 and long > (1 + _SAME_LENGTH) * short:
        of_coco = "" if run.train_set == TRAINVAL35K else f" (of {COCO_TRAIN_IMAGES:,} images)"
        parts.append(f"{row.epochs:.1f} epochs, not {run.epochs:.1f}{of_coco}")
    if row.rate_falls is not None and _unlike(row.rate_falls, run.rate_falls):
        drops = "rate drop" if row.rate_falls == 1 else "rate drops"
        parts.append(f"{row.rate_falls} {drops}, not {run.rate_falls}")
    return parts


def _apart_in_sizes(row: Setting, run: Setting) -> list[str]:
    parts = []
    if row.train_size and run.train_size and row.train_size != run.train_size:
        parts.append(f"trained at {_range(row.train_size)}, not {_range(run.train_size)}")
    theirs, ours = (row.test_size, row.test_longest), (run.test_size, run.test_longest)
    if None not in (*theirs, *ours) and theirs != ours:
        parts.append("tested at {}, at most {}, not {}, at most {}".format(*theirs, *ours))
    return parts


def _range(sizes: tuple[int, int]) -> str:
    low, high = sizes
    return str(low) if low == high else f"{low} to {high}"
