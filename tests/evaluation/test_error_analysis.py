"""Error analysis: one error of each kind, and curves over the score against pycocotools."""

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

from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.error_analysis import (
    Details,
    _intervals,
    _temperature,
    error_table,
    threshold_line,
)
from resnext_det.evaluation.evaluator import Evaluated, evaluate_detections
from resnext_det.prediction import scaled

Document = dict[str, Any]
CAT, DOG = 1, 2
CATEGORIES = [{"id": n, "name": name} for n, name in ((CAT, "cat"), (DOG, "dog"), (5, "owl"))]
# "right" finds one cat; another cat and two dogs stay undetected.
OBJECTS: list[Document] = [
    {"category_id": CAT, "bbox": [0, 0, 100, 100]},
    {"category_id": DOG, "bbox": [200, 0, 100, 100]},
    {"category_id": CAT, "bbox": [0, 200, 100, 100]},
    {"category_id": DOG, "bbox": [400, 0, 50, 50]},
]
DETECTIONS = {
    "right": (CAT, [0, 0, 100, 100], 0.95),
    "Dupe": (CAT, [5, 0, 100, 100], 0.9),
    "Cls": (CAT, [200, 0, 100, 100], 0.8),
    "Loc": (CAT, [0, 260, 100, 100], 0.7),  # IoU 40 / 160
    "Both": (DOG, [60, 200, 100, 100], 0.6),  # IoU 40 / 160 with a cat
    "Bkg": (DOG, [400, 400, 50, 50], 0.55),
}


def evaluated(
    tmp_path: Path, found: list[tuple[int, list[float], float]], objects: list[Document] = OBJECTS
) -> Evaluated:
    annotations = [
        {"id": n, "image_id": 1, "area": each["bbox"][2] * each["bbox"][3], **each}
        for n, each in enumerate(objects, start=1)
    ]
    document = {"images": [{"id": 1}, {"id": 2}], "categories": CATEGORIES}
    (tmp_path / "truth.json").write_text(json.dumps({**document, "annotations": annotations}))
    truth = read_ground_truth(tmp_path / "truth.json")
    rows = [
        {"image_id": 1, "category_id": kind, "bbox": bbox, "score": score}
        for kind, bbox, score in found
    ]
    return evaluate_detections(truth, Detections.of(rows, truth))


def details(tmp_path: Path, *names: str) -> Details:
    return evaluated(tmp_path, [DETECTIONS[name] for name in names]).details


def test_distinguishes_kinds_of_errors(tmp_path: Path) -> None:
    found = details(tmp_path, *DETECTIONS)
    counts = {error["kind"]: error["count"] for error in found["errors"]}
    # Only the small dog counts as missed: "Cls" and "Loc" cover the other two objects.
    assert counts == {"Cls": 1, "Loc": 1, "Both": 1, "Dupe": 1, "Bkg": 1, "Miss": 1}
    assert "wrong class, IoU of 0.5 or more" in error_table(found)
    assert {error["kind"]: error["count"] for error in details(tmp_path, "right")["errors"]} == {
        **dict.fromkeys(counts, 0),
        "Miss": 3,
    }


def test_confused_classes(tmp_path: Path) -> None:
    confusion = details(tmp_path, *DETECTIONS)["confusion"]
    assert confusion["classes"] == ["cat", "dog", "owl", "background"]
    cat, dog, _, background = range(4)
    expected = np.zeros((4, 4), int)
    expected[cat, cat] = expected[dog, cat] = 1
    expected[background, cat] = expected[background, dog] = 2
    expected[cat, background] = expected[dog, background] = 1
    assert confusion["counts"] == expected.tolist()
    low = evaluated(tmp_path, [(CAT, OBJECTS[1]["bbox"], 0.49)]).details["confusion"]
    assert low["counts"][dog] == [0, 0, 0, 2]


def test_detections_in_a_crowd_are_not_confused(tmp_path: Path) -> None:
    crowd = [{**OBJECTS[0], "iscrowd": 1}]
    rows = [(kind, [10.0, 10, 30, 30], 0.9) for kind in (CAT, DOG)]
    counts = evaluated(tmp_path, rows, crowd).details["confusion"]["counts"]
    assert counts[-1] == [0, 1, 0, 0]  # the crowd is of cats


def test_curves(tmp_path: Path) -> None:
    found = details(tmp_path, *DETECTIONS)
    curves = found["curves"]
    assert set(curves) == {"", "cat", "dog"}  # no owls
    cats = curves["cat"]["0.50"]  # the first detection is right, and none after it
    assert cats == [100.0] * 51 + [0.0] * 50
    assert curves["dog"]["0.50"] == [0.0] * 101
    assert curves[""]["0.50"] == [value / 2 for value in cats]
    assert [found["recalls"][n] for n in (0, 50, 100)] == [0, 0.5, 1]
    beside = evaluated(tmp_path, [(CAT, [17, 0, 100, 100], 0.9)]).details["curves"]["cat"]
    # IoU 83 / 117: right from 0.50 to 0.70
    assert [beside[key][0] for key in ("0.50", "0.75", "0.50:0.95")] == [100, 0, 50]


def test_without_objects(tmp_path: Path) -> None:
    found = evaluated(tmp_path, [], objects=[])
    assert found.details["curves"] == found.details["by_score"] == {}
    assert found.figures.figures["AP"] is None
    assert found.figures.per_class[0].AP is None
    assert "-" in found.figures.table()


@pytest.mark.parametrize("rows", [[], ["Bkg"]])
def test_without_correct_detections(tmp_path: Path, rows: list[str]) -> None:
    found = evaluated(tmp_path, [DETECTIONS[name] for name in rows])
    assert found.figures.figures["AP"] == 0
    curve = found.details["by_score"][""]
    assert curve["best"] is None
    assert max(curve["precision"]) == max(curve["recall"]) == 0
    assert found.document()["thresholds"]["all"] is None
    assert "no score threshold" in threshold_line(found.details)


def counted_at(
    threshold: float, scored: list[tuple[float, bool]], objects: int
) -> tuple[float, float, float]:
    """Return precision, recall and F1 in percent."""
    kept = [right for score, right in scored if score >= threshold]
    found = 100 * sum(kept)
    return found / max(len(kept), 1), found / objects, 2 * found / (len(kept) + objects)


def test_curves_over_the_score_agree_with_pycocotools(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    annotations: list[Document] = []
    rows: list[Document] = []
    for image in range(1, 13):
        for _ in range(6):
            box = [*generator.uniform(0, 150, 2).tolist(), *generator.uniform(8, 60, 2).tolist()]
            place = {"image_id": image, "category_id": int(generator.choice([CAT, DOG]))}
            more = {"area": box[2] * box[3], "iscrowd": int(generator.random() < 0.15)}
            annotations.append({"id": len(annotations) + 1, **place, **more, "bbox": box})
            for _ in range(3):
                moved = [*(np.array(box[:2]) + generator.normal(0, 6, 2)).tolist(), *box[2:]]
                score = round(float(generator.random()), 1 + int(generator.integers(2)))  # ties
                rows.append({**place, "bbox": moved, "score": score})
    file = tmp_path / "truth.json"
    images = [{"id": n, "width": 200, "height": 200} for n in range(1, 13)]
    document = {"images": images, "categories": CATEGORIES, "annotations": annotations}
    file.write_text(json.dumps(document))
    truth = read_ground_truth(file)
    evaluated = evaluate_detections(truth, Detections.of(rows, truth))
    found = evaluated.details["by_score"]
    assert set(found) == {"", "cat", "dog"}

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
            columns = each["dtScores"], each["dtMatches"][0], each["dtIgnore"][0]
            scored += [(score, match > 0) for score, match, ignore in zip(*columns) if not ignore]
        curve = found[name]
        assert curve["objects"] == objects
        if not name:
            check_calibration(evaluated.details["calibration"], scored)
        for number in range(101):
            precision, recall, _ = counted_at(number / 100, scored, objects)
            assert curve["precision"][number] == pytest.approx(precision, abs=0.006)
            assert curve["recall"][number] == pytest.approx(recall, abs=0.006)
        best = curve["best"]
        assert best["f1"] == pytest.approx(
            max(counted_at(s, scored, objects)[2] for s, _ in scored)
        )
        found_there = best["precision"], best["recall"], best["f1"]
        assert found_there == pytest.approx(counted_at(best["score"], scored, objects))
    written = evaluated.document()["thresholds"]
    assert written["all"] == found[""]["best"]
    assert written["per_class"] == {name: found[name]["best"] for name in ("cat", "dog")}
    assert written["intervals"]["all"] is None  # only twelve images
    assert evaluated.document()["calibration_error"] == evaluated.details["calibration"]["error"]
    assert f"at a score of {written['all']['score']:.2f}" in threshold_line(evaluated.details)


@pytest.mark.parametrize("score", [95.0, -0.5])
def test_scores_of_other_programs_are_not_calibrated(tmp_path: Path, score: float) -> None:
    right, box, _ = DETECTIONS["right"]
    found = evaluated(tmp_path, [(right, box, score)])
    assert found.details["calibration"] is None
    assert found.document()["calibration_error"] is None
    assert f"at a score of {score:.2f}" in threshold_line(found.details)


def test_no_temperature_without_detections(tmp_path: Path) -> None:
    assert evaluated(tmp_path, []).document()["temperature"] is None


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_finds_the_temperature_of_scores(true: float) -> None:
    generator = np.random.default_rng(5)
    shares = generator.uniform(0.02, 0.98, 40_000)
    right = generator.random(len(shares)) < shares
    scores = 1 / (1 + np.exp(-true * np.log(shares / (1 - shares))))  # too sure if above 1
    found = _temperature(scores, right)
    assert found == pytest.approx(true, rel=0.05)
    assert scaled(scores, true) == pytest.approx(shares, abs=1e-6)
    assert scaled(np.array([0.0, 1.0]), found) == pytest.approx([0, 1], abs=1e-3)


def test_intervals_of_the_best_threshold(tmp_path: Path) -> None:
    """They agree with a plain bootstrap: images drawn one by one, every threshold tried."""
    generator = np.random.default_rng(6)
    images = []  # scores that are right, those that are wrong, and objects missed
    for _ in range(30):
        good = generator.beta(5, 2, generator.integers(0, 4)).round(2).tolist()
        bad = generator.beta(2, 4, generator.integers(0, 5)).round(2).tolist()
        images.append((good, bad, int(generator.integers(1, 3))))
    annotations: list[Document] = []
    rows: list[Document] = []
    for number, (good, bad, missed) in enumerate(images, start=1):
        for place, score in enumerate([*good, *bad, *[None] * missed]):
            entry = {"image_id": number, "category_id": CAT, "bbox": [50 * place, 0, 40, 40]}
            if score is None or place < len(good):
                annotations.append({**entry, "id": len(annotations) + 1, "area": 1600})
            if score is not None:
                rows.append({**entry, "score": score})
    document = {"images": [{"id": n + 1} for n in range(30)], "categories": CATEGORIES}
    (tmp_path / "truth.json").write_text(json.dumps({**document, "annotations": annotations}))
    truth = read_ground_truth(tmp_path / "truth.json")
    evaluated = evaluate_detections(truth, Detections.of(rows, truth))
    best = evaluated.details["by_score"][""]["best"]
    draws = []
    for _ in range(400):
        drawn = [images[at] for at in generator.integers(0, 30, 30)]
        scored = [(s, True) for good, _, _ in drawn for s in good]
        scored += [(s, False) for _, bad, _ in drawn for s in bad]
        objects = sum(len(good) + missed for good, _, missed in drawn)
        top = max((counted_at(at / 50, scored, objects)[2], at / 50) for at in range(50))
        draws.append((top[1], *counted_at(best["score"], scored, objects)[:2]))
    expected = np.percentile(draws, [2.5, 97.5], axis=0).T
    found = evaluated.document()["thresholds"]["intervals"]["all"]
    assert found == evaluated.details["by_score"]["cat"]["intervals"]
    for (low, high), name, slack in zip(expected, ("score", "precision", "recall"), (0.06, 4, 4)):
        assert found[name] == pytest.approx([low, high], abs=slack), name
        assert found[name][0] <= best[name] <= found[name][1]
    rights = [(s, True, n) for n, (good, _, _) in enumerate(images) for s in good]
    wrongs = [(s, False, n) for n, (_, bad, _) in enumerate(images) for s in bad]
    scores, right, places = map(np.array, zip(*rights, *wrongs))
    owners = [n for n, (good, _, missed) in enumerate(images) for _ in range(len(good) + missed)]
    once = np.ones((1, 30), np.float32)  # a draw of every image
    same = _intervals(scores, right, places, np.array(owners), best, once)
    assert same == {name: pytest.approx([best[name]] * 2, rel=1e-5) for name in found}


def check_calibration(found: Document, scored: list[tuple[float, bool]]) -> None:
    """Compare with Guo et al.'s definition (1706.04599, section 2): ten bins of equal width."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for score, right in scored:
        bins.setdefault(min(int(10 * score), 9), []).append((score, right))
    means = {number: np.mean(each, axis=0) for number, each in bins.items()}
    differences = [len(bins[n]) * abs(score - right) for n, (score, right) in means.items()]
    assert found["error"] == pytest.approx(100 * sum(differences) / len(scored))
    assert [each["count"] for each in found["bins"]] == [len(bins[n]) for n in sorted(bins)]
    for each, number in zip(found["bins"], sorted(bins)):
        assert (each["score"], each["right"]) == pytest.approx(tuple(100 * means[number]))
