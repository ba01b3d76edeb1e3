"""Error details as the report shows them, and files that are not such details."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from resnext_det.evaluation.error_analysis import ERROR_KINDS
from resnext_det.report.details import Confusion, growth_chart, read_details

BEST = {"score": 0.6, "precision": 80.0, "recall": 50.0, "f1": 61.54}
SCORES = {"precision": [50, 80, 0], "recall": [100, 50, 0], "best": BEST}


def document(**changes: Any) -> dict[str, Any]:
    curve = {"0.50": [100, 80, 80, 80, 0], "0.75": [50.0] * 5, "0.50:0.95": [10, 10, 10, 10, 0]}
    return {
        "recalls": [0, 0.25, 0.5, 0.75, 1],
        "curves": {"": curve, "cat": curve},
        "confusion": {
            "classes": ["cat", "dog", "background"],
            "iou": 0.5,
            "score": 0.5,
            "counts": [[6, 3, 1], [1, 0, 0], [2, 2, 0]],
        },
        "errors": [
            {"kind": kind, "count": number, "cost": number / 2}
            for number, kind in enumerate(ERROR_KINDS)
        ],
        "by_score": {"": SCORES, "cat": SCORES, "dog": {**SCORES, "best": None}},
        **changes,
    }


def test_reads_details(tmp_path: Path) -> None:
    (tmp_path / "details.json").write_text(json.dumps(document()))
    details = read_details(tmp_path / "details.json")
    assert details is not None
    recall, score = details.charts.values()
    for legend in ("IoU 0.50: 68.0", "IoU 0.75: 50.0", "IoU 0.50 to 0.95: 8.0"):
        assert legend in recall.decode()
    assert "highest F1 at 0.60" in score.decode()
    ElementTree.fromstring(score)
    assert [each.cost for each in details.errors] == [2.5, 2, 1.5, 1, 0.5, 0]
    assert (details.errors[0].name, details.errors[0].count) == ("Miss", 5)
    assert details.confusion.pairs == [("cat", "dog", 3, 0.3), ("dog", "cat", 1, 1.0)]
    assert details.confusion.rows[0] == ("cat", [(6, 0.6), (3, 0.3), (1, 0.1)])
    assert details.best_scores == {"": 0.6, "cat": 0.6}
    assert details.actions == [] and details.calibration is None  # written by an earlier version


def scored(objects: int, precision: float, recall: float) -> dict[str, Any]:
    best = {"score": 0.6, "precision": precision, "recall": recall, "f1": 1.0}
    return {**SCORES, "best": best if recall else None, "objects": objects}


def test_classes_to_act_on(tmp_path: Path) -> None:
    names = ["rare", "confused", "missed", "false", "few", "good", "perfect", "never"]
    counts = np.zeros((9, 9), int)
    counts[1, 2], counts[1, 0], counts[1, -1] = 30, 3, 50  # most are missed
    scores = {
        "": SCORES,
        "rare": scored(10, 50.0, 50.0),
        "confused": scored(100, 90.0, 60.0),
        "missed": scored(100, 90.0, 30.0),
        "false": scored(40, 50.0, 75.0),
        "few": scored(10, 90.0, 90.0),
        "good": scored(100, 90.0, 90.0),
        "perfect": scored(100, 100.0, 100.0),
        "never": scored(30, 0.0, 0.0),
    }
    confusion = {"classes": [*names, "background"], "iou": 0.5, "score": 0.5}
    bins = [{"score": 12.0, "right": 3.0, "count": 5}, {"score": 93.0, "right": 85.0, "count": 2}]
    content = document(
        by_score=scores,
        confusion={**confusion, "counts": counts.tolist()},
        calibration={"error": 8.7, "bins": bins},
    )
    file = tmp_path / "details.json"
    file.write_text(json.dumps(content))
    trained = {**dict.fromkeys(names, 500), "rare": 7}
    details = read_details(file, trained)
    assert details is not None and details.calibration == 8.7
    ElementTree.fromstring(details.charts["Are scores probabilities?"])
    found = {each.name: each for each in details.actions}
    assert list(found) == ["missed", "confused", "false", "never", "good", "rare", "few"]
    assert (found["false"].missed, found["false"].false) == (10, 30)  # 30 of 60 are right
    assert (found["never"].missed, found["never"].score) == (30, None)
    for name, advice in {
        "rare": "Too few examples: only 7 to train on",
        "confused": "Confused: 30 taken for missed",
        "missed": "Missed",
        "false": "False alarms",
        "few": "Uncertain: only 10 to evaluate on",
        "good": "Good",
        "never": "Missed",
    }.items():
        assert found[name].advice.startswith(advice), name
    unknown = read_details(file)
    assert unknown is not None and {each.trained for each in unknown.actions} == {None}


def test_many_classes_have_pairs_instead_of_a_table() -> None:
    counts = np.random.default_rng(0).integers(0, 4, (31, 31))
    counts[3, 7] = 500
    confusion = Confusion(tuple(map(str, range(31))), counts, 0.5, 0.5)
    assert confusion.rows == [] and len(confusion.pairs) == 20
    assert confusion.pairs[0] == ("3", "7", 500, 500 / counts[3].sum())


@pytest.mark.parametrize(
    "content",
    [
        [],
        "text",
        {},
        document(recalls=[0, 1]),
        document(recalls=[0, 1, 2, 3, float("nan")]),
        document(curves={"": {"0.50": ["x"] * 5, "0.75": [1] * 5, "0.50:0.95": [1] * 5}}),
        document(curves=[1]),
        document(errors=[]),
        document(errors=[{"kind": "Other", "count": 1, "cost": 1}]),
        document(errors=[{"kind": "Cls", "count": 1, "cost": float("inf")}]),
        document(errors=[{"kind": "Cls", "count": float("inf"), "cost": 1}]),
        document(confusion={"classes": ["a"], "counts": [[1, 2]], "iou": 1, "score": 1}),
        document(confusion={"classes": ["a"], "counts": [[-1]], "iou": 1, "score": 1}),
        document(confusion={"classes": [], "counts": [], "iou": 1, "score": 1}),
        document(by_score={"": {**SCORES, "recall": [1]}}),
        document(by_score={"": None}),
    ],
)
def test_leaves_out_malformed_details(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: Any
) -> None:
    (tmp_path / "details.json").write_text(json.dumps(content))
    assert read_details(tmp_path / "details.json") is None
    assert "details.json" in caplog.text
    assert read_details(None) is None


@pytest.mark.parametrize("supported", [True, False])
def test_growth_with_the_data(tmp_path: Path, supported: bool) -> None:
    assert growth_chart(tmp_path) == {}
    file = tmp_path / "how_much_data" / "how_much_data.json"
    file.parent.mkdir()
    found = {"images": [5, 10, 20], "AP": [10, 20, 28], "asked": 40, "supported": supported}
    forecast = {"expected": 33.0, "interval": [30, 38]} if supported else {"expected": None}
    file.write_text(json.dumps(found | forecast))
    (chart,) = growth_chart(tmp_path).values()
    ElementTree.fromstring(chart)
    assert b"measured" in chart and (b"lowest (95 %)" in chart) == supported
    for broken in ({"AP": [1, "\x1b"]}, {"AP": None}, {"images": [1e400, 2, 3]}, {"supported": []}):
        file.write_text(json.dumps(found | forecast | broken))
        assert len(growth_chart(tmp_path)) == int("supported" in broken)
    file.write_text("[")
    assert growth_chart(tmp_path) == {}
