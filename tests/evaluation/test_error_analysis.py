from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.error_analysis import ErrorAnalysis, error_table
from resnext_det.evaluation.evaluator import evaluate_detections

CAT, DOG = 1, 2
# One cat and one dog are found, another cat and another dog are not.
OBJECTS = [
    (CAT, [0, 0, 100, 100]),
    (DOG, [200, 0, 100, 100]),
    (CAT, [0, 200, 100, 100]),
    (DOG, [400, 0, 50, 50]),
]
DETECTIONS = {
    "right": (CAT, [0, 0, 100, 100], 0.95),
    "Dupe": (CAT, [5, 0, 100, 100], 0.9),
    "Cls": (CAT, [200, 0, 100, 100], 0.8),
    "Loc": (CAT, [0, 260, 100, 100], 0.7),  # IoU 40 / 160
    "Both": (DOG, [60, 200, 100, 100], 0.6),  # IoU 40 / 160 with a cat
    "Bkg": (DOG, [400, 400, 50, 50], 0.55),
}


def truth_of(tmp_path: Path) -> GroundTruth:
    document = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [
            {"id": CAT, "name": "cat"},
            {"id": DOG, "name": "dog"},
            {"id": 5, "name": "owl"},
        ],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": kind, "bbox": box, "area": box[2] * box[3]}
            for n, (kind, box) in enumerate(OBJECTS, start=1)
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(document))
    return read_ground_truth(tmp_path / "truth.json")


def details(tmp_path: Path, *names: str) -> ErrorAnalysis:
    found = [
        {"image_id": 1, "category_id": kind, "bbox": box, "score": score}
        for kind, box, score in (DETECTIONS[name] for name in names)
    ]
    return evaluate_detections(truth_of(tmp_path), Detections.of(found)).details


def test_every_kind_of_error_is_told_from_the_others(tmp_path: Path) -> None:
    counts = {error.kind: error.count for error in details(tmp_path, *DETECTIONS).errors}
    # The dog at the right and the lower cat are explained by a wrong class and a wrong place.
    assert counts == {"Cls": 1, "Loc": 1, "Both": 1, "Dupe": 1, "Bkg": 1, "Miss": 1}
    assert {error.kind: error.count for error in details(tmp_path, "right").errors} == {
        **dict.fromkeys(counts, 0),
        "Miss": 3,
    }


def test_what_an_error_costs(tmp_path: Path) -> None:
    # Of two cats one is found: 51 of 101 recalls have a precision of 1. Without dogs, AP50 is half.
    right = details(tmp_path, "right", "Bkg")
    costs = {error.kind: error.cost for error in right.errors}
    assert costs["Bkg"] == pytest.approx(0)  # a false dog, and no dog found: nothing to win
    # With all that was missed out of the count, one cat of one is found, and no dog is left.
    assert costs["Miss"] > 10


def test_confused_classes(tmp_path: Path) -> None:
    confusion = details(tmp_path, *DETECTIONS).confusion
    expected = np.zeros((4, 4), int)
    cat, dog, _, background = range(4)
    expected[cat, cat] = 1
    expected[dog, cat] = 1
    expected[background, cat] = 2  # the second one, and the one in the wrong place
    expected[background, dog] = 2
    expected[cat, background] = expected[dog, background] = 1  # found by none
    assert confusion.tolist() == expected.tolist()


def test_detections_of_low_score_are_not_confused(tmp_path: Path) -> None:
    found = [{"image_id": 1, "category_id": CAT, "bbox": OBJECTS[1][1], "score": 0.49}]
    confusion = evaluate_detections(truth_of(tmp_path), Detections.of(found)).details.confusion
    assert confusion[1].tolist() == [0, 0, 0, 2]


def test_a_detection_in_a_crowd_is_no_mistake(tmp_path: Path) -> None:
    truth_of(tmp_path)
    file = tmp_path / "truth.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(document))
    rows = [
        {"image_id": 1, "category_id": kind, "bbox": [10, 10, 30, 30], "score": 0.9}
        for kind in (CAT, DOG)
    ]
    found = evaluate_detections(read_ground_truth(file), Detections.of(rows)).details.confusion
    background = 3
    assert found[background].tolist() == [0, 1, 0, 0]  # the crowd is of cats


def test_curves(tmp_path: Path) -> None:
    found = details(tmp_path, *DETECTIONS)
    assert set(found.curves) == {"", "cat", "dog"}  # there is no owl
    cats = found.curves["cat"]["0.50"]
    # The first detection is right, and nothing after it.
    assert cats.tolist() == pytest.approx([100.0] * 51 + [0.0] * 50)
    assert found.curves["dog"]["0.50"].tolist() == [0.0] * 101
    assert found.curves[""]["0.50"].tolist() == pytest.approx((cats / 2).tolist())
    assert found.recalls[[0, 50, 100]].tolist() == [0, 0.5, 1]
    beside = evaluate_detections(
        truth_of(tmp_path),
        Detections.of(
            [{"image_id": 1, "category_id": CAT, "bbox": [17, 0, 100, 100], "score": 0.9}]
        ),
    ).details  # IoU 83 / 117: right from 0.50 to 0.70
    assert [beside.curves["cat"][key][0] for key in ("0.50", "0.75", "0.50:0.95")] == [
        pytest.approx(value) for value in (100, 0, 50)
    ]


def test_what_is_saved_is_json_and_says_what_it_is(tmp_path: Path) -> None:
    found = details(tmp_path, *DETECTIONS)
    document: dict[str, Any] = json.loads(json.dumps(found.document(truth_of(tmp_path))))
    assert document["confusion"]["classes"] == ["cat", "dog", "owl", "background"]
    assert document["confusion"]["score"] == 0.5
    assert len(document["recalls"]) == len(document["curves"]["cat"]["0.75"]) == 101
    assert {entry["kind"] for entry in document["errors"]} >= {"Cls", "Miss"}
    assert "wrong class, an IoU of 0.5 or more" in error_table(found)


def test_without_any_object_there_are_no_curves(tmp_path: Path) -> None:
    truth_of(tmp_path)
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    found = evaluate_detections(read_ground_truth(file), Detections.of([]))
    assert found.details.curves == {}
    assert found.figures.figures["AP"] is None
    assert found.figures.per_class[0].AP is None
    assert "-" in found.figures.table()


def counted_at(
    threshold: float, scored: list[tuple[float, bool]], objects: int
) -> tuple[float, float, float]:
    """Return precision, recall and F1 in percent."""
    kept = [right for score, right in scored if score >= threshold]
    found = 100 * sum(kept)
    return found / max(len(kept), 1), found / objects, 2 * found / (len(kept) + objects)


def test_precision_recall_and_f1_over_the_score_agree_with_pycocotools(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    annotations: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for image in range(1, 13):
        for _ in range(6):
            box = [*generator.uniform(0, 150, 2).tolist(), *generator.uniform(8, 60, 2).tolist()]
            kind, crowd = int(generator.choice([CAT, DOG])), int(generator.random() < 0.15)
            number = len(annotations) + 1
            place = {"image_id": image, "category_id": kind}
            more = {"id": number, "area": box[2] * box[3], "iscrowd": crowd}
            annotations.append({**place, **more, "bbox": box})
            for _ in range(3):
                moved = [*(np.array(box[:2]) + generator.normal(0, 6, 2)).tolist(), *box[2:]]
                score = round(float(generator.random()), 1 + int(generator.integers(2)))  # ties
                rows.append({**place, "bbox": moved, "score": score})
    file = tmp_path / "truth.json"
    images = [{"id": n, "width": 200, "height": 200} for n in range(1, 13)]
    categories = [{"id": n, "name": name} for n, name in ((CAT, "cat"), (DOG, "dog"), (5, "owl"))]
    document = {"images": images, "categories": categories, "annotations": annotations}
    file.write_text(json.dumps(document))
    found = evaluate_detections(read_ground_truth(file), Detections.of(rows)).details.by_score
    assert set(found) == {"", "cat", "dog"}  # there is no owl

    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(file))
        evaluation = COCOeval(reference, reference.loadRes(rows), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.evaluate()
    for name, kinds in (("", (CAT, DOG)), ("cat", (CAT,)), ("dog", (DOG,))):
        scored: list[tuple[float, bool]] = []
        objects = 0
        for each in evaluation.evalImgs:
            if each is None or each["category_id"] not in kinds:
                continue
            objects += int((np.array(each["gtIgnore"]) == 0).sum())
            ignored = each["dtIgnore"][0]
            scored += [
                (score, match > 0)
                for score, match, ignore in zip(each["dtScores"], each["dtMatches"][0], ignored)
                if not ignore
            ]

        curve = found[name]
        for number, threshold in enumerate(np.arange(101) / 100):
            precision, recall, _ = counted_at(float(threshold), scored, objects)
            assert curve.precision[number] == pytest.approx(precision)
            assert curve.recall[number] == pytest.approx(recall)
        assert curve.best is not None
        f1 = {score: counted_at(score, scored, objects)[2] for score, _ in scored}
        assert curve.best.f1 == pytest.approx(max(f1.values()))
        found_there = curve.best.precision, curve.best.recall, curve.best.f1
        assert found_there == pytest.approx(counted_at(curve.best.score, scored, objects))


@pytest.mark.parametrize("rows", [[], ["Bkg"]])
def test_without_a_correct_detection_no_threshold_is_best(tmp_path: Path, rows: list[str]) -> None:
    curve = details(tmp_path, *rows).by_score[""]
    assert curve.best is None
    assert curve.precision.max() == curve.recall.max() == 0
