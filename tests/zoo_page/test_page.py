"""MODEL_ZOO.md: what it says against torchvision, closed forms, the data; and how runs get in."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
import yaml

from resnext_det import Template, load_config, model_zoo
from resnext_det.checkpoints.run import run_record
from resnext_det.checkpoints.writing import RUN, write_checkpoint
from resnext_det.errors import ConfigError, DatasetError, ResNeXtError, WeightsError
from resnext_det.files import write_text
from resnext_det.pretrained.catalog import ENTRIES, entry
from resnext_det.pretrained.fit import Needs, check_config
from resnext_det.published import results as published
from resnext_det.published.results import ROWS
from resnext_det.zoo_page.page import count_configs, render
from resnext_det.zoo_page.results import (
    OwnResult,
    read_results,
    result_of_run,
    write_result,
)
from resnext_det.zoo_page.rows import STARTS_FROM, Config

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "MODEL_ZOO.md"
TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
X50 = "faster_rcnn_X_50_32x4d_FPN_paper"
ON_COCO = [name for name in model_zoo.names() if name != TOY]


@pytest.fixture(scope="session")
def counted() -> list[Config]:
    """Every shipped config with the results of this checkout; counting takes some 10 seconds."""
    return count_configs(read_results(ROOT / "results"))


@pytest.fixture(scope="session")
def page(counted: list[Config]) -> str:
    return render(counted)


def tables(page: str, first: str) -> Iterator[list[list[str]]]:
    """Yield the cells of every table whose first heading is this one."""
    for block in re.findall(rf"^\| {first} \|.*\n\|[-:|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE):
        yield [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]


def lines_of(page: str) -> dict[str, list[str]]:
    """Return the cells of the first table, by the name of the config."""
    (first, *_) = (rows for rows in tables(page, "Config") if len(rows[0]) == 8)
    return {re.findall("`(.*)`", cells[0])[0]: cells for cells in first}


def section(page: str, name: str) -> str:
    return page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def test_the_page_is_up_to_date(page: str) -> None:
    """If this fails: python tools/model_zoo.py."""
    assert PAGE.read_text(encoding="utf-8") == page


def test_the_page_is_the_same_again(counted: list[Config], page: str) -> None:
    assert render(list(reversed(counted))) == page


def test_every_config_is_on_the_page(page: str) -> None:
    assert sorted(lines_of(page)) == model_zoo.names()
    for name, cells in lines_of(page).items():
        (link,) = re.findall(r"\]\((.*)\)", cells[0])
        assert (ROOT / link).is_file()
        (heading, anchor) = re.findall(r"\[(.*)\]\(#(.*)\)", cells[1])[0]
        assert anchor == heading.lower().replace(" ", "-")
        assert f"`{name}`" in section(page, heading)


# Of detectors with FrozenBN as Detectron2 builds them: counted in Detectron2 alone.
DETECTORS = {
    (50, "1x64d"): 41_699_936,
    (50, "32x4d"): 41_156_704,
    (101, "1x64d"): 60_639_840,
    (101, "32x4d"): 60_235_872,
    (101, "64x4d"): 99_448_416,
    (101, "32x8d"): 104_784_480,
}
BLOCKS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}


def network_of(name: str) -> tuple[int, str]:
    resnets = model_zoo.get_config(name).MODEL.RESNETS
    return resnets.DEPTH, f"{resnets.NUM_GROUPS}x{resnets.WIDTH_PER_GROUP}d"


@pytest.mark.parametrize("name", ON_COCO)
def test_parameters_are_torchvisions(name: str, page: str) -> None:
    depth, notation = network_of(name)
    groups, width = re.findall(r"\d+", notation)
    with torch.device("meta"):
        theirs = torchvision.models.ResNet(
            *(torchvision.models.resnet.Bottleneck, BLOCKS[depth]),
            groups=int(groups),
            width_per_group=int(width),
        )
    # Scales and shifts are no parameters of a FrozenBN, and a detector has no classifier.
    backbone = sum(m.weight.numel() for m in theirs.modules() if isinstance(m, torch.nn.Conv2d))
    cells = lines_of(page)[name]
    assert cells[3] == f"{backbone:,}"
    assert cells[2] == f"{DETECTORS[depth, notation]:,}"


@pytest.mark.parametrize("name", ON_COCO)
def test_multiply_adds_by_hand(name: str, page: str) -> None:
    """At 800 x 1344, as 1333 is padded to 32: backbone, FPN, RPN on p2 to p6, heads."""
    depth, notation = network_of(name)
    # Without the classifier's 2048 x 1000.
    backbone = Template(notation).network(depth, 800, 1344).multiply_adds - 2_048_000
    cells = [800 // stride * (1344 // stride) for stride in (4, 8, 16, 32)]
    laterals = sum(
        n * channels * 256 for n, channels in zip(cells, (256, 512, 1024, 2048), strict=True)
    )
    outputs = sum(cells) * 9 * 256 * 256
    rpn = (sum(cells) + 13 * 21) * (9 * 256 * 256 + 256 * (3 + 12))
    box = 1000 * (256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * (81 + 320))
    total = backbone + laterals + outputs + rpn + box
    assert lines_of(page)[name][4] == f"{total / 1e9:.2f} G"


SCHEDULES = {  # images, learning rate, falls, iterations, epochs
    "paper": ("16", "0.02", "0.002 at 120,000", "180,000", "24.3"),
    "1x": ("16", "0.02", "0.002 at 60,000, 0.0002 at 80,000", "90,000", "12.2"),
    "3x": ("16", "0.02", "0.002 at 210,000, 0.0002 at 250,000", "270,000", "36.5"),
    "128": ("128", "0.16", "0.016 at 15,000", "22,500", "24.3"),
    "toy": ("8", "0.04", "0.004 at 230", "300", "2.4"),
}
WARMUPS = {"toy": "50 iterations, from 4e-05", "128": "1,000 iterations, from 0.00016"}


def test_schedules_by_hand(page: str) -> None:
    for name in model_zoo.names():
        kind = name.rpartition("_")[2]
        images, rate, falls, iterations, epochs = SCHEDULES[kind]
        (cells,) = [
            c for t in tables(page, "Config") for c in t if c[0] == f"`{name}`" and c[1].isdigit()
        ]
        warmup = WARMUPS.get(kind, "1,000 iterations, from 2e-05")
        assert cells[1:] == [images, rate, warmup, falls, iterations, epochs]
        assert lines_of(page)[name][5] == epochs


def test_every_published_figure_is_in_the_data_and_has_its_source(page: str) -> None:
    shown = [cells for rows in tables(page, "Published by") for cells in rows]
    expected = [
        (row.source, row.setting.neck, f"{row.AP:.1f}", f"{row.AP50:.1f}" if row.AP50 else "")
        for row in ROWS
    ]
    assert sorted((c[0], c[1], c[3], c[4]) for c in shown) == sorted(expected, key=str)
    for cells in shown:
        for number in filter(None, cells[6].split(", ")):
            assert re.search(rf"^{number}\. ", section(page, "Notes"), re.MULTILINE)
    caveats = {text for row in ROWS for text in row.caveats}
    notes = re.findall(r"^\d+\. (.*)$", section(page, "Notes"), re.MULTILINE)
    assert set(notes) == caveats
    assert len(notes) == len(caveats)
    for cells in lines_of(page).values():
        figures = re.findall(r"\d\d\.\d", cells[6])
        assert set(figures) <= {f"{row.AP:.1f}" for row in ROWS}


def test_published_rows_stand_under_their_network(page: str) -> None:
    for (depth, template), heading in {
        (50, "1x64d"): "ResNet-50",
        (50, "32x4d"): "ResNeXt-50 32x4d",
        (101, "32x8d"): "ResNeXt-101 32x8d",
    }.items():
        (rows,) = tables(section(page, heading), "Published by")
        expected = [r.source for r in published.published_results(depth, template)]
        assert [cells[0] for cells in rows] == expected
    assert "Neither Detectron2 nor Detectron nor mmdetection publishes a ResNeXt-50" in page
    assert lines_of(page)[X50][6] == "paper 27.5; FPN with GN + WS 40.7"
    r50 = lines_of(page)["faster_rcnn_R_50_FPN_paper"][6]
    assert r50 == "paper 26.5; FPN 36.7 to 40.3; FPN with GN + WS 39.7"


@pytest.mark.parametrize("number", [0, 14, len(ROWS) - 1])
def test_a_row_less_makes_another_page(
    number: int, counted: list[Config], page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ROWS[:number] + ROWS[number + 1 :]
    monkeypatch.setattr(published, "ROWS", rows)
    shown = [
        [cells[:5] for table in tables(text, "Published by") for cells in table]
        for text in (page, render(counted))
    ]
    assert len(shown[0]) == len(shown[1]) + 1


def test_weights_to_start_from_fit_and_may_be_used(page: str) -> None:
    networks = {network_of(name) for name in ON_COCO}
    assert set(STARTS_FROM) == networks
    for name in ON_COCO:
        cfg = model_zoo.get_config(name)
        assert cfg.MODEL.WEIGHTS == ""
        weights = entry(STARTS_FROM[network_of(name)][0])
        check_config(Needs.of_entry(weights), cfg)
        assert weights.commercial
        assert weights.imagenet_1k_only
        assert f"`resnext://{weights.name}`" in page
    named = re.findall(r"`(?:resnext://)?(resnex?t\d\w+\.\w+)`", page)
    for found in named:
        assert entry(found).imagenet_1k_only
    x50 = section(page, "ResNeXt-50 32x4d")
    assert "`resnext50_32x4d.fb_torch7` (77.8 %, non-commercial)" in x50
    # Of more than ImageNet-1K, or of another network.
    assert "fb_swsl" not in page
    assert "resnext101" not in x50


def test_nothing_was_trained_on_coco_here(counted: list[Config], page: str) -> None:
    assert "**Nothing was trained on COCO here.**" in page
    for name in ON_COCO:
        assert lines_of(page)[name][7] == "not trained here"
    result = replace(
        own_result(), config=X50, dataset="coco_2014_minival", images=5000, AP=39.04, AP50=60.0
    )
    configs = [replace(c, result=result) if c.name == X50 else c for c in counted]
    other = render(configs)
    assert "Nothing was trained on COCO here" not in other
    assert lines_of(other)[X50][7] == "39.0 (AP50 60.0)"
    assert f"| `{X50}` | coco_2014_minival, 5,000 images | 39.0 | 60.0 | `make it` |" in other


def test_without_any_result(counted: list[Config]) -> None:
    page = render([replace(config, result=None) for config in counted])
    assert lines_of(page)[TOY][7] == "not trained here"
    assert section(page, "What was measured here").strip() == "Nothing yet."


def own_result() -> OwnResult:
    return OwnResult(
        *(TOY, "toy_coco_minival", 120, 59.92, 84.0, "make it", "2 cores"),
        versions={"torch": "2.9.1"},
        date="2026-11-22",
        metrics_sha256="0" * 64,
        weights="model_final.pth",
        weights_sha256="1" * 64,
        trained_from="nothing, at random",
    )


def test_results_of_this_checkout(page: str) -> None:
    results = read_results(ROOT / "results")
    for name, result in results.items():
        assert result.command in section(page, "What was measured here")
        assert "/" not in result.hardware
        assert lines_of(page)[name][7].startswith(f"{result.AP:.1f} (AP50 {result.AP50:.1f})")
        assert f"Trained from: {result.trained_from}." in page
        assert f"Evaluated: `{result.weights}`, SHA-256 `{result.weights_sha256}`." in page


def write_run(
    folder: Path,
    config: str = TOY,
    overrides: Sequence[object] = (),
    dataset: str = "toy_coco_minival",
    images: int = 120,
    iterations: int = 300,
    AP: float | None = 61.25,
    weights: str | None = None,
    began_with: str = "",
) -> Path:
    """Write what a training and an evaluation leave in their folder."""
    folder.mkdir()
    cfg = load_config(config, [str(each) for each in overrides])
    (folder / "config.yaml").write_text(cfg.dump())
    lines = [{"iteration": n, "total_loss": 1.0} for n in range(0, iterations, 10)]
    lines += [{"iteration": iterations - 1, "total_loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = {
        "annotations": "/home/somebody/instances_val2017.json",
        "images": "/home/somebody/val2017",
        "detections": "detections.json",
        "image_count": images,
        "figures": {"AP": AP, "AP50": 82.5},
        "per_class": [],
    }
    cfg.defrost()
    cfg.MODEL.WEIGHTS = began_with
    record = run_record(cfg, (), {})
    for name, last in (("model_final", iterations), ("model_0000100", 100)):
        content = {"model": {"a": torch.zeros(1)}, "iteration": last - 1, RUN: record}
        write_checkpoint(content, folder / f"{name}.pth")
    metrics = {
        "weights": str(folder / "model_final.pth") if weights is None else weights,
        "versions": {"torch": "2.9.1"},
        "hardware": "2 cores",
        "datasets": {dataset: evaluation},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    os.utime(folder / "metrics.json", (1_700_000_000, 1_700_000_000))
    return folder


def test_a_run_becomes_a_result(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", overrides=["OUTPUT_DIR", tmp_path, "SEED", 7])
    result = result_of_run(run, "make demo")
    assert result == OwnResult(
        *(TOY, "toy_coco_minival", 120, 61.25, 82.5, "make demo", "2 cores"),
        versions={"torch": "2.9.1"},
        date="2023-11-14",
        metrics_sha256=hashlib.sha256((run / "metrics.json").read_bytes()).hexdigest(),
        weights="model_final.pth",
        weights_sha256=hashlib.sha256((run / "model_final.pth").read_bytes()).hexdigest(),
        trained_from="nothing, at random",
    )
    results = tmp_path / "results"
    written = write_result(results, result)
    assert written == results / f"{TOY}.json"
    assert "somebody" not in written.read_text()
    assert str(tmp_path) not in written.read_text()
    assert read_results(results) == {TOY: result}
    assert [path.name for path in results.iterdir()] == [written.name]


def test_a_run_on_coco_by_the_names_of_2017(tmp_path: Path) -> None:
    how = ["SOLVER.AMP.ENABLED", True, "SOLVER.IMS_PER_MICRO_BATCH", 1, "TEST.EVAL_PERIOD", 5000]
    sets = ["DATASETS.TRAIN", "('coco_2017_train',)", "DATASETS.TEST", "('coco_2017_val',)"]
    run = write_run(tmp_path / "run", X50, [*how, *sets], "coco_2017_val", 5000, 180_000)
    result = result_of_run(run, "it")
    assert (result.config, result.dataset, result.images) == (X50, "coco_2017_val", 5000)


def test_a_config_that_does_not_know_a_new_key(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["SOLVER"]["EMA"], config["TEST"]["BEST"]["PATIENCE"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert result_of_run(run, "it").config == TOY
    del config["SOLVER"]["MAX_ITER"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=f"nearest is {TOY}, .*SOLVER.MAX_ITER 300"):
        result_of_run(run, "it")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"overrides": ["SOLVER.MAX_ITER", 60]}, r"unlike there: SOLVER.MAX_ITER 300\."),
        ({"overrides": ["SOLVER.STEPS", "(200,)"]}, r"SOLVER.STEPS \(230,\)"),
        ({"overrides": ["MODEL.RESNETS.NORM", "BN"]}, "MODEL.RESNETS.NORM FrozenBN"),
        ({"overrides": ["TEST.BEST.PATIENCE", 2]}, "TEST.BEST.PATIENCE 0"),
        ({"overrides": ["DATASETS.TRAIN", "('mine',)"]}, "DATASETS.TRAIN toy_coco_train"),
        ({"overrides": ["DATASETS.TEST", "('mine',)"]}, "DATASETS.TEST toy_coco_minival"),
        ({"iterations": 299}, "ends at iteration 299 of 300"),
        ({"images": 6}, "no evaluation on the 120 images of toy_coco_minival"),
        ({"dataset": "mine"}, "no evaluation on the 120 images"),
        ({"AP": None}, "no AP and AP50"),
        (
            {"config": X50, "dataset": "coco_2014_minival", "images": 29, "iterations": 180_000},
            "no evaluation on the 5,000 images of COCO minival",
        ),
    ],
)
def test_what_is_no_run_of_a_shipped_config(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", **more)
    with pytest.raises((ConfigError, DatasetError), match=message):
        result_of_run(run, "it")


def test_the_figures_must_be_of_the_runs_own_last_checkpoint(tmp_path: Path) -> None:
    """Whatever evaluated them names it in one of two ways."""
    other = write_run(tmp_path / "other")
    own = write_run(tmp_path / "own", overrides=["OUTPUT_DIR", "output/own"], began_with="a.pth")
    for weights in ("output/own/model_final.pth", "output/own, iteration 300"):
        set_weights(own, weights)
        result = result_of_run(own, "it")
        assert (result.weights, result.trained_from) == (
            *("model_final.pth", "a.pth, which is not in the catalog"),
        )
    for weights in (
        str(other / "model_final.pth"),
        "/somewhere/else/other_model.pth",
        "/somewhere/else/model_final.pth",
        "output/own, iteration 200",
        "output/other, iteration 300",
        "",
        "a" * 5000,
        "\0/model_final.pth",
    ):
        set_weights(own, weights)
        with pytest.raises(WeightsError, match=r"which are no checkpoint of .*Evaluate the run: "):
            result_of_run(own, "it")
    set_weights(own, "output/own/model_0000100.pth")
    with pytest.raises(WeightsError, match=r"model_0000100\.pth, which is not .* iteration, 300"):
        result_of_run(own, "it")
    set_weights(own, str(tmp_path / "same" / "model_final.pth"))
    shutil.copytree(own, tmp_path / "same")
    assert result_of_run(own, "it").weights == "model_final.pth"


def set_weights(run: Path, weights: str) -> None:
    """Write what metrics.json has of the evaluated weights."""
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "weights": weights}))


def test_checkpoints_that_were_changed_or_are_of_another_config(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    file, checksum = run / "model_final.pth", run / "model_final.pth.sha256"
    sound = checksum.read_text()
    checksum.write_text("0" * 64 + sound[64:])
    with pytest.raises(WeightsError, match="is not what the training wrote: its SHA-256"):
        result_of_run(run, "it")
    checksum.unlink()
    with pytest.raises(WeightsError, match="sha256 cannot be read"):
        result_of_run(run, "it")
    write_checkpoint({"model": {"a": torch.zeros(1)}, "iteration": 299}, file)
    with pytest.raises(WeightsError, match="is not what the training wrote after its last"):
        result_of_run(run, "it")
    record = run_record(model_zoo.get_config(X50), (), {})
    write_checkpoint({"model": {"a": torch.zeros(1)}, "iteration": 299, RUN: record}, file)
    with pytest.raises(WeightsError, match=f"trained with another config than {TOY}"):
        result_of_run(run, "it")


def test_what_a_training_began_with_is_told(tmp_path: Path) -> None:
    tv = "resnext50_32x4d.tv_in1k"
    assert began(tmp_path, f"resnext://{tv}") == tv
    assert began(tmp_path, entry(tv).url) == tv
    assert began(tmp_path, "") == "nothing, at random"
    assert began(tmp_path, "https://a:b@c.org/d.pth?e=|f") == "d.pth, which is not in the catalog"
    names = (f"layer{n}.0.conv2.weight" for n in (1, 2, 3, 4))
    file = tmp_path / "mine`.pth"
    torch.save({"conv1.weight": torch.zeros(1), **{n: torch.zeros(1) for n in names}}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    expected = f"mine_.pth (SHA-256 {digest}), which is not in the catalog"
    assert began(tmp_path, str(file)) == expected


def began(folder: Path, weights: str) -> str:
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    return result_of_run(write_run(run, began_with=weights), "it").trained_from


@pytest.mark.parametrize("name", [e.name for e in ENTRIES.values() if not e.imagenet_1k_only])
def test_weights_of_more_than_imagenet_1k_are_refused(name: str, tmp_path: Path) -> None:
    for weights in (f"resnext://{name}", entry(name).url):
        with pytest.raises(ConfigError, match=f"began with {name}, which saw more images"):
            began(tmp_path, weights)


def test_a_training_that_began_with_a_detector_is_refused(tmp_path: Path) -> None:
    detector = {"roi_heads.a": torch.zeros(1), "backbone.bottom_up.a": torch.zeros(1)}
    torch.save({"model": detector}, tmp_path / "detector.pth")
    with pytest.raises(ConfigError, match=r"detector\.pth, a whole detector"):
        began(tmp_path, str(tmp_path / "detector.pth"))


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read as a config"),
        ("a: b: c", "cannot be read as a config"),
        ("a: !!python/tuple [1]", "cannot be read as a config"),
        ("[" * 5000, "cannot be read as a config"),
        ("- 1", "is no config"),
        ("a: " + "1" * 1_000_001, "too large"),
        (f"{BOMB}SOLVER: {{STEPS: *m, MAX_ITER: *m}}\n", "is no run of a shipped config"),
        ("SOLVER: {STEPS: '" + "(" * 900 + "'}", "is no run of a shipped config"),
    ],
)
def test_hostile_configs(text: str | None, message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    if text is not None:
        (run / "config.yaml").write_text(text)
    with pytest.raises(ResNeXtError, match=message):
        result_of_run(run, "it")


@pytest.mark.parametrize("command", ["", "a\nb", "a | b", "`a`", "<b>", "a" * 501])
def test_commands_that_would_break_the_page(command: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be one line"):
        result_of_run(write_run(tmp_path / "run"), command)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("AP", 100.5),
        ("AP", math.nan),
        ("AP", "60"),
        ("AP50", -1.0),
        ("images", 0),
        ("images", 1.5),
        ("config", X50),
        ("command", "a | b"),
        ("hardware", "<script>"),
        ("dataset", ["a"]),
        ("date", "yesterday"),
        ("metrics_sha256", "12"),
        ("weights_sha256", None),
        ("weights", "a\nb"),
        ("trained_from", "<b>"),
        ("versions", {"torch": "a\nb"}),
        ("versions", []),
    ],
)
def test_results_that_cannot_be_true(key: str, value: object, tmp_path: Path) -> None:
    file = write_result(tmp_path, own_result())
    assert read_results(tmp_path) == {TOY: own_result()}
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(DatasetError, match=f"json: {key} cannot be true"):
        read_results(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"AP": 1.0}'])
def test_files_that_are_no_results(text: str, tmp_path: Path) -> None:
    (tmp_path / f"{TOY}.json").write_text(text)
    with pytest.raises(DatasetError):
        read_results(tmp_path)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ResNeXtError, match="taken cannot be written"):
        write_text(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.fixture()
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """tools/model_zoo.py in this process, where the detectors are counted already."""
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "model_zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["model_zoo.py", *map(str, words)])
        module.main()

    return call


def test_check_compares_and_writes_nothing(
    script: Callable[..., None], page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script("--check")
    assert "is up to date" in capsys.readouterr().out
    other = tmp_path / "MODEL_ZOO.md"
    for found in (page.replace("27.5", "28.5"), page + "\n", None):
        if found is not None:
            other.write_text(found)
        with pytest.raises(SystemExit) as ended:
            script("--check", "--output", other)
        assert ended.value.code == 1
        assert "out of date: run python tools/model_zoo.py" in capsys.readouterr().err
        assert (other.read_text() if other.exists() else None) == found
        other.unlink(missing_ok=True)


def test_a_run_is_added_and_the_page_written(
    script: Callable[..., None], page: str, tmp_path: Path
) -> None:
    run, output, results = write_run(tmp_path / "run"), tmp_path / "out.md", tmp_path / "results"
    script("--add", run, "--command", "make it", "--output", output, "--results", results)
    written = output.read_text(encoding="utf-8")
    assert lines_of(written)[TOY][7] == "61.2 (AP50 82.5) on the toy data"
    assert list(read_results(results)) == [TOY]
    script("--check", "--output", output, "--results", results)
    assert written != page


def test_bad_input_ends_in_one_line(tool: Callable[..., Any], tmp_path: Path) -> None:
    done = tool("model_zoo.py", ["--add", tmp_path, "--command", "it", "--output", tmp_path / "o"])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'metrics.json'}")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
