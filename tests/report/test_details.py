"""Details as the report shows them: curves, pairs and shades, and files that are not theirs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnext_det.evaluation.error_analysis import ERROR_KINDS
from resnext_det.report.details import Confusion, ReportDetails, read_details


def document(**changes: Any) -> dict[str, Any]:
    names = ["cat", "dog", "background"]
    curve = {"0.50": [100, 80, 80, 80, 0], "0.75": [50.0] * 5, "0.50:0.95": [10, 10, 10, 10, 0]}
    return {
        "recalls": [0, 0.25, 0.5, 0.75, 1],
        "curves": {"": curve, "cat": curve},
        "confusion": {
            **{"classes": names, "iou": 0.5, "score": 0.5},
            "counts": [[6, 3, 1], [1, 0, 0], [2, 2, 0]],
        },
        "errors": [
            {"kind": kind, "count": number, "cost": number / 2}
            for number, kind in enumerate(ERROR_KINDS)
        ],
        **changes,
    }


def read(folder: Path, content: Any) -> ReportDetails | None:
    (folder / "details.json").write_text(json.dumps(content))
    return read_details(folder / "details.json")


def test_curves_go_through_their_points_and_the_mean_is_the_ap(tmp_path: Path) -> None:
    details = read(tmp_path, document())
    assert details is not None
    first, second, third = details.curves["cat"]
    # The third of four points at 80 % lies on the line between the others.
    assert first.path == "M0 0L75 48L225 48L300 240"
    assert second.path == "M0 120L300 120"
    assert (first.mean, second.mean, third.mean) == (68, 50, 8)
    assert [curve.name for curve in details.curves["cat"]][::2] == ["IoU 0.50", "IoU 0.50 to 0.95"]
    assert details.names == ["cat"]


def test_the_costliest_errors_come_first(tmp_path: Path) -> None:
    details = read(tmp_path, document())
    assert details is not None
    assert [error.cost for error in details.errors] == [2.5, 2, 1.5, 1, 0.5, 0]
    assert (details.errors[0].name, details.errors[0].count) == ("Miss", 5)


def test_pairs_are_of_two_classes_and_shares_of_what_is_there(tmp_path: Path) -> None:
    details = read(tmp_path, document())
    assert details is not None
    pairs = [(p.true, p.detected, p.count, p.share) for p in details.confusion.pairs]
    assert pairs == [("cat", "dog", 3, 0.3), ("dog", "cat", 1, 1.0)]


def test_every_cell_of_the_map_has_the_shade_of_its_share() -> None:
    counts = np.random.default_rng(0).integers(0, 4, (31, 31))
    confusion = Confusion(tuple(map(str, range(31))), counts, 0.5, 0.5)
    assert (confusion.is_table, confusion.is_map) == (False, True)
    cells = {
        (int(y), int(x)): opacity
        for opacity, path in confusion.shades
        for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", path)
    }
    assert set(cells) == set(zip(*map(np.ndarray.tolist, np.nonzero(counts))))
    for place, opacity in cells.items():
        assert opacity - 1 / 8 < counts[place] / counts[place[0]].sum() <= opacity + 1e-9
    assert sum(count for _, _, count in confusion.data["cells"]) == counts.sum()


@pytest.mark.parametrize(
    "content",
    [
        [],
        "text",
        {},
        document(recalls=[]),
        document(recalls=[0, 1]),
        document(curves={"": {"0.50": [1]}}),
        document(curves={"": {"0.50": ["x"] * 5, "0.75": [1] * 5, "0.50:0.95": [1] * 5}}),
        document(curves=[1]),
        document(recalls=[0, 1, 2, 3, float("nan")]),
        document(errors=[{"kind": "Other", "count": 1, "cost": 1}]),
        document(errors=[{"kind": "Cls", "count": 1, "cost": float("inf")}]),
        document(confusion={"classes": ["a"], "counts": [[1, 2]], "iou": 1, "score": 1}),
        document(confusion={"classes": ["a"], "counts": [[-1]], "iou": 1, "score": 1}),
        document(confusion={"classes": ["a"], "counts": [["x"]], "iou": 1, "score": 1}),
        document(confusion={"classes": [], "counts": [], "iou": 1, "score": 1}),
    ],
)
def test_what_is_none_is_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: Any
) -> None:
    assert read(tmp_path, content) is None
    assert "details.json" in caplog.text
    assert read_details(None) is None


def test_curves_over_the_score_have_their_values_at_the_best_threshold(tmp_path: Path) -> None:
    best = {"score": 0.6, "precision": 80.0, "recall": 50.0, "f1": 61.54}
    entry = {"precision": [50, 80, 0], "recall": [100, 50, 0], "best": best}
    nothing = {"precision": [0, 0, 0], "recall": [0, 0, 0], "best": None}
    details = read(tmp_path, document(by_score={"": entry, "cat": nothing}))
    assert details is not None
    chart = details.scores[""]
    assert (chart.best, details.best_score("cat"), details.best_score("dog")) == (0.6, None, None)
    assert chart.curves == [
        ("Precision", "M0 120L150 48", 80.0),  # none above the surest correct detection
        ("Recall", "M0 0L150 120L300 240", 50.0),
        ("F1", "M0 80L150 92.3L300 240", 61.54),
    ]
    for broken in ({**entry, "recall": [1]}, {**entry, "best": {"score": "x"}}, {}, None):
        assert read(tmp_path, document(by_score={"": broken})) is None
