"""The commands as a user types them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from resnext_det.config_rules import PRECISIONS
from resnext_det.evaluation import coco, compare, detections
from resnext_det.modeling.blocks import BLOCKS
from resnext_det.weights import verifying
from resnext_det_cli import COMMANDS, convert, evaluate, flags, main

ROOT = Path(__file__).resolve().parent.parent
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
TOY = ["--config-file", "configs/faster_rcnn_X_26_8x4d_FPN_toy.yaml"]
SHORT = ["SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)", "SOLVER.IMS_PER_BATCH", 2]
SHORT += ["SOLVER.BASE_LR", 0.01, "TEST.EVAL_PERIOD", 0, "SOLVER.WARMUP_ITERS", 1]

Tool = Callable[..., "subprocess.CompletedProcess[str]"]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture()
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process; return its exit code and what it printed."""

    def run(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("command", [None, *COMMANDS, *TOOLS])
def test_help_is_fast_and_shows_examples(command: str | None) -> None:
    words = [ROOT / "tools" / command] if command in TOOLS else ["-m", "resnext_det_cli"]
    words += [command] if command in COMMANDS else []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert not [line for line in lines if not line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "argparse" in imported
    assert not imported & {"torch", "detectron2", "numpy", "resnext_det", "yaml"}
    if command is None:
        assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
        return
    program = f"python tools/{command}" if command in TOOLS else f"resnext-det {command}"
    assert f"\n    {program}" in done.stdout


def test_choices_match_the_package() -> None:
    assert (detections.KINDS, tuple(coco.ENGINES)) == (evaluate.KINDS, evaluate.ENGINES)
    assert evaluate.RESAMPLES == compare.RESAMPLES
    assert tuple(sorted(BLOCKS)) == convert.FORMS
    assert PRECISIONS == flags.PRECISIONS
    assert typing.get_args(verifying.Program) == convert.PROGRAMS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("train --run x", "add --eval-only or --resume"),
        ("train", "name what to train: --data FOLDER, --config-file or --run"),
        ("train --config-file x --epochs 3 --dry-run", "--epochs, --dry-run is for --data"),
        ("train --data x --config-file y --model x50", "both name a detector"),
        ("train --data x --epochs nan", "--epochs is nan"),
        ("train --data no/such/folder", "no/such/folder is not a folder"),
        ("train --config-file x --json", "add --eval-only"),
        ("train --config-file no/such/file.yaml", "faster_rcnn_X_50_32x4d_FPN_paper"),
        (
            "eval --run x --precision bf16 MODEL.RESNEXT.PRECISION fp32",
            "--precision bf16 contradicts MODEL.RESNEXT.PRECISION fp32: give one",
        ),
        (
            "predict --run x --input y --output z --opts MODEL.RESNEXT.PRECISION stock "
            "--precision fp32",
            "--precision fp32 contradicts",
        ),
        ("train --config-file x --precision fp8", "invalid choice: 'fp8'"),
        ("eval", "name what to evaluate: --run, --config-file or --artifact"),
        (
            "eval --artifact x.onnx MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.5",
            "'MODEL.ROI_HEADS.SCORE_THRESH_TEST' cannot be set with --artifact",
        ),
        ("export --run x --output a.pt2 --opset 17", "--opset is of ONNX"),
        ("eval --run none", "the folder none holds no config.yaml"),
        ("predict --run none README.md", "neither the folder of a run nor a checkpoint"),
        ("report a --run b", "name the folder of one run"),
        ("check-data", "name what to check: --data FOLDER, or --annotations FILE"),
        ("check-data --annotations x INPUT.FORMAT RGB", "are for --data"),
        ("complexity --template 32x4", "write it like 32x4d"),
        ("weights resnext50_32x4d.tv_in1k --commercial", "the filters are for the list"),
    ],
)
def test_refuses_in_one_line(line: str, said: str, cli: Cli) -> None:
    code, out, err = cli(*line.split())
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("run", "said"), [("", "it records no run"), ("gone", "gone holds no config.yaml")]
)
def test_an_artifact_whose_run_is_unknown(
    run: str, said: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()  # not the run's
    monkeypatch.chdir(tmp_path)
    artifact = SimpleNamespace(description=SimpleNamespace(run=run))
    monkeypatch.setattr("resnext_det.runtime.load", lambda file: artifact)
    code, _, err = cli("eval", "--artifact", "detector.onnx")
    assert code == 2
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["MODEL.RESNETS.DEPHT", 50], "did you mean MODEL.RESNETS.DEPTH?"),
        (["DATASETS.TRAIN", "('toy_coco_trian',)"], "no data set 'toy_coco_trian'"),
        (["--eval-only", "--resume"], "holds no checkpoint"),
        (["OUTPUT_DIR", "/dev/null/run"], "cannot be written"),
        (["TEST.ENGINE", "fast"], "hotcoco"),
    ],
)
def test_train_refuses_before_it_starts(
    words: list[object], said: str, cli: Cli, datasets: Path, tmp_path: Path
) -> None:
    toy = datasets / "toy_coco" / "annotations"
    words = ["--train-json", toy / "instances_train2017.json", *words]
    words += ["--test-json", toy / "instances_val2017.json"]
    if "DATASETS.TRAIN" in words:
        words = ["DATASETS.TRAIN", "('toy_coco_trian',)"]
    code, _, err = cli("train", *TOY, "OUTPUT_DIR", tmp_path / "run", *words)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert said in err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.pth"))


def test_json_is_all_that_is_printed(cli: Cli, datasets: Path, tmp_path: Path) -> None:
    code, out, _ = cli("weights", "--json", "--commercial")
    listed = json.loads(out)
    assert code == 0 and all(entry["commercial"] for entry in listed)
    assert json.loads(cli("weights", "--json", listed[0]["name"])[1]) == listed[0]

    counted = json.loads(cli("complexity", "--json", "--template", "32x4d")[1])
    assert counted["total"]["parameters"] == 25_028_904  # torchvision's resnext50_32x4d
    assert sum(part["parameters"] for part in counted["parts"]) == 25_028_904

    file = datasets / "toy_coco" / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    code, out, _ = cli("check-data", "--annotations", file, "--json")
    assert (code, json.loads(out)["findings"]) == (0, [])
    content["images"].append(content["images"][0])
    broken = tmp_path / "repeated.json"
    broken.write_text(json.dumps(content))
    code, out, _ = cli("check-data", "--annotations", broken, "--json")
    assert code == 1
    assert "error" in [finding["severity"] for finding in json.loads(out)["findings"]]

    results = tmp_path / "results.json"  # perfect detections
    keys = ("image_id", "category_id", "bbox")
    perfect = [{**{key: a[key] for key in keys}, "score": 0.9} for a in content["annotations"]]
    results.write_text(json.dumps(perfect))
    words = ["--annotations", file, "--results", results, "--output", tmp_path / "out", "--json"]
    _, out, err = cli("evaluate", *words)
    assert json.loads(out)["bbox"]["figures"]["AP50"] == pytest.approx(100)
    assert "AP50" in err  # the table


@pytest.fixture(scope="module")
def run(tool: Tool, datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pretraining, a conversion and a training."""
    folder = tmp_path_factory.mktemp("run")
    weights = folder / "pretraining" / "model_final.pth"
    data = str(datasets / "toy_coco")
    words = ["pretrain", "--recipe", "toy", "--data", data, "--output", str(weights.parent)]
    assert main([*words, "SOLVER.MAX_ITER", "2"]) == 0
    words = ["MODEL.WEIGHTS", weights, *TOY, "OUTPUT_DIR", folder, "--num-gpus", 1, *SHORT]
    words += ["--precision", "bf16"]
    first = tool("train_net.py", words, datasets)  # flags and overrides in any order
    assert first.returncode == 0, first.stderr
    assert f"145/145 backbone tensors loaded from {weights}" in first.stdout
    assert "iter: 3  total_loss: " in first.stdout
    return folder


def test_resumes_where_it_stopped(run: Path, tool: Tool, datasets: Path) -> None:
    words = [*TOY, "--resume", "OUTPUT_DIR", run, *SHORT, "SOLVER.MAX_ITER", 6]
    words += ["MODEL.RESNEXT.PRECISION", "bf16", "--precision", "bf16"]
    done = tool("train_net.py", words, datasets)
    assert done.returncode == 0, done.stderr
    assert "at iteration 4 of 6" in done.stdout
    assert torch.load(run / "model_final.pth", weights_only=True)["iteration"] == 5


def test_run_folder_is_enough(run: Path, tool: Tool, cli: Cli, datasets: Path) -> None:
    done = tool("train_net.py", ["--run", run, "--eval-only", "--json"], datasets)
    assert done.returncode == 0, done.stderr
    written = json.loads((run / "inference" / "metrics.json").read_text())
    assert json.loads(done.stdout) == written
    evaluated = written["datasets"]["toy_coco_minival"]
    assert (len(evaluated["figures"]), evaluated["image_count"]) == (12, 6)
    assert written["precision"] == "bf16"  # as trained
    assert all(v is None or math.isfinite(v) for v in evaluated["figures"].values())
    _, out, _ = cli("report", "--run", run)
    assert out.splitlines()[-1] == f"Report: {run / 'report.html'}"
    pictures = datasets / "toy_coco" / "val2017"
    broken = run / "broken.jpg"
    broken.write_bytes(b"no picture")
    words = ["--run", run, "--input", pictures, broken, "--output", run / "drawn"]
    code, _, err = cli("predict", *words)
    assert code == 1 and "broken.jpg" in err.splitlines()[-1]
    drawn = sorted(path.name for path in (run / "drawn").glob("*.jpg"))
    assert drawn == sorted(path.name for path in pictures.iterdir())
    code, out, _ = cli("convert", run / "pretraining" / "model_final.pth", run / "converted.pth")
    assert "ResNeXt-26 8x4d (torchvision layout): 145 tensors converted" in out


def test_training_names_a_truncated_image(tool: Tool, datasets: Path, tmp_path: Path) -> None:
    """A worker of the data loader meets it, and wraps the error in a traceback of its own."""
    shutil.copytree(datasets / "toy_coco", tmp_path / "toy_coco")
    for file in (tmp_path / "toy_coco" / "train2017").iterdir():
        file.write_bytes(file.read_bytes()[:3000])
    words = [*TOY, *SHORT, "OUTPUT_DIR", tmp_path / "run", "DATALOADER.NUM_WORKERS", 2]
    done = tool("train_net.py", words, tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the image") and ".jpg cannot be read" in last
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `make demo`; its toy data is in the folder above."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        ["make", "demo", f"RUN={folder / 'run'}"],
        cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Report: {folder / 'run' / 'report.html'}"
    return folder / "run"


@pytest.mark.slow
def test_demo_reaches_the_readmes_figures(demo: Path) -> None:
    metrics = json.loads((demo / "inference" / "metrics.json").read_text())
    figures = metrics["datasets"]["toy_coco_minival"]["figures"]
    assert figures["AP50"] >= 70
    assert None not in figures.values()
    assert (demo / "report.html").stat().st_size < 10_000_000


@pytest.mark.slow
def test_every_precision_evaluates_alike(demo: Path, tool: Tool) -> None:
    """AP within 0.3 in low precision; in fp32 every detection within 0.01 pixels and 1e-4."""
    found, average = {}, {}
    for precision in PRECISIONS:
        output = demo.parent / precision
        words = ["--run", demo, "--precision", precision, "--eval-only", "OUTPUT_DIR", output]
        done = tool("train_net.py", words, demo.parent)
        assert done.returncode == 0, done.stderr
        inference = output / "inference"
        metrics = json.loads((inference / "metrics.json").read_text())
        assert metrics["precision"] == precision
        average[precision] = metrics["datasets"]["toy_coco_minival"]["figures"]["AP"]
        found[precision] = json.loads((inference / "detections_toy_coco_minival.json").read_text())
    assert average["fp32"] == pytest.approx(average["stock"], abs=0.01)
    assert average["bf16"] == pytest.approx(average["fp32"], abs=0.3)
    assert average["fp16"] == pytest.approx(average["fp32"], abs=0.3)
    places = {}
    for one in found["fp32"]:
        places.setdefault((one["image_id"], one["category_id"]), []).append(one)
    sure = [each for each in found["stock"] if each["score"] > 0.05]
    assert len(sure) > 500
    for each in sure:
        there = places[each["image_id"], each["category_id"]]
        assert any(
            one["bbox"] == pytest.approx(each["bbox"], abs=0.01)
            and one["score"] == pytest.approx(each["score"], abs=1e-4)
            for one in there
        ), each


PHOTOGRAPHS = [
    *["--config-file", "configs/faster_rcnn_X_50_32x4d_FPN_paper.yaml"],
    *["DATASETS.TRAIN", "('coco_2017_val',)", "DATASETS.TEST", "('coco_2014_minival',)"],
    *["MODEL.RESNETS.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", 0],
    *["INPUT.MIN_SIZE_TRAIN", "(160,)", "INPUT.MAX_SIZE_TRAIN", 224],
    *["INPUT.MIN_SIZE_TEST", 160, "INPUT.MAX_SIZE_TEST", 224, "DATALOADER.NUM_WORKERS", 0],
    *["SOLVER.REFERENCE_WORLD_SIZE", 0, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.002],
    *["SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", 10, "SEED", 1],
    *["SOLVER.CLIP_GRADIENTS.ENABLED", True, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 256],
]


@pytest.mark.slow
@pytest.mark.real
def test_photographs(tool: Tool, real_photographs: Path, tmp_path: Path) -> None:
    """The shipped ResNeXt-50 config on real pictures: train, stop, resume, evaluate, draw.

    It learns from scratch, without ImageNet weights, and so with GN instead of FrozenBN.
    """
    (tmp_path / "coco").symlink_to(real_photographs)
    output = tmp_path / "run"
    common = [*PHOTOGRAPHS, "OUTPUT_DIR", output]
    for end, more in ((60, []), (80, ["--resume"])):
        done = tool("train_net.py", [*common, "SOLVER.MAX_ITER", end, *more], tmp_path)
        assert done.returncode == 0, done.stderr
    assert "at iteration 60 of 80" in done.stdout
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = {entry["iteration"]: entry["total_loss"] for entry in events if "total_loss" in entry}
    assert list(losses) == list(range(80))
    assert sum(losses[n] for n in range(70, 80)) / 10 < sum(losses[n] for n in range(5)) / 5 / 2
    weights = ["MODEL.WEIGHTS", output / "model_final.pth"]
    done = tool("train_net.py", [*common, "--eval-only", *weights], tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((output / "inference" / "metrics.json").read_text())
    evaluated = figures["datasets"]["coco_2014_minival"]
    assert evaluated["image_count"] == 29
    assert evaluated["annotations"].endswith("instances_val2017.json")
    picture = next((real_photographs / "val2017").iterdir())
    words = ["--config-file", PHOTOGRAPHS[1], "--input", picture, "--threshold", 0]
    words += ["--output", output / "drawn", "--opts", *PHOTOGRAPHS[2:], *weights]
    assert tool("demo.py", words, tmp_path).returncode == 0
    with Image.open(output / "drawn" / picture.name) as drawn, Image.open(picture) as original:
        assert drawn.size == original.size
    assert tool("report.py", [output]).returncode == 0
