from __future__ import annotations

import logging
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from resnext_det.errors import EvaluationError
from resnext_det.evaluation.predictions import Found, Predictions, found_in

CATEGORIES = {0: 7, 1: 9}
SAME, OTHER = "a" * 64, "b" * 64


def found(*scores: float, kind: int = 0, of_proposals: bool = False) -> Found:
    # Such as a network gives them: 32 bits, which a text must hold to the last one.
    boxes = np.random.default_rng(int(100 * sum(scores))).random((len(scores), 4))
    table = np.column_stack([boxes, scores, np.full(len(scores), kind)])
    rows = table.astype(np.float32).astype(np.float64)
    return Found(rows, of_proposals=of_proposals)


def numbered(*images: int | str) -> dict[int | str, int]:
    return {image: 10 + position for position, image in enumerate(images)}


def left_by_a_kill(folder: Path, identity: str = SAME) -> dict[int, Found]:
    """Two images and half a third one, as a process leaves them that is killed as it writes."""
    rows = {3: found(0.9, 0.3, kind=1), 4: found(0.5), 5: found(0.4)}
    predictions = Predictions()
    assert not predictions.keep_in(folder, "kept", identity)
    for image, of_image in rows.items():
        predictions.add(image, of_image)
    (file,) = folder.glob("kept.*.partial/*.jsonl")
    file.write_text(file.read_text()[:-9])
    return rows


def test_one_that_was_killed_goes_on_with_the_same_to_the_last_bit(tmp_path: Path) -> None:
    rows = left_by_a_kill(tmp_path)
    again = Predictions()
    assert again.keep_in(tmp_path, "kept", SAME) == {3, 4}
    again.add(5, rows[5])
    again.add(1, found())
    detections = again.gather(numbered(5, 4, 3, 1), CATEGORIES)
    whole = Predictions()
    for image in (1, 3, 5, 4):
        whole.add(image, rows.get(image, found()))
    expected = whole.gather(numbered(5, 4, 3, 1), CATEGORIES)
    assert detections is not None
    assert expected is not None
    assert np.array_equal(detections.table, expected.table)
    assert detections.image_ids.tolist() == [10, 11, 12, 12]
    assert detections.category_ids.tolist() == [7, 7, 9, 9]
    again.forget()
    assert not list(tmp_path.iterdir())


def test_a_second_kill_loses_nothing_either(tmp_path: Path) -> None:
    rows = left_by_a_kill(tmp_path)
    second = Predictions()
    second.keep_in(tmp_path, "kept", SAME)
    second.add(5, rows[5])
    third = Predictions()
    assert third.keep_in(tmp_path, "kept", SAME) == {3, 4, 5}


def test_predictions_of_other_weights_are_not_taken(tmp_path: Path) -> None:
    left_by_a_kill(tmp_path, OTHER)
    assert not Predictions().keep_in(tmp_path, "kept", SAME)
    # Those of the other may be of an evaluation that runs at the same time.
    assert Predictions().keep_in(tmp_path, "kept", OTHER) == {3, 4}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[",
        "{}",
        "[1]",
        "[1, [[1, 2, 3, 4, 0.5]], false, null, null]",
        "[1, [], false, [1], null]",
        "[1, 7]",
        "null",
        "[" * 9999,
    ],
)
def test_a_damaged_line_costs_its_image_alone(tmp_path: Path, line: str) -> None:
    left_by_a_kill(tmp_path)
    (file,) = tmp_path.glob("kept.*.partial/*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, lines[1]]))
    assert Predictions().keep_in(tmp_path, "kept", SAME) == {3, 4}


def test_an_image_that_comes_twice_counts_once() -> None:
    predictions = Predictions()
    predictions.add(1, found(0.5))
    predictions.add(1, found(0.75, 0.25))
    detections = predictions.gather(numbered(1), CATEGORIES)
    assert detections is not None
    assert detections.scores.tolist() == [0.5]


def test_lost_and_strange_images_are_errors() -> None:
    predictions = Predictions()
    predictions.add(1, found(0.9, kind=1))
    with pytest.raises(EvaluationError, match=r"1 of 2 images were not predicted, such as \[2\]"):
        predictions.gather(numbered(1, 2), CATEGORIES)
    with pytest.raises(EvaluationError, match=r"1 images were predicted that .* such as \[1\]"):
        predictions.gather(numbered(), CATEGORIES)
    with pytest.raises(EvaluationError, match=r"finds class 1, and the data set has 1 classes"):
        predictions.gather(numbered(1), {0: 7})


def test_masks_keypoints_and_text_ids_survive_a_kill(tmp_path: Path) -> None:
    masks = [{"size": [4, 5], "counts": "<4>6"}, {"size": [4, 5], "counts": "7\\d"}]
    poses = np.random.default_rng(0).random((2, 3, 3)).astype(np.float32).astype(np.float64)
    whole = {
        "b.jpg": Found(found(0.5, 0.25).rows, masks, poses),
        "a.jpg": Found(np.zeros((0, 6)), [], np.zeros((0, 3, 3))),
    }
    first = Predictions()
    first.keep_in(tmp_path, "kept", SAME)
    for image, of_image in whole.items():
        first.add(image, of_image)
    again = Predictions()
    assert again.keep_in(tmp_path, "kept", SAME) == {"a.jpg", "b.jpg"}
    detections = again.gather(numbered("a.jpg", "b.jpg"), CATEGORIES)
    assert detections is not None
    assert detections.kinds == ("bbox", "segm", "keypoints")
    assert detections.image_ids.tolist() == [11, 11]
    assert detections.segmentations is not None
    assert detections.segmentations.tolist() == masks
    assert np.array_equal(detections.keypoints, poses)


def test_a_model_without_instances_cannot_be_evaluated() -> None:
    with pytest.raises(EvaluationError, match="the model gives sem_seg for an image"):
        found_in({"sem_seg": torch.zeros(3, 4, 4)})


def test_what_detectron2s_models_give() -> None:
    boxes = Boxes(torch.tensor([[1.0, 2, 11, 22], [0, 0, 5, 5]]))
    instances = Instances((50, 50))
    instances.pred_boxes, instances.scores = boxes, torch.tensor([0.5, 0.25])
    instances.pred_classes = torch.tensor([3, 1])
    found = found_in({"instances": instances})
    assert found.rows.tolist() == [[1, 2, 10, 20, 0.5, 3], [0, 0, 5, 5, 0.25, 1]]
    proposals = Instances((50, 50))
    proposals.proposal_boxes, proposals.objectness_logits = boxes, torch.tensor([2.0, -1.0])
    found = found_in({"proposals": proposals})
    assert found.of_proposals
    assert found.rows.tolist() == [[1, 2, 10, 20, 2, 0], [0, 0, 5, 5, -1, 0]]
    assert found_in({"instances": instances[:0]}).rows.shape == (0, 6)


def test_what_nobody_will_go_on_with_is_removed(tmp_path: Path) -> None:
    left_by_a_kill(tmp_path, OTHER)
    (folder,) = tmp_path.iterdir()
    week_ago = time.time() - 7 * 24 * 3600
    for path in (*folder.iterdir(), folder):
        os.utime(path, (week_ago, week_ago))
    other_name = tmp_path / "kept2.0.partial"
    other_name.mkdir()
    os.utime(other_name, (week_ago, week_ago))
    Predictions().keep_in(tmp_path, "kept", SAME)
    assert not folder.exists()
    assert other_name.exists()


def test_proposals_are_still_proposals_after_a_kill(tmp_path: Path) -> None:
    first = Predictions()
    first.keep_in(tmp_path, "kept", SAME)
    first.add(1, found(0.5, of_proposals=True))
    again = Predictions()
    assert again.keep_in(tmp_path, "kept", SAME) == {1}
    assert again.of_proposals


def test_a_full_disk_ends_no_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = Predictions()
    predictions.keep_in(tmp_path, "kept", SAME)
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115, PTH123
    monkeypatch.setattr(predictions, "_file", full)
    with caplog.at_level(logging.WARNING):
        predictions.add(1, found(0.5))
        predictions.add(2, found(0.25))
    assert caplog.text.count("predictions cannot be kept") == 1
    detections = predictions.gather(numbered(1, 2), CATEGORIES)
    assert detections is not None
    assert detections.scores.tolist() == [0.5, 0.25]
    predictions.forget()


def test_a_folder_that_cannot_be_made_ends_no_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    predictions = Predictions()
    assert not predictions.keep_in(tmp_path / "file", "kept", SAME)
    predictions.add(1, found(0.5))
    assert "predictions cannot be kept" in caplog.text


def race(folder: str, identity: str, begun: Any, failed: Any) -> None:
    for _ in range(30):
        begun.wait()
        try:
            predictions = Predictions()
            predictions.keep_in(Path(folder), "kept", identity)
            predictions.add(1, found(0.5))
        except Exception as error:
            failed.put(repr(error))
        begun.wait()
        predictions.forget()


def test_machines_that_share_a_disk_do_not_trip_each_other_up(tmp_path: Path) -> None:
    left_by_a_kill(tmp_path, OTHER)
    context = multiprocessing.get_context("fork")
    begun, failed = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=race, args=(str(tmp_path), SAME, begun, failed)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert failed.empty(), failed.get()
