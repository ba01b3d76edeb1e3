"""Predictions: resumed bit for bit after a kill, each image once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from resnext_det.errors import EvaluationError
from resnext_det.evaluation.predictions import Found, Predictions, found_in

CATEGORIES = {0: 7, 1: 9}
SAME, OTHER = "a" * 64, "b" * 64
NUMBERS = {image: 10 + position for position, image in enumerate((5, "d.jpg", 3, 1))}


def found(*scores: float, kind: int = 0, of_proposals: bool = False) -> Found:
    """Return rows of 32-bit numbers, as from a network, which the files must store exactly."""
    boxes = np.random.default_rng(int(100 * sum(scores))).random((len(scores), 4))
    table = np.column_stack([boxes, scores, np.full(len(scores), kind)])
    rows = table.astype(np.float32).astype(np.float64)
    return Found(rows, of_proposals=of_proposals)


MASKS = [{"size": [4, 5], "counts": "<4>6"}, {"size": [4, 5], "counts": "7\\d"}]
POSES = np.random.default_rng(0).random((2, 3, 3)).astype(np.float32).astype(np.float64)
ROWS = {
    3: Found(found(0.9, 0.3, kind=1).rows, MASKS, POSES),
    "d.jpg": Found(found().rows, [], np.zeros((0, 3, 3))),
    5: Found(found(0.4).rows, MASKS[:1], POSES[:1]),
    1: Found(found().rows, [], np.zeros((0, 3, 3))),
}


def left_by_a_kill(folder: Path, identity: str = SAME) -> Path:
    """Write two images and half a third, like a process killed while writing."""
    predictions = Predictions()
    assert not predictions.keep_in(folder, "kept", identity)
    for image in (3, "d.jpg", 5):
        predictions.add(image, ROWS[image])
    (file,) = folder.glob("kept.*.partial/*.jsonl")
    file.write_text(file.read_text()[:-9])
    return file


def test_resumes_exactly(tmp_path: Path) -> None:
    left_by_a_kill(tmp_path)
    again = Predictions()
    assert again.keep_in(tmp_path, "kept", SAME) == {3, "d.jpg"}
    again.add(5, ROWS[5])
    third = Predictions()  # after a second kill
    assert third.keep_in(tmp_path, "kept", SAME) == {3, "d.jpg", 5}
    third.add(1, ROWS[1])
    detections = third.gather(NUMBERS, CATEGORIES)
    whole = Predictions()
    for image in (1, 3, 5, "d.jpg"):
        whole.add(image, ROWS[image])
        whole.add(image, found(0.75, 0.25))  # ignored
    expected = whole.gather(NUMBERS, CATEGORIES)
    assert detections is not None
    assert expected is not None
    assert np.array_equal(detections.table, expected.table)
    assert detections.image_ids.tolist() == [10, 12, 12]
    assert detections.category_ids.tolist() == [7, 9, 9]
    assert detections.kinds == ("bbox", "segm", "keypoints")
    assert detections.segmentations is not None
    assert detections.segmentations.tolist() == [MASKS[0], *MASKS]
    assert np.array_equal(detections.keypoints, np.concatenate([POSES[:1], POSES]))
    third.forget()
    assert not list(tmp_path.iterdir())


def test_removes_predictions_of_other_weights(tmp_path: Path) -> None:
    file = left_by_a_kill(tmp_path, OTHER)
    (tmp_path / "kept2.0.partial").mkdir()  # of another data set
    assert not Predictions().keep_in(tmp_path, "kept", SAME)
    assert not file.parent.exists()
    assert (tmp_path / "kept2.0.partial").exists()


@pytest.mark.parametrize(
    "line",
    [
        *("", "[", "{}", "[1]", "[1, 7]", "null", "[" * 9999),
        "[1, [[1, 2, 3, 4, 0.5]], false, null, null]",
        "[1, [], false, [1], null]",
    ],
)
def test_skips_damaged_lines(tmp_path: Path, line: str) -> None:
    file = left_by_a_kill(tmp_path)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, lines[1]]))
    assert Predictions().keep_in(tmp_path, "kept", SAME) == {3, "d.jpg"}


def test_refuses_missing_and_unknown_images_and_classes() -> None:
    predictions = Predictions()
    predictions.add(1, found(0.9, kind=1))
    with pytest.raises(EvaluationError, match=r"1 of 2 images were not predicted, such as \[2\]"):
        predictions.gather({1: 1, 2: 2}, CATEGORIES)
    with pytest.raises(EvaluationError, match=r"1 predicted images are not in the .* \[1\]"):
        predictions.gather({}, CATEGORIES)
    with pytest.raises(EvaluationError, match=r"finds class 1, and the data set has 1 classes"):
        predictions.gather({1: 1}, {0: 7})


def test_converts_outputs_of_detectron2(tmp_path: Path) -> None:
    boxes = Boxes(torch.tensor([[1.0, 2, 11, 22], [0, 0, 5, 5]]))
    instances = Instances((50, 50))
    instances.pred_boxes, instances.scores = boxes, torch.tensor([0.5, 0.25])
    instances.pred_classes = torch.tensor([3, 1])
    rows = found_in({"instances": instances}).rows
    assert rows.tolist() == [[1, 2, 10, 20, 0.5, 3], [0, 0, 5, 5, 0.25, 1]]
    assert found_in({"instances": instances[:0]}).rows.shape == (0, 6)
    proposals = Instances((50, 50))
    proposals.proposal_boxes, proposals.objectness_logits = boxes, torch.tensor([2.0, -1.0])
    found = found_in({"proposals": proposals})
    assert found.rows.tolist() == [[1, 2, 10, 20, 2, 0], [0, 0, 5, 5, -1, 0]]
    first, again = Predictions(), Predictions()
    first.keep_in(tmp_path, "kept", SAME)
    first.add(1, found)
    again.keep_in(tmp_path, "kept", SAME)
    assert again.of_proposals
    with pytest.raises(EvaluationError, match="the model returns sem_seg"):
        found_in({"sem_seg": torch.zeros(3, 4, 4)})
