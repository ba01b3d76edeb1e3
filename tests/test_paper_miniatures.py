"""The paper's experiments in miniature: their design, statistics, runs and page."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from resnext_det.data.classification import read_split
from resnext_det.errors import ConfigError
from resnext_det.paper import miniatures
from resnext_det.paper.page import page
from resnext_det.paper.statistics import interval, seeds_needed, t_quantile
from resnext_det.paper.tables import network_name, published
from resnext_det_cli import main

DEFINED = miniatures.definitions()
EXPERIMENTS = {each["name"]: each for each in DEFINED["experiments"]}


def test_statistics_are_scipys() -> None:
    for freedom in (1, 2, 3, 4, 7, 30, 399):
        for probability in (0.55, 0.8, 0.975, 0.999):
            expected = stats.t.ppf(probability, freedom)
            assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-9)
    values = [1.0, 2.5, 0.5, 3.0]
    mean, half = interval(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert math.isnan(interval([1.0])[1])


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (1.0, 10), (0.01, None)])
def test_power_is_that_of_the_t_test(effect: float, seeds: int | None) -> None:
    """The power of the paired t-test has a closed form, the noncentral t distribution."""
    unit = np.array([-1.0, 1.0]) / math.sqrt(2)  # spread 1
    assert seeds_needed(list(unit + effect)) == seeds_needed(list(unit - effect)) == seeds
    if seeds:
        critical = stats.t.ppf(0.975, seeds - 1)
        power = 1 - stats.nct.cdf(critical, seeds - 1, effect * math.sqrt(seeds))
        assert power == pytest.approx(0.8, abs=0.01)


def test_experiments_compare_like_with_like() -> None:
    """Costs by experiment: preserved in Table 3's and Fig. 7's, raised alike in Table 4's."""
    named = [name for table in published()["tables"] for name in table.get("miniatures", ())]
    assert sorted(named) == sorted(EXPERIMENTS)
    for name, experiment in EXPERIMENTS.items():
        networks = {network_name(each) for each in experiment["networks"]}
        assert {claim[side] for claim in experiment["claims"] for side in claim} <= networks, name
    costs = {
        name: {
            network_name(each): miniatures.cost_of(each, DEFINED["data"][experiment["data"]])
            for each in experiment["networks"]
        }
        for name, experiment in EXPERIMENTS.items()
    }
    for name in ("cardinality", "cardinality_crops"):
        preserved = [cost.multiply_adds for cost in costs[name].values()]
        assert max(preserved) / min(preserved) < 1.1
    base, more, *twice = (cost.multiply_adds for cost in costs["complexity"].values())
    assert more / base == pytest.approx(1, abs=0.1)
    assert [cost / base for cost in twice] == pytest.approx([1.7] * 4, abs=0.05)
    for claim in EXPERIMENTS["parameters"]["claims"]:
        sizes = [costs["parameters"][claim[side]].parameters for side in ("better", "worse")]
        assert max(sizes) / min(sizes) < 1.25


def test_each_seed_splits_the_digits_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for each in miniatures.trainings(EXPERIMENTS["curves"], tmp_path, 2, quick=False)[::2]:
        miniatures.prepare_data(each, tmp_path, quick=False)
        root = miniatures.data_folder(tmp_path, "digits", each.seed, quick=False)
        train, test = (read_split(root, "cifar10", split) for split in ("train", "test"))
        assert (len(train), len(test)) == (360, 1437)
        assert train.pixels is not None and test.pixels is not None
        whole = {image.tobytes() for image in train.pixels}
        seen.append((whole, {image.tobytes() for image in test.pixels}))
        assert not whole & seen[-1][1]
    assert seen[0][0] != seen[1][0]
    assert seen[0][0] | seen[0][1] == seen[1][0] | seen[1][1]
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        miniatures.prepare_data(each, tmp_path / "other", quick=False)


def test_a_run_is_resumed_and_repeats_itself(tmp_path: Path) -> None:
    words = ["paper", "--run", str(tmp_path), "--quick", "--seeds", "2", "--only", "shortcuts"]
    assert main(words) == 0
    text = (tmp_path / "paper.md").read_text()
    result = json.loads((tmp_path / "paper.json").read_text())["shortcuts"]
    assert [len(each["error"]) for each in result["networks"]] == [2] * 4
    for each in result["networks"]:
        assert all(0 <= error <= 100 for error in each["error"])
        assert len({updates for updates, _ in each["test_curve"]}) == 2
        assert f"| {each['network']} " in text
    assert "These errors mean nothing" in text and "Not run here yet" in text
    picture = tmp_path / "paper_shortcuts.png"
    assert picture.stat().st_size < 60_000
    assert Image.open(picture).format == "PNG"
    assert not list(tmp_path.rglob("*.pth"))
    finished = sorted((tmp_path / "runs").glob("*/result.json"))
    assert len(finished) == 8
    before = [file.stat().st_mtime_ns for file in finished]
    lost = finished[0].read_text()
    finished[0].unlink()
    assert main(words) == 0
    assert [file.stat().st_mtime_ns for file in finished][1:] == before[1:]
    first, again = (json.loads(each) for each in (lost, finished[0].read_text()))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert main(["paper", "--output", str(tmp_path), "--check"]) == 0


def results(worse: list[float], better: list[float]) -> dict[str, Any]:
    errors = {"29, 1x16d": worse, "29, 8x4d": better}
    networks = [
        {
            "network": network_name(each),
            **{"parameters": 1, "multiply_adds": 1},
            **{"error": errors.get(network_name(each), worse), "train_error": worse},
            "seconds": [60.0] * len(worse),
        }
        for each in EXPERIMENTS["cardinality"]["networks"]
    ]
    made = {"quick": False, "date": "2026-01-01", "hardware": "a machine"}
    return {"cardinality": {"networks": networks, **made}}


@pytest.mark.parametrize(
    ("better", "said"),
    [
        ([4.0, 4.1, 3.9], "falls by 1.00 points (95 % interval 0.75 to 1.25). The paper's order"),
        ([6.0, 6.1, 5.9], "falls by -1.00 points (95 % interval -1.25 to -0.75). The opposite"),
        ([4.0, 6.0, 4.0], "The paper's order in the mean, but within chance"),
        ([6.0, 4.0, 6.0], "Not the paper's order, but within chance"),
    ],
)
def test_the_page_says_whether_the_order_shows(better: list[float], said: str) -> None:
    text = page(results([5.0, 5.0, 5.0], better))
    assert said in text
    if "chance" in said:
        # Differences 1, -1 and 1: effect 0.289, for which a paired t-test takes 97 seeds.
        assert "a difference of 0.33 points takes 97 seeds to show" in text
