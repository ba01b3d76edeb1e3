"""How the predictions for one image agree with its true boxes, at every score at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MATCHED_FROM = 0.5


@dataclass(frozen=True)
class Labelled:
    """A box of a picture: xywh in pixels, the class; a score if predicted, or a crowd if true."""

    xywh: Sequence[float]
    category: int
    score: float = 1.0
    crowd: bool = False


@dataclass(frozen=True)
class Outcome:
    """How the predictions for one image agree with the truth.

    Attributes:
        matches: for each prediction the true box that it finds; None where it finds none.
        overlaps: with that box, 0 to 1; 0.0 without one.
        in_crowd: for each prediction whether it finds no box and lies in a crowd of its class.
        instead_of: for each prediction that is false the true box of another class on which it
            sits; None where it sits on none.
        crowds: for each true box whether it is a crowd.
    """

    matches: tuple[int | None, ...]
    overlaps: tuple[float, ...]
    in_crowd: tuple[bool, ...]
    instead_of: tuple[int | None, ...]
    crowds: tuple[bool, ...]

    @property
    def right(self) -> list[bool | None]:
        """For each prediction whether it finds a box; None where it lies in a crowd."""
        return [
            None if crowd else match is not None
            for match, crowd in zip(self.matches, self.in_crowd)
        ]

    @property
    def found(self) -> list[bool | None]:
        """For each true box whether a prediction finds it; None for crowds."""
        found = set(self.matches)
        return [None if crowd else index in found for index, crowd in enumerate(self.crowds)]

    @property
    def score(self) -> float:
        """How good the predictions are, 0 to 1, see `compare`; 1 where nothing is to compare."""
        right, found = self.right, self.found
        total = right.count(True) + (right.count(False) + found.count(False)) / 2
        return sum(self.overlaps) / total if total else 1.0

    @property
    def confused(self) -> int:
        """False predictions that sit on an object of another class."""
        return len(self.instead_of) - self.instead_of.count(None)


def compare(truth: Sequence[Labelled], predictions: Sequence[Labelled]) -> Outcome:
    """Match the predictions for one image with its true boxes.

    From the surest on, a prediction takes the true box of its class that it overlaps most, if
    the intersection over union is MATCHED_FROM or more and the box is still free. Predictions
    that lie in a crowd of their class by half do not count. The score of the image is

        sum of the matched overlaps / (matched + false / 2 + missed / 2),

    the "panoptic quality" of Kirillov et al. for boxes: 1 if every object is found exactly and
    nothing else is, 0 if nothing is found.

    What a prediction takes depends on the surer ones and on its own class alone. So leaving out
    those below any score, or of other classes, changes nothing for those that stay: one comparison
    holds for every position of the gallery's slider, and for each of its classes.

    Args:
        truth: the true boxes.
        predictions: the predicted boxes, surest first.
    """
    free = [not entry.crowd for entry in truth]
    matches: list[int | None] = []
    overlaps, in_crowd = [], []
    instead_of: list[int | None] = []
    for prediction in predictions:
        match, overlap, crowd = _match(truth, free, prediction)
        if match is not None:
            free[match] = False
        matches.append(match)
        overlaps.append(overlap)
        in_crowd.append(crowd)
        false = match is None and not crowd
        instead_of.append(_other_class(truth, prediction) if false else None)
    crowds = tuple(entry.crowd for entry in truth)
    return Outcome(tuple(matches), tuple(overlaps), tuple(in_crowd), tuple(instead_of), crowds)


def _match(
    truth: Sequence[Labelled], free: Sequence[bool], prediction: Labelled
) -> tuple[int | None, float, bool]:
    """Return the free true box that a prediction takes, their overlap, or else if it is a crowd."""
    best, best_overlap, in_crowd = None, MATCHED_FROM, False
    for index, entry in enumerate(truth):
        if entry.category != prediction.category:
            continue
        if entry.crowd:
            shared = _intersection(entry.xywh, prediction.xywh)
            in_crowd = in_crowd or shared >= MATCHED_FROM * _area(prediction.xywh) > 0
        elif free[index] and (overlap := _overlap(entry.xywh, prediction.xywh)) >= best_overlap:
            best, best_overlap = index, overlap
    return (None, 0.0, in_crowd) if best is None else (best, best_overlap, False)


def _other_class(truth: Sequence[Labelled], prediction: Labelled) -> int | None:
    """Return the object on which a prediction sits where that is of another class.

    One that sits best on an object of its own class, which was found already, is no confusion.
    """
    overlaps = [0.0 if entry.crowd else _overlap(entry.xywh, prediction.xywh) for entry in truth]
    best = max(range(len(truth)), key=overlaps.__getitem__, default=None)
    if best is None or overlaps[best] < MATCHED_FROM:
        return None
    return None if truth[best].category == prediction.category else best


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the intersection over union of two boxes, 0 to 1."""
    intersection = _intersection(one, other)
    union = _area(one) + _area(other) - intersection
    return intersection / union if union > 0 else 0.0


def _area(xywh: Sequence[float]) -> float:
    return max(xywh[2], 0.0) * max(xywh[3], 0.0)


def _intersection(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0
