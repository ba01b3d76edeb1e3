"""What every command has: --help at once, --run, --json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from resnext_det.evaluation import coco, compare, detections
from resnext_det.modeling.blocks import BLOCKS
from resnext_det.weights import imagenet_images, verifying
from resnext_det_cli import COMMANDS, convert, eval_imagenet, evaluate

ROOT = Path(__file__).resolve().parent.parent
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


def python(*words: object) -> subprocess.CompletedProcess[str]:
    """Run Python as a user does: with warnings as they are by default."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("command", [None, *COMMANDS, *TOOLS])
def test_help_comes_without_torch_and_with_its_examples(command: str | None) -> None:
    words = [ROOT / "tools" / command] if command in TOOLS else ["-m", "resnext_det_cli"]
    words += [command] if command in COMMANDS else []
    done = python("-X", "importtime", *words, "--help")
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
    examples = [line for line in done.stdout.splitlines() if line.startswith(f"    {program}")]
    assert examples, done.stdout
    assert all(line.count(program) == 1 for line in examples), "the lines were filled"


def test_what_the_parsers_offer_is_what_the_package_has() -> None:
    assert (detections.KINDS, tuple(coco.ENGINES)) == (evaluate.KINDS, evaluate.ENGINES)
    assert evaluate.RESAMPLES == compare.RESAMPLES
    assert tuple(sorted(BLOCKS)) == convert.FORMS
    assert typing.get_args(verifying.Program) == convert.PROGRAMS
    assert imagenet_images.INTERPOLATIONS == eval_imagenet.INTERPOLATIONS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--run", "x"], "add --eval-only or --resume"),
        (["train", "--config-file", "x", "--json"], "add --eval-only"),
        (["eval"], "one of the arguments --config-file --run is required"),
        (["eval", "--run", "none"], "--run none holds no config.yaml"),
        (["predict", "--run", "none", "--input", "README.md", "--output", "x"], "no config.yaml"),
        (["report", "a", "--run", "b"], "name the folder of one run"),
        (["check-data"], "required: --annotations"),
    ],
)
def test_what_is_refused(words: list[str], said: str) -> None:
    done = python("-m", "resnext_det_cli", *words)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert not done.stdout


def test_json_of_weights() -> None:
    done = python("-m", "resnext_det_cli", "weights", "--json", "--commercial")
    assert (done.returncode, done.stderr) == (0, "")
    listed = json.loads(done.stdout)
    assert all(entry["commercial"] for entry in listed)
    one = python("-m", "resnext_det_cli", "weights", "--json", listed[0]["name"])
    assert json.loads(one.stdout) == listed[0]


def test_json_of_complexity() -> None:
    done = python("-m", "resnext_det_cli", "complexity", "--json", "--template", "32x4d")
    counted = json.loads(done.stdout)
    assert counted["total"]["parameters"] == 25_028_904  # torchvision's resnext50_32x4d
    assert sum(part["parameters"] for part in counted["parts"]) == 25_028_904


def test_json_of_check_data(datasets: Path) -> None:
    file = datasets / "toy_coco" / "annotations" / "instances_val2017.json"
    words = ["-m", "resnext_det_cli", "check-data", "--annotations", file]
    done = python(*words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["images"], found["findings"]) == (6, [])
    content = json.loads(file.read_text())
    content["images"].append(content["images"][0])
    broken = datasets / "repeated.json"
    broken.write_text(json.dumps(content))
    done = python("-m", "resnext_det_cli", "check-data", "--annotations", broken, "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)["findings"]
    assert ("error", "image ids that repeat") in [
        (each["severity"], each["what"]) for each in found
    ]


def test_json_of_evaluate(datasets: Path, tmp_path: Path) -> None:
    """Perfect detections: the figures are known."""
    file = datasets / "toy_coco" / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    results = tmp_path / "results.json"
    keys = ("image_id", "category_id", "bbox")
    results.write_text(
        json.dumps([{**{k: a[k] for k in keys}, "score": 0.9} for a in content["annotations"]])
    )
    words = ["evaluate", "--annotations", file, "--results", results, "--output", tmp_path / "out"]
    done = python("-m", "resnext_det_cli", *words, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["bbox"]["figures"]
    assert figures["AP50"] == pytest.approx(100)
    assert "AP50" in done.stderr  # the table
