from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pycocotools.cocoeval import COCOeval

from resnext_det.errors import DatasetError
from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.detections import Detections, read_detections
from resnext_det.evaluation.evaluator import Engine, evaluate_boxes, evaluate_detections
from resnext_det.evaluation.results_file import write_detections

Document = dict[str, Any]


def sound() -> Document:
    return {
        "images": [{"id": 5, "file_name": "b.jpg"}, {"id": 2, "file_name": "a.jpg"}],
        "categories": [{"id": 9, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            annotation(1, 5, 9, [0, 0, 10, 10]),
            annotation(2, 2, 3, [5, 5, 40, 50], iscrowd=1),
        ],
    }


def annotation(number: Any, image: Any, category: Any, bbox: Any, **more: Any) -> Document:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": bbox,
        "area": 60.5,
    } | more


def saved(tmp_path: Path, document: object) -> Path:
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(document))
    return file


def test_what_is_read(tmp_path: Path) -> None:
    file = saved(tmp_path, sound())
    truth = read_ground_truth(file)
    assert truth.image_ids.tolist() == [5, 2]
    assert truth.file_names == ("b.jpg", "a.jpg")
    assert truth.categories == {3: "dog", 9: "cat"}
    assert list(truth.categories) == [3, 9]  # as the model counts its classes
    assert truth.objects.crowds.tolist() == [False, True]
    assert truth.objects.areas.tolist() == [60.5, 60.5]
    assert truth.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_ids_that_repeat_cost_no_figure(tmp_path: Path) -> None:
    # pycocotools gives a perfect detector 25 % where a box has the id of another image's.
    document = sound()
    document["annotations"] = [
        annotation(7, 5, 9, [0, 0, 10, 10]),
        annotation(7, 2, 9, [50, 50, 30, 30]),
        annotation(0, 2, 9, [5, 100, 20, 30]),
    ]
    detections = [
        {key: each[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for each in document["annotations"]
    ]
    assert evaluate_boxes(saved(tmp_path, document), detections).figures["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("ids", "words"),
    [((0, 1), "annotation of id 0"), ((7, 7), "the last, which loses 1")],
)
def test_a_cross_check_says_why_pycocotools_by_itself_differs(
    tmp_path: Path,
    ids: tuple[int, int],
    words: str,
    stock_evaluation: Callable[..., COCOeval],
    caplog: pytest.LogCaptureFixture,
) -> None:
    document = sound()
    boxes = [5, 9, [0, 0, 10, 10]], [2, 3, [5, 5, 40, 50]]
    document["annotations"] = [annotation(n, *box, iscrowd=0) for n, box in zip(ids, boxes)]
    file = saved(tmp_path, document)
    found = [
        {key: each[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for each in document["annotations"]
    ]
    evaluated = evaluate_detections(
        read_ground_truth(file), Detections.of(found), Engine(cross_check=True)
    )
    assert evaluated.figures.figures["AP"] == pytest.approx(100)
    assert "pycocotools by itself gives other figures" in caplog.text
    assert words in caplog.text
    assert stock_evaluation(file, found).stats[0] < 0.999


def test_text_ids_are_ids(tmp_path: Path) -> None:
    document = sound()
    for number, image in enumerate(document["images"]):
        image["id"] = f"{number}.jpg"
    document["annotations"] = [
        annotation(1, "1.jpg", 9, [0, 0, 10, 10]),
        annotation(2, "0.jpg", 3, [5, 5, 40, 50]),
        annotation(3, "else.jpg", 3, [5, 5, 40, 50]),
    ]
    truth = read_ground_truth(saved(tmp_path, document))
    assert truth.image_keys == ("0.jpg", "1.jpg")
    assert truth.objects.image_ids.tolist() == [1, 0]
    rows = [
        {"image_id": key, "category_id": 9, "bbox": [0, 0, 10, 10], "score": 0.9}
        for key in ("1.jpg", "0.jpg")
    ]
    (tmp_path / "found.json").write_text(json.dumps(rows))
    found = read_detections(tmp_path / "found.json", numbers=truth.text_numbers)
    assert found.image_ids.tolist() == [1, 0]
    write_detections(tmp_path / "again.json", found, dict(enumerate(truth.image_keys)))
    assert json.loads((tmp_path / "again.json").read_text()) == rows
    for wrong in (1, "else.jpg", None, [1]):
        (tmp_path / "found.json").write_text(json.dumps([{**rows[0], "image_id": wrong}]))
        with pytest.raises(DatasetError, match="detection 0 of 1"):
            read_detections(tmp_path / "found.json", numbers=truth.text_numbers)


def test_what_is_not_listed_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = sound()
    document["annotations"] += [
        annotation(3, 77, 9, [0, 0, 1, 1]),
        annotation(4, 5, 77, [0, 0, 1, 1]),
    ]
    with caplog.at_level(logging.WARNING):
        truth = read_ground_truth(saved(tmp_path, document))
    assert len(truth.objects.areas) == 2
    assert "2 annotations are left out" in caplog.text


def test_flags_may_be_truth_values_and_boxes_turned_round_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = sound()
    flags = (True, False, None, 0)
    document["annotations"] = [
        annotation(n, 5, 9, [0, 0, 9, -9], iscrowd=flag) for n, flag in enumerate(flags)
    ]
    with caplog.at_level(logging.WARNING):
        crowds = read_ground_truth(saved(tmp_path, document)).objects.crowds
    assert crowds.tolist() == [True, False, False, False]
    assert "4 boxes of negative width or height" in caplog.text


def test_a_missing_area_is_that_of_the_box(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = sound()
    del document["annotations"][0]["area"]
    with caplog.at_level(logging.WARNING):
        assert read_ground_truth(saved(tmp_path, document)).objects.areas.tolist() == [100, 60.5]
    assert "1 annotations have no area" in caplog.text


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("images", {"id": "5"}),
        ("images", "a.jpg"),
        ("images", {"id": 1.5}),
        ("annotations", annotation(1, "5", 9, [0, 0, 1, 1])),
        ("annotations", annotation(1, 5, None, [0, 0, 1, 1])),
        ("annotations", annotation(1, 5, 9, [0, 0, 1])),
        ("annotations", annotation(1, 5, 9, [0, 0, 1, float("nan")])),
        ("annotations", [1]),
        ("annotations", annotation(1, 5, 9, [0, 0, 1, 1], iscrowd="1")),
        ("annotations", annotation(1, 5, 9, [0, 0, 1, 1], iscrowd=2)),
        ("annotations", annotation(1, 5, 9, [0, 0, 1, 1], area=-1)),
        ("annotations", annotation(1, 5, 9, [0, 0, 1, 1], area="60")),
    ],
)
def test_what_is_malformed_is_shown(tmp_path: Path, part: str, entry: object) -> None:
    document = sound()
    document[part].append(entry)
    with pytest.raises(DatasetError, match=rf"1 of the 3 {part} have not COCO's form, such as"):
        read_ground_truth(saved(tmp_path, document))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "no list under 'images'"),
        ({**sound(), "categories": []}, "has no categories"),
        ({**sound(), "images": []}, "lists no images"),
        ({**sound(), "images": [{"id": 4}, {"id": 4}]}, "several images with one id, such as 4"),
    ],
)
def test_what_is_no_annotation_file_is_refused(
    tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        read_ground_truth(saved(tmp_path, content))
    (tmp_path / "half.json").write_text(json.dumps(sound())[:50])
    with pytest.raises(DatasetError, match="is not JSON"):
        read_ground_truth(tmp_path / "half.json")
    with pytest.raises(DatasetError, match=r"none\.json are not there\.$"):
        read_ground_truth(tmp_path / "none.json")
