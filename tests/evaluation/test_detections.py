from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnext_det.errors import DatasetError
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.detections import Detections, check_detections, read_detections
from resnext_det.evaluation.results_file import write_detections


def result(image: Any = 5, category: Any = 3, bbox: Any = (1, 2, 3, 4), score: Any = 0.5) -> Any:
    box = list(bbox) if isinstance(bbox, tuple) else bbox
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


@pytest.fixture()
def truth(tmp_path: Path) -> GroundTruth:
    document = {
        "images": [{"id": 5}, {"id": 2}],
        "categories": [{"id": 3, "name": "dog"}],
        "annotations": [],
    }
    (tmp_path / "truth.json").write_text(json.dumps(document))
    return read_ground_truth(tmp_path / "truth.json")


def test_what_is_written_is_read_again_to_the_last_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    table = np.column_stack(
        [
            generator.integers(0, 2**52, 50),
            generator.uniform(0, 1e4, (50, 4)).astype(np.float32),
            generator.random(50),
            generator.integers(1, 91, 50),
        ]
    )
    detections = Detections.of_table(table)
    write_detections(tmp_path / "detections.json", detections)
    again = read_detections(tmp_path / "detections.json")
    assert np.array_equal(again.table, table)
    assert [path.name for path in tmp_path.iterdir()] == ["detections.json"]


def test_a_file_of_nothing_is_a_file(tmp_path: Path) -> None:
    write_detections(tmp_path / "none.json", Detections.of([]))
    assert len(read_detections(tmp_path / "none.json")) == 0


@pytest.mark.parametrize(
    "bad",
    [
        result(image="5"),
        result(image=1.5),
        result(image=1e300),
        result(category=None),
        result(bbox=(1, 2, 3)),
        result(bbox=(1, 2, 3, 4, 5)),
        result(bbox=(1, 2, -3, 4)),
        result(bbox=(1, 2, float("nan"), 4)),
        result(bbox=[[1, 2, 3, 4]]),
        result(score=float("inf")),
        result(score="high"),
        {"image_id": 5},
        "detection",
        [1, 2],
    ],
)
def test_what_is_malformed_is_shown(tmp_path: Path, bad: object) -> None:
    file = tmp_path / "detections.json"
    for content, position in ([result(), bad, result()], 1), ([bad], 0):
        file.write_text(json.dumps(content))
        with pytest.raises(DatasetError, match=rf"detections\.json: detection {position} of"):
            read_detections(file)


def test_boxes_with_five_numbers_throughout_are_no_boxes(tmp_path: Path) -> None:
    file = tmp_path / "detections.json"
    file.write_text(json.dumps([result(bbox=(1, 2, 3, 4, 5))] * 7))
    with pytest.raises(DatasetError, match="detection 0 of 7"):
        read_detections(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"annotations": [], "images": []}', "holds a dict with annotations, images"),
        ("3", "holds a int"),
        ("[{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_list_of_detections_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_detections(tmp_path / "a.json")
    with pytest.raises(DatasetError, match="are not there"):
        read_detections(tmp_path / "b.json")


def test_detections_stand_in_the_order_of_the_images(truth: GroundTruth) -> None:
    rows = [result(2, score=0.1), result(5, score=0.2), result(2, score=0.3), result(5, score=0.4)]
    ordered = Detections.of(rows).in_order(truth.image_ids)
    assert ordered.image_ids.tolist() == [5, 5, 2, 2]
    assert ordered.scores.tolist() == [0.2, 0.4, 0.1, 0.3]


def test_other_images_and_classes_are_refused(truth: GroundTruth) -> None:
    check_detections(Detections.of([result()]), truth, "mine.json")
    with pytest.raises(DatasetError, match=r"mine\.json: 2 of 3 .* 1 images that .*: 7\. Take"):
        check_detections(Detections.of([result(), result(7), result(7)]), truth, "mine.json")
    with pytest.raises(DatasetError, match=r"1 of 2 .* 1 classes .*: 0\. A category_id is"):
        check_detections(Detections.of([result(), result(category=0)]), truth, "mine.json")


def test_proposals_need_no_class(tmp_path: Path, truth: GroundTruth) -> None:
    rows = [result(category="none"), {k: v for k, v in result().items() if k != "category_id"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    proposals = read_detections(tmp_path / "a.json", classes=False)
    assert proposals.category_ids.tolist() == [0, 0]
    check_detections(proposals, truth, "a.json", classes=False)
    with pytest.raises(DatasetError, match="detection 0 of 2"):
        read_detections(tmp_path / "a.json")
