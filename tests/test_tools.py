"""The commands as a user types them, on a small toy data set."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from PIL import Image

Tool = Callable[..., "CompletedProcess[str]"]

TOY = ["--config-file", "configs/faster_rcnn_X_26_8x4d_FPN_toy.yaml"]
SHORT = ["SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)", "SOLVER.IMS_PER_BATCH", 2]
SHORT += ["SOLVER.BASE_LR", 0.01, "TEST.EVAL_PERIOD", 0, "SOLVER.WARMUP_ITERS", 1]


@pytest.fixture(scope="module")
def run(tool: Tool, datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the main job: pretraining, training, resuming, evaluation and report."""
    folder = tmp_path_factory.mktemp("run")
    weights = folder / "toy.pth"
    tool(
        "pretrain_toy.py", [weights, "--updates", 2, "--data", datasets / "toy_coco"]
    ).check_returncode()
    first = tool(
        "train_net.py",
        # Flags and overrides in any order.
        ["MODEL.WEIGHTS", weights, *TOY, "OUTPUT_DIR", folder, "--num-gpus", 1, *SHORT],
        datasets,
    )
    assert first.returncode == 0, first.stderr
    assert f"145/145 backbone tensors loaded from {weights}" in first.stdout
    assert "2 left out: fc.weight, fc.bias" in first.stdout
    assert "iteration 4/4: loss" in first.stdout
    return folder


def test_resume_goes_on_where_the_run_stopped(run: Path, tool: Tool, datasets: Path) -> None:
    arguments = [*TOY, "--resume", "OUTPUT_DIR", run, *SHORT, "SOLVER.MAX_ITER", 6]
    other = tool("train_net.py", [*arguments, "MODEL.RESNEXT.FORM", "concatenated"], datasets)
    assert other.returncode == 2
    assert "is the checkpoint of another model" in other.stderr.splitlines()[-1]
    done = tool("train_net.py", arguments, datasets)
    assert done.returncode == 0, done.stderr
    assert "at iteration 4 of 6" in done.stdout
    checkpoint = torch.load(run / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 5


def test_a_run_folder_is_enough_to_evaluate_report_and_draw(
    run: Path, tool: Tool, datasets: Path
) -> None:
    done = tool("train_net.py", ["--run", run, "--eval-only", "--json"], datasets)
    assert done.returncode == 0, done.stderr
    written = json.loads((run / "inference" / "metrics.json").read_text())
    assert json.loads(done.stdout) == written
    evaluated = written["datasets"]["toy_coco_minival"]
    assert len(evaluated["figures"]) == 12
    assert evaluated["image_count"] == 6
    assert all(v is None or math.isfinite(v) for v in evaluated["figures"].values())
    done = tool("report.py", ["--run", run])
    assert done.stdout.splitlines()[-1] == f"Report: {run / 'report.html'}"
    pictures = datasets / "toy_coco" / "val2017"
    broken = run / "broken.jpg"
    broken.write_bytes(b"no picture")
    arguments = ["--run", run, "--input", pictures, broken, "--output", run / "drawn"]
    done = tool("demo.py", arguments, datasets)
    assert done.returncode != 0
    assert "broken.jpg" in done.stderr.splitlines()[-1]
    drawn = sorted(path.name for path in (run / "drawn").glob("*.jpg"))
    assert drawn == sorted(path.name for path in pictures.iterdir())


def test_conversion(run: Path, tool: Tool, tmp_path: Path) -> None:
    done = tool("convert_weights.py", [run / "toy.pth", tmp_path / "converted.pth"])
    assert done.returncode == 0, done.stderr
    assert "ResNeXt-26 8x4d (torchvision layout): 145 tensors converted" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["MODEL.RESNETS.DEPHT", 50], "did you mean MODEL.RESNETS.DEPTH?"),
        (["MODEL.RESNETS.NUM_GROUPS", 0], "MODEL.RESNETS.NUM_GROUPS is 0"),
        (["MODEL.RESNETS.DEPTH", 51], "a ResNeXt has depth 26, 50, 101, 152, 200"),
        (["MODEL.RESNETS.STRIDE_IN_1X1", True], "STRIDE_IN_1X1 is True"),
        (["--eval-only", "--resume"], "holds no checkpoint"),
        (["--eval-only"], "MODEL.WEIGHTS is empty"),
        (["MODEL.WEIGHTS", "none.pth"], "there is no checkpoint none.pth"),
        (["DATASETS.TRAIN", "('toy_coco_trian',)"], "no data set 'toy_coco_trian'"),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments: list[object], said: str, tool: Tool, datasets: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    done = tool("train_net.py", [*TOY, "OUTPUT_DIR", output, *arguments], datasets)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert "Traceback" not in done.stderr
    assert not list(output.glob("*.pth"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named_in_training(
    workers: int, tool: Tool, datasets: Path, tmp_path: Path
) -> None:
    shutil.copytree(datasets / "toy_coco", tmp_path / "toy_coco")
    for file in (tmp_path / "toy_coco" / "train2017").iterdir():
        file.write_bytes(file.read_bytes()[:3000])
    arguments = [*TOY, *SHORT, "OUTPUT_DIR", tmp_path / "run", "DATALOADER.NUM_WORKERS", workers]
    done = tool("train_net.py", arguments, tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the image")
    assert ".jpg cannot be read" in last


def test_an_output_folder_that_cannot_be_written(
    tool: Tool, datasets: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    done = tool("train_net.py", [*TOY, "OUTPUT_DIR", blocked / "run"], datasets)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr.splitlines()[-1]


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

    It learns from scratch, as no ImageNet weights are here, and so with GN in place of FrozenBN.
    """
    (tmp_path / "coco").symlink_to(real_photographs)
    output = tmp_path / "run"
    common = [*PHOTOGRAPHS, "OUTPUT_DIR", output]
    first = tool("train_net.py", [*common, "SOLVER.MAX_ITER", 60], tmp_path)
    assert first.returncode == 0, first.stderr
    second = tool("train_net.py", [*common, "SOLVER.MAX_ITER", 80, "--resume"], tmp_path)
    assert second.returncode == 0, second.stderr
    assert "at iteration 60 of 80" in second.stdout
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = {entry["iteration"]: entry["total_loss"] for entry in events if "total_loss" in entry}
    assert list(losses) == list(range(80))
    assert sum(losses[n] for n in range(70, 80)) / 10 < sum(losses[n] for n in range(5)) / 5 / 2
    weights = ["MODEL.WEIGHTS", output / "model_final.pth"]
    third = tool("train_net.py", [*common, "--eval-only", *weights], tmp_path)
    assert third.returncode == 0, third.stderr
    figures = json.loads((output / "inference" / "metrics.json").read_text())
    evaluated = figures["datasets"]["coco_2014_minival"]
    assert evaluated["image_count"] == 29
    assert evaluated["annotations"].endswith("instances_val2017.json")
    picture = next((real_photographs / "val2017").iterdir())
    arguments = ["--config-file", PHOTOGRAPHS[1], "--input", picture, "--threshold", 0]
    arguments += ["--output", output / "drawn", "--opts", *PHOTOGRAPHS[2:], *weights]
    assert tool("demo.py", arguments, tmp_path).returncode == 0
    with Image.open(output / "drawn" / picture.name) as drawn, Image.open(picture) as original:
        assert drawn.size == original.size
    page = tool("report.py", [output])
    assert page.returncode == 0, page.stderr
