from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from resnext_det.errors import EvaluationError
from resnext_det.evaluation.predictions import Predictions, Rows, rows_of

CATEGORIES = {0: 7, 1: 9}


def found(*scores: float, kind: int = 0) -> Rows:
    # Such as a network gives them: 32 bits, which a text must hold to the last one.
    boxes = np.random.default_rng(int(100 * sum(scores))).random((len(scores), 4))
    table = np.column_stack([boxes, scores, np.full(len(scores), kind)])
    return table.astype(np.float32).astype(np.float64)


def left_by_a_kill(folder: Path, identity: str = "same") -> dict[int, Rows]:
    """Two images and half a third one, as a process leaves them that is killed as it writes."""
    rows = {3: found(0.9, 0.3, kind=1), 4: found(0.5), 5: found(0.4)}
    predictions = Predictions()
    assert not predictions.keep_in(folder, identity)
    for image, of_image in rows.items():
        predictions.add(image, of_image)
    (file,) = folder.glob("*.jsonl")
    file.write_text(file.read_text()[:-9])
    return rows


def test_one_that_was_killed_goes_on_with_the_same_to_the_last_bit(tmp_path: Path) -> None:
    rows = left_by_a_kill(tmp_path / "kept")
    again = Predictions()
    assert again.keep_in(tmp_path / "kept", "same") == {3, 4}
    again.add(5, rows[5])
    again.add(1, found())
    detections = again.gather([5, 4, 3, 1], CATEGORIES)
    whole = Predictions()
    for image in (1, 3, 5, 4):
        whole.add(image, rows.get(image, found()))
    expected = whole.gather([5, 4, 3, 1], CATEGORIES)
    assert detections is not None
    assert expected is not None
    assert np.array_equal(detections.table, expected.table)
    assert detections.image_ids.tolist() == [5, 4, 3, 3]
    assert detections.category_ids.tolist() == [7, 7, 9, 9]
    again.forget()
    assert not (tmp_path / "kept").exists()


def test_a_second_kill_loses_nothing_either(tmp_path: Path) -> None:
    rows = left_by_a_kill(tmp_path / "kept")
    second = Predictions()
    second.keep_in(tmp_path / "kept", "same")
    second.add(5, rows[5])
    third = Predictions()
    assert third.keep_in(tmp_path / "kept", "same") == {3, 4, 5}


def test_predictions_of_other_weights_are_not_taken(tmp_path: Path) -> None:
    left_by_a_kill(tmp_path / "kept", "other weights")
    assert not Predictions().keep_in(tmp_path / "kept", "same")
    assert len(list((tmp_path / "kept").glob("*.jsonl"))) == 1  # the new one


@pytest.mark.parametrize(
    "line",
    ["", "[", "{}", "[1]", "[1, [[1, 2, 3, 4, 0.5]]]", '["a", []]', "[1, 7]", "null", "[" * 9999],
)
def test_a_damaged_line_costs_its_image_alone(tmp_path: Path, line: str) -> None:
    left_by_a_kill(tmp_path / "kept")
    (file,) = (tmp_path / "kept").glob("*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, lines[1]]))
    assert Predictions().keep_in(tmp_path / "kept", "same") == {3, 4}
    (tmp_path / "kept" / "identity.json").write_text("{")
    assert not Predictions().keep_in(tmp_path / "kept", "same")


def test_an_image_that_comes_twice_counts_once() -> None:
    predictions = Predictions()
    predictions.add(1, found(0.5))
    predictions.add(1, found(0.75, 0.25))
    detections = predictions.gather([1], CATEGORIES)
    assert detections is not None
    assert detections.scores.tolist() == [0.5]


def test_lost_and_strange_images_are_errors() -> None:
    predictions = Predictions()
    predictions.add(1, found(0.9, kind=1))
    with pytest.raises(EvaluationError, match=r"1 of 2 images were not predicted, such as \[2\]"):
        predictions.gather([1, 2], CATEGORIES)
    with pytest.raises(EvaluationError, match=r"1 images were predicted that .* such as \[1\]"):
        predictions.gather([], CATEGORIES)
    with pytest.raises(EvaluationError, match=r"finds class 1, and the data set has 1 classes"):
        predictions.gather([1], {0: 7})


def test_what_detectron2s_models_give() -> None:
    boxes = Boxes(torch.tensor([[1.0, 2, 11, 22], [0, 0, 5, 5]]))
    instances = Instances((50, 50))
    instances.pred_boxes, instances.scores = boxes, torch.tensor([0.5, 0.25])
    instances.pred_classes = torch.tensor([3, 1])
    rows = rows_of({"instances": instances})
    assert rows.tolist() == [[1, 2, 10, 20, 0.5, 3], [0, 0, 5, 5, 0.25, 1]]
    proposals = Instances((50, 50))
    proposals.proposal_boxes, proposals.objectness_logits = boxes, torch.tensor([2.0, -1.0])
    rows = rows_of({"proposals": proposals})
    assert rows.tolist() == [[1, 2, 10, 20, 2, 0], [0, 0, 5, 5, -1, 0]]
    assert rows_of({"instances": instances[:0]}).shape == (0, 6)
