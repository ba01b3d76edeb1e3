from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest

from resnext_det.engine.predictor import Detection
from resnext_det.visualize.detections_file import Problem, detection_entries, written_detections


def test_the_document_is_json_whatever_is_in_it(tmp_path: Path) -> None:
    target = tmp_path / "detections.json"
    problems: list[Problem] = []
    with written_detections(target, {"threshold": 0.5}, problems) as document:
        pass
    empty = {"threshold": 0.5, "images": [], "videos": [], "problems": []}
    assert json.loads(target.read_text()) == empty
    with written_detections(target, {"threshold": 0.5}, problems) as document:
        document.add_image({"file": 'a "b" ü.jpg'})
        document.add_image({"file": "c.jpg"})
        with document.video({"file": "v.mp4"}) as add_frame:
            add_frame({"index": 0})
            add_frame({"index": 1})
        with document.video({"file": "w.mp4"}) as add_frame:
            add_frame({"index": 0})
        problems.append(Problem("x.jpg", "is bad"))
    assert json.loads(target.read_text()) == {
        "threshold": 0.5,
        "images": [{"file": 'a "b" ü.jpg'}, {"file": "c.jpg"}],
        "videos": [
            {"file": "v.mp4", "frames": [{"index": 0}, {"index": 1}]},
            {"file": "w.mp4", "frames": [{"index": 0}]},
        ],
        "problems": [{"file": "x.jpg", "problem": "is bad"}],
    }


def test_a_problem_names_its_file_once_and_harmlessly() -> None:
    assert str(Problem("a.jpg", "is bad")) == "a.jpg: is bad"
    assert str(Problem("a.jpg", "the image a.jpg is bad")) == "the image a.jpg is bad"
    file = "a\x1b[2J\n.jpg"
    assert str(Problem(file, "is bad")) == r"a\x1b[2J\n.jpg: is bad"
    assert str(Problem(file, r"the image a\x1b[2J\n.jpg is bad")).count("2J") == 1


def test_masks_and_keypoints_are_written(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((30, 20)) > 0.5
    points = np.array([[1.5, 2.25, 0.5]], np.float32)
    detections = [
        Detection((1, 2, 3, 4), "a", 0.5, 0, mask),
        Detection((1, 2, 3, 4), "a", 0.5, 0, keypoints=points),
        Detection((1, 2, 3, 4), "a", 0.5, 0),
    ]
    masked, pointed, plain = json.loads(json.dumps(detection_entries(detections)))
    assert np.array_equal(mask_util.decode(masked.pop("mask")), mask)
    assert pointed.pop("keypoints") == points.tolist()
    assert masked == pointed == plain


@pytest.mark.parametrize("before", [0, 1])
def test_a_video_that_ends_with_an_error_leaves_no_trace(before: int, tmp_path: Path) -> None:
    target = tmp_path / "detections.json"
    with written_detections(target, {}, []) as document:
        for _ in range(before):
            with document.video({"file": "whole.mp4"}):
                pass
        with pytest.raises(ValueError), document.video({"file": "half.mp4"}) as add_frame:
            add_frame({"index": 0})
            raise ValueError
        with document.video({"file": "last.mp4"}):
            pass
    files = [each["file"] for each in json.loads(target.read_text())["videos"]]
    assert files == ["whole.mp4"] * before + ["last.mp4"]


def test_what_is_finished_stays_after_ctrl_c(tmp_path: Path) -> None:
    target = tmp_path / "detections.json"
    with pytest.raises(KeyboardInterrupt), written_detections(target, {}, []) as document:
        document.add_image({"file": "a.jpg"})
        with document.video({"file": "half.mp4"}) as add_frame:
            add_frame({"index": 0})
            raise KeyboardInterrupt
    found = json.loads(target.read_text())
    assert [each["file"] for each in found["images"]] == ["a.jpg"] and found["videos"] == []
    assert list(tmp_path.iterdir()) == [target]


def test_detections_are_written_in_full() -> None:
    found = detection_entries([Detection((1.23456, 2, 3, 4), "cat", 0.12345678, 7)])
    expected = {"box": [1.235, 2, 3, 4], "name": "cat", "category_index": 7, "score": 0.123457}
    assert found == [expected]


def test_a_problem_names_its_file_once() -> None:
    assert str(Problem("a.jpg", "a.jpg is bad")) == "a.jpg is bad"
    assert str(Problem("a.jpg", "is bad")) == "a.jpg: is bad"
