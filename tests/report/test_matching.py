"""Matching: what is right and wrong, at every score and in every class at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnext_det.report.matching import Labelled, compare

TRUE = Labelled((10, 10, 40, 40), category=1)


def test_a_perfect_image_scores_one_and_an_empty_one_too() -> None:
    assert compare([TRUE], [TRUE]).score == 1
    assert compare([], []).score == 1


def test_missed_and_false_boxes_halve_the_score() -> None:
    other = replace(TRUE, category=2)
    outcome = compare([TRUE, other], [TRUE])
    assert (outcome.found, outcome.right) == ([True, False], [True])
    assert outcome.score == pytest.approx(1 / 1.5)
    outcome = compare([TRUE], [TRUE, TRUE])
    assert (outcome.found, outcome.right) == ([True], [True, False])
    assert outcome.score == pytest.approx(1 / 1.5)
    assert compare([TRUE], [other]).score == 0


def test_a_match_needs_half_of_the_union() -> None:
    shifted = replace(TRUE, xywh=(20, 10, 40, 40))
    assert compare([TRUE], [shifted]).score == pytest.approx(0.6)
    further = replace(TRUE, xywh=(24, 10, 40, 40))
    assert compare([TRUE], [further]).right == [False]


def test_the_nearest_free_box_is_taken() -> None:
    near, far = replace(TRUE, xywh=(12, 10, 40, 40)), replace(TRUE, xywh=(16, 10, 40, 40))
    assert compare([far, near], [TRUE]).found == [False, True]
    assert compare([far, near], [TRUE, TRUE]).found == [True, True]


def test_crowds_are_neither_found_nor_missed() -> None:
    crowd = replace(TRUE, xywh=(0, 0, 200, 200), crowd=True)
    outcome = compare([crowd], [TRUE])
    assert (outcome.found, outcome.right, outcome.score) == ([None], [None], 1)
    assert compare([crowd], [replace(TRUE, category=2)]).right == [False]


def test_a_false_box_on_an_object_of_another_class_is_confused() -> None:
    other = replace(TRUE, category=2)
    assert compare([TRUE], [other]).instead_of == (0,)
    assert compare([TRUE], [replace(other, xywh=(30, 10, 40, 40))]).instead_of == (None,)
    # A right one is not confused, nor is a second one, nor one on a crowd.
    assert compare([TRUE, other], [other]).confused == 0
    assert compare([TRUE], [TRUE, TRUE]).confused == 0
    assert compare([replace(TRUE, crowd=True)], [other]).confused == 0
    # Where several are there, the one that is overlapped most tells the class.
    near = replace(TRUE, xywh=(11, 10, 40, 40), category=3)
    assert compare([TRUE, near], [replace(near, category=2)]).instead_of == (1,)


BOXES = st.builds(
    Labelled,
    xywh=st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 6)] * 2),
    category=st.integers(1, 2),
    score=st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]),
    crowd=st.booleans(),
)


@given(
    st.lists(BOXES, max_size=6),
    st.lists(BOXES, max_size=12),
    st.sampled_from([0.0, 0.3, 0.5, 0.95]),
    st.integers(1, 2),
)
def test_one_comparison_holds_at_every_score_and_in_every_class(
    truth: list[Labelled], predictions: list[Labelled], lowest: float, category: int
) -> None:
    predictions = sorted(predictions, key=lambda each: -each.score)
    whole = compare(truth, predictions)
    shown = [each for each in predictions if each.score >= lowest]
    part = compare(truth, shown)
    assert part.right == whole.right[: len(shown)]
    assert part.overlaps == whole.overlaps[: len(shown)]
    assert part.instead_of == whole.instead_of[: len(shown)]
    of_class = compare(
        [each for each in truth if each.category == category],
        [each for each in shown if each.category == category],
    )
    assert of_class.right == [
        right for right, each in zip(part.right, shown) if each.category == category
    ]
    assert of_class.found == [
        found for found, each in zip(part.found, truth) if each.category == category
    ]
