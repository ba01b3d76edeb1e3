"""Ground truth: unusual but valid files, and refusals that show the malformed record."""

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
from resnext_det.evaluation.coco import Engine
from resnext_det.evaluation.detections import Detections, read_detections
from resnext_det.evaluation.evaluator import evaluate_detections

Document = dict[str, Any]


def annotation(number: Any, image: Any, category: Any, bbox: Any, **more: Any) -> Document:
    ids = {"id": number, "image_id": image, "category_id": category}
    return {**ids, "bbox": bbox, "area": 60.5, **more}


def sound() -> Document:
    return {
        "images": [{"id": 5, "file_name": "b.jpg"}, {"id": 2, "file_name": "a.jpg"}],
        "categories": [{"id": 9, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            annotation(1, 5, 9, [0, 0, 10, 10]),
            annotation(2, 2, 3, [5, 5, 40, 50], iscrowd=1),
        ],
    }


def saved(tmp_path: Path, document: object) -> Path:
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(document))
    return file


def test_reads_a_file(tmp_path: Path) -> None:
    file = saved(tmp_path, sound())
    truth = read_ground_truth(file)
    assert truth.image_ids.tolist() == [5, 2]
    assert truth.file_names == ("b.jpg", "a.jpg")
    assert list(truth.categories.items()) == [(3, "dog"), (9, "cat")]  # as a model counts classes
    assert truth.objects.crowds.tolist() == [False, True]
    assert truth.objects.areas.tolist() == [60.5, 60.5]
    assert truth.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("ids", [(0, 1), (7, 7)])
def test_annotation_ids_do_not_change_figures(
    ids: tuple[int, int],
    tmp_path: Path,
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
    truth = read_ground_truth(file)
    assert "1 annotation ids are 0 or repeat" in caplog.text
    evaluated = evaluate_detections(
        truth, Detections.of(found, truth), engine=Engine(cross_check=True)
    )
    assert evaluated.figures.figures["AP"] == pytest.approx(100)
    assert stock_evaluation(file, found).stats[0] < 0.999


def test_accepts_strings_as_image_ids(tmp_path: Path) -> None:
    document = sound()
    for number, image in enumerate(document["images"]):
        image["id"] = f"{number}.jpg"
    document["annotations"] = [
        annotation(1, "1.jpg", 9, [0, 0, 10, 10]),
        annotation(2, "0.jpg", 3, [5, 5, 40, 50]),
        annotation(3, "else.jpg", 3, [5, 5, 40, 50]),
    ]
    truth = read_ground_truth(saved(tmp_path, document))
    assert truth.numbers == {"0.jpg": 0, "1.jpg": 1}
    assert truth.objects.image_ids.tolist() == [1, 0]
    rows: list[Any] = [
        {"image_id": key, "category_id": 9, "bbox": [0.0, 0.0, 10.0, 10.0], "score": 0.9}
        for key in ("1.jpg", "0.jpg")
    ]
    file = tmp_path / "found.json"
    file.write_text(json.dumps(rows))
    found = read_detections(file, truth)
    assert found.image_ids.tolist() == [1, 0]
    assert found.results(truth) == rows
    for wrong in (1, "else.jpg", None, [1]):
        file.write_text(json.dumps([{**rows[0], "image_id": wrong}]))
        with pytest.raises(DatasetError, match="detection 0 of 1"):
            read_detections(file, truth)


def test_warns_about_unusual_annotations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    document = sound()
    flags = (True, False, None, 0)
    document["annotations"] = [
        *(annotation(n, 5, 9, [0, 0, 9, -9], iscrowd=flag) for n, flag in enumerate(flags, 1)),
        annotation(5, 77, 9, [0, 0, 1, 1]),
        annotation(6, 5, 77, [0, 0, 1, 1]),
        annotation(7, 5, 9, [0, 0, 10, 10], area=None),
    ]
    with caplog.at_level(logging.WARNING):
        objects = read_ground_truth(saved(tmp_path, document)).objects
    assert objects.crowds.tolist() == [True, False, False, False, False]
    assert objects.areas.tolist() == [60.5] * 4 + [100]
    for words in (
        "2 annotations of unlisted images or categories",
        "1 annotations have no area",
        "4 boxes have a negative width",
    ):
        assert words in caplog.text


@pytest.mark.parametrize(
    ("part", "record"),
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
        ("annotations", annotation(1, 5, 9, [0, 0, 1, 1], area=-1)),
    ],
)
def test_points_out_malformed_records(
    part: str, record: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = sound()
    document[part].append(record)
    file = saved(tmp_path, document)
    with pytest.raises(DatasetError, match=rf"1 of 3 {part} are malformed, such as .{{4,}}"):
        read_ground_truth(file)
    if part == "annotations":
        assert read_ground_truth(file, checked=True).objects.image_ids[:2].tolist() == [5, 2]
        assert "left out" in caplog.text or "no area" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "no list under 'images'"),
        ({**sound(), "images": []}, "lists no images"),
        ({**sound(), "images": [{"id": 4}, {"id": 4}]}, "several images have the id 4"),
    ],
)
def test_refuses_other_files(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_ground_truth(saved(tmp_path, content))
    with pytest.raises(DatasetError, match=r"none\.json"):
        read_ground_truth(tmp_path / "none.json")
