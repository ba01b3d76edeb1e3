"""RPN and Fast R-CNN one after the other: killed anywhere, with shared features, by two processes.

One script makes all runs of one process, and so imports everything only once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from resnext_det.config import load_config
from resnext_det.engine.two_step import RECORD, TwoStep
from resnext_det.errors import ConfigError, WeightsError
from resnext_det_cli.two_step import _both, _overrides
from tests.conftest import ROOT, Tool

TOY = "fast_rcnn_X_26_8x4d_C4_toy"
WORDS = ["--config-file", TOY, "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()"]
WORDS += ["rpn.SOLVER.MAX_ITER", "3", "fast_rcnn.SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1"]
WORDS += [
    "INPUT.MIN_SIZE_TRAIN",
    "64",
    "INPUT.MIN_SIZE_TEST",
    "64",
    "SOLVER.CHECKPOINT_PERIOD",
    "2",
]
WORDS += ["rpn.MODEL.PROPOSAL_GENERATOR.MIN_SIZE", "0"]
# Before the third update of the RPN; after its last, but before it counts as finished; before the
# eighth image to propose for; before the third update of Fast R-CNN. Counted are updates, images
# and records.
KILLS = (4, 3, 10, 16)

SCRIPT = """
import os, signal, sys
from pathlib import Path
from resnext_det.data.proposals import ProposalWriter
from resnext_det.engine.checkpoints import Checkpointer
from resnext_det.engine.train_loop import TrainLoop
from resnext_det.engine.two_step import TwoStep
from resnext_det_cli import main

# At once, as what a killed run resumes from decides when the next one is killed.
save = Checkpointer.save
Checkpointer.save = lambda self, name, background=False, **more: save(self, name, **more)

def run(command, *words, kill=0):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    events = 0

    def counted(function):
        def call(*arguments, **more):
            nonlocal events
            events += 1
            if events == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)
        return call

    for owner, name in ((TrainLoop, "run_step"), (ProposalWriter, "add"), (TwoStep, "record")):
        setattr(owner, name, counted(getattr(owner, name)))
    os._exit(main([command, *map(str, words)]))

folder, kills, words = Path(sys.argv[1]), eval(sys.argv[2]), sys.argv[3:]
whole, killed, shared = (folder / name for name in ("whole", "killed", "shared"))
assert run("two-step", "--output", whole, *words) == 0
for kill in kills:
    assert run("two-step", "--output", killed, *words, kill=kill) == -signal.SIGKILL
assert run("two-step", "--output", killed, *words) == 0
toy = Path(os.environ["DETECTRON2_DATASETS"]) / "toy_coco"
own = "--train-json", toy / "annotations" / "instances_train2017.json"
own += "--test-json", toy / "annotations" / "instances_val2017.json"
assert run("two-step", "--output", shared, *words, "--share", *own) == 0
again = "OUTPUT_DIR", folder / "again"
saved = "--save-proposals", folder / "again.safetensors"
assert run("eval", "--run", whole / "rpn", *saved, *again) == 0
assert run("eval", "--run", whole / "fast_rcnn", *again) == 0
assert run("eval", "--run", shared / "faster_rcnn") == 0
"""


@pytest.fixture(scope="module")
def runs(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_step")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), repr(KILLS), *WORDS],
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "log").write_text(done.stdout + done.stderr)
    return folder


def model(run: Path, step: str) -> dict[str, torch.Tensor]:
    file = run / step / "model_final.pth"
    found: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["model"]
    return found


def figures(run: Path, step: str) -> Any:
    return json.loads((run / step / "inference" / "metrics.json").read_text())["datasets"]


def test_a_killed_run_ends_with_the_same_bits(runs: Path) -> None:
    for name in ("toy_coco_train", "toy_coco_minival"):
        files = [runs / run / "proposals" / f"{name}.safetensors" for run in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert (load_file(files[0])["counts"] > 0).all()
    for step in ("rpn", "fast_rcnn"):
        whole, killed = model(runs / "whole", step), model(runs / "killed", step)
        assert whole.keys() == killed.keys()
        assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())
    for run in ("whole", "killed"):
        assert json.loads((runs / run / RECORD).read_text())["finished"] == [
            "rpn",
            "proposals",
            "fast_rcnn",
        ]
        assert not list((runs / run).rglob("*.partial"))
        for step in ("rpn", "fast_rcnn"):
            assert (runs / run / step / "config.yaml").is_file()
    logs = [(runs / "killed" / step / "log.txt").read_text() for step in ("rpn", "fast_rcnn")]
    assert all("resumed from" in log for log in logs)  # not trained again
    assert "resuming an evaluation that has predicted 7 images" in logs[0]
    (recall,) = figures(runs / "whole", "rpn").values()
    assert recall["proposals"]["AR@300"] > 0
    assert "AP50" in figures(runs / "killed", "fast_rcnn")["toy_coco_minival"]["figures"]
    log = (runs / "log").read_text()
    assert "rpn on toy_coco_minival: AR@100" in log
    assert "fast_rcnn on toy_coco_minival: AP 0" in log


def test_features_are_shared_on_demand_only(runs: Path) -> None:
    for run, shared in (("whole", False), ("shared", True)):
        rpn, fast_rcnn = (model(runs / run, step) for step in ("rpn", "fast_rcnn"))
        # The stem and res2 learn in neither.
        learned = [f"backbone.res{stage}.1.conv2.weight" for stage in (3, 4)]
        assert all(torch.equal(rpn[name], fast_rcnn[name]) is shared for name in learned)
        assert any(name.startswith("roi_heads.res5.") for name in fast_rcnn)
    # Each starts from the seed of its own step, not from wherever the RPN left off.
    key = "proposal_generator.rpn_head.conv.weight"
    assert torch.equal(model(runs / "whole", "rpn")[key], model(runs / "shared", "rpn")[key])


def test_shared_features_make_one_detector(runs: Path) -> None:
    """It detects in an image what its steps detect by way of a file."""
    scores = []
    for step in ("fast_rcnn", "faster_rcnn"):
        (file,) = (runs / "shared" / step / "inference").glob("detections_custom_coco_*.json")
        found = json.loads(file.read_text())
        scores.append(sorted(each["score"] for each in found))
    assert len(scores[0]) > 100
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    assert not (runs / "whole" / "faster_rcnn").exists()


def test_the_steps_are_run_folders(runs: Path) -> None:
    """Both can be evaluated, and the proposals saved, as those of a training."""
    saved = runs / "whole" / "proposals" / "toy_coco_minival.safetensors"
    assert (runs / "again.safetensors").read_bytes() == saved.read_bytes()
    (used,) = load_config(runs / "whole" / "fast_rcnn" / "config.yaml").DATASETS.PROPOSAL_FILES_TEST
    assert Path(used) == saved
    again = figures(runs, "again")["toy_coco_minival"]
    before = figures(runs / "whole", "fast_rcnn")["toy_coco_minival"]
    assert again["figures"] == before["figures"]


def run_of(folder: Path, *words: str, share: bool = False) -> TwoStep:
    configs = [
        load_config(TOY.replace("fast_rcnn", step), _overrides([*WORDS[2:], *words], step))
        for step in ("rpn", "fast_rcnn")
    ]
    return TwoStep.of(folder, configs[0], configs[1], argparse.Namespace(), share=share)


def test_another_run_in_the_same_folder_is_refused(runs: Path, tmp_path: Path) -> None:
    assert run_of(runs / "whole").finished() == ["rpn", "proposals", "fast_rcnn"]
    assert run_of(runs / "whole", "DATALOADER.NUM_WORKERS", "2").finished()
    for words, share, message in (
        (["rpn.SOLVER.BASE_LR", "0.01"], False, "rpn.SOLVER.BASE_LR was 0.04 and is 0.01"),
        (["fast_rcnn.SEED", "2"], False, "fast_rcnn.SEED was 1 and is 2"),
        ([], True, "--share was False and is True"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_of(runs / "whole", *words, share=share).finished()
    (tmp_path / "rpn").mkdir()
    (tmp_path / "rpn" / "last_checkpoint").touch()
    with pytest.raises(ConfigError, match="a training of another command"):
        run_of(tmp_path).finished()


def test_finds_the_config_of_the_other_step(tmp_path: Path) -> None:
    names = ("rpn_X_50_32x4d_C4_paper", "fast_rcnn_X_50_32x4d_C4_paper")
    for name in names:
        assert tuple(path.stem for path in _both(name)) == names
    (tmp_path / "rpn_mine.yaml").touch()
    (tmp_path / "mine.yaml").touch()
    for name, message in (
        ("rpn_mine", "fast_rcnn_mine.yaml does not exist"),
        ("mine", "begin with"),
    ):
        with pytest.raises(ConfigError, match=message):
            _both(str(tmp_path / f"{name}.yaml"))


def test_refuses_weights_that_only_fill_the_first_step(runs: Path, tmp_path: Path) -> None:
    weights = runs / "whole" / "rpn" / "model_final.pth"
    with pytest.raises(WeightsError, match=r"roi_heads\.res5"):
        run_of(tmp_path, "MODEL.WEIGHTS", str(weights)).check_weights()


def test_refuses_configs_of_other_detectors(tmp_path: Path) -> None:
    arguments = [tmp_path, load_config(TOY), load_config(TOY), None]
    with pytest.raises(ConfigError, match="must be ProposalNetwork and True"):
        TwoStep.of(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"one backbone, and MODEL\.RESNETS differs"):
        run_of(tmp_path, "rpn.MODEL.RESNETS.DEPTH", "50", share=True)


@pytest.mark.slow
def test_two_processes(datasets: Path, tool: Tool, tmp_path: Path) -> None:
    done = tool("two_step.py", ["--output", tmp_path, "--num-gpus", 2, *WORDS], datasets)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fast_rcnn on toy_coco_minival: AP 0") == 1
    for name, images in (("toy_coco_train", 12), ("toy_coco_minival", 6)):
        counts = load_file(tmp_path / "proposals" / f"{name}.safetensors")["counts"]
        assert len(counts) == images
        assert (counts > 0).all()
    log = (tmp_path / "fast_rcnn" / "log.txt").read_text()
    assert "2 x 1 (micro-batches x images), 1 on each of 2 processes" in log


@pytest.mark.slow
def test_toy_data_in_eight_minutes(tmp_path: Path) -> None:
    """On two cores; no test asserts on times."""
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    weights = tmp_path / "pretraining" / "model_final.pth"
    for words in (
        ["make_toy_coco.py"],
        ["pretrain.py", "--recipe", "toy", "--output", str(weights.parent)],
        ["two_step.py", "--config-file", TOY, "--output", str(tmp_path / "run")],
    ):
        more = ["MODEL.WEIGHTS", str(weights)] if words[0] == "two_step.py" else []
        subprocess.run(
            [sys.executable, str(ROOT / "tools" / words[0]), *words[1:], *more],
            env=environment,
            check=True,
        )
    (recall,) = figures(tmp_path / "run", "rpn").values()
    assert recall["proposals"]["AR@100"] >= 50
    (entry,) = figures(tmp_path / "run", "fast_rcnn").values()
    assert entry["figures"]["AP50"] >= 60
