"""Error details as the report shows them, and files that are not such details."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from resnext_det.evaluation.error_analysis import ERROR_KINDS
from resnext_det.report.details import Confusion, read_details

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
