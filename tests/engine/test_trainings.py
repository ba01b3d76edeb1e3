"""Whole trainings and an evaluation, in one process and in two, uninterrupted and killed.

One script runs them all, and so imports everything only once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from resnext_det.data.stream import Share

from .test_train_loop import loop, run, weights

ITERATIONS = 8
BROKEN = (28, 58)  # in the last of five micro-batches, of the second process, in updates 2 and 5
MEASURED = {"time", "data_time", "rank_data_time", "images_per_second", "eta_seconds"}

SCRIPT = '''
import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.utils import comm
from torch import nn

from resnext_det import load_config
from resnext_det.backbones import build_detector
from resnext_det.data.stream import Share
from resnext_det.engine.inference import buffers_of_first_process, model_digest
from resnext_det.engine.job import Job
from resnext_det.engine.launch import run_everywhere
from resnext_det.engine.setup import set_up
from resnext_det.engine.train_loop import TrainLoop, distributed
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import EvaluationError, TrainingError
from resnext_det.modeling.fast import accelerate

COMMON = "SOLVER.IMS_PER_BATCH 4 INPUT.MIN_SIZE_TRAIN (64,80) INPUT.MAX_SIZE_TRAIN 96"
COMMON += " INPUT.MIN_SIZE_TEST 64 SOLVER.WARMUP_ITERS 2 SOLVER.EMA.ENABLED True"
DOUBLE = "SOLVER.MAX_ITER 4 SOLVER.STEPS (3,) SOLVER.REFERENCE_WORLD_SIZE 2 DATASETS.TEST ()"
DOUBLE += " MODEL.PROPOSAL_GENERATOR.NAME DoubleRPN SOLVER.CLIP_GRADIENTS.ENABLED True"
DOUBLE += " SOLVER.CLIP_GRADIENTS.CLIP_TYPE global_norm SOLVER.EMA.DECAY 0.5"
DOUBLE += " MODEL.RESNEXT.PRECISION stock"  # accelerated by DoubleTrainer
KILLED = "SOLVER.MAX_ITER 8 SOLVER.STEPS (6,) SOLVER.CHECKPOINT_PERIOD 2 SOLVER.KEEP_LAST 2"
KILLED += " TEST.EVAL_PERIOD 4"


@PROPOSAL_GENERATOR_REGISTRY.register()
class DoubleRPN(RPN):
    """Detectron2's boxes are floats, and torchvision's NMS wants scores of the same type."""

    def predict_proposals(self, anchors, logits, deltas, sizes):
        logits, deltas = [each.float() for each in logits], [each.float() for each in deltas]
        return super().predict_proposals(anchors, logits, deltas, sizes)


class DoubleTrainer(Trainer):
    @classmethod
    def build_model(cls, cfg):
        return accelerate(super().build_model(cfg).double(), "fp64")


def train(kind, folder, *words):
    words = ["OUTPUT_DIR", str(folder), *COMMON.split(), *words]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", words)
    set_up(cfg, argparse.Namespace())
    trainer = kind(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()


def evaluate(folder):
    torch.set_num_threads(1)  # with other numbers of threads, sums are rounded differently
    toy = Path(os.environ["DETECTRON2_DATASETS"]) / "toy_coco"
    register_coco_instances("five", {}, str(folder.parent / "five.json"), str(toy / "train2017"))
    words = ["OUTPUT_DIR", str(folder), "DATASETS.TEST", "('five',)", "DATALOADER.NUM_WORKERS", "0"]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", words)
    torch.manual_seed(0)
    Trainer.test(cfg, build_detector(cfg))
    return cfg


def check_buffers(cfg):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    rank = comm.get_rank()
    model[0].weight.data.fill_(1)
    model[0].bias.data.fill_(1)
    model[1].running_mean += rank
    model[1].num_batches_tracked += rank
    try:
        model_digest(cfg, model)
        raise AssertionError("did not notice different statistics")
    except EvaluationError as error:
        assert "different weights" in str(error)
    try:
        with buffers_of_first_process(model):
            assert model[1].running_mean.tolist() == [0] * 4
            assert model[1].num_batches_tracked == 0
            model_digest(cfg, model)
            raise KeyError
    except KeyError:
        assert model[1].running_mean.tolist() == [rank] * 4
        assert model[1].num_batches_tracked == rank


def train_in_two(folder):
    """Also train a loop of which one process has non-finite losses, once more than allowed."""
    check_buffers(evaluate(folder / "evaluated_by_two"))
    train(DoubleTrainer, folder / "processes", *DOUBLE.split())
    sys.path.insert(0, sys.argv[2])
    from tests.engine import test_train_loop, test_trainings

    share = Share(comm.get_rank(), 2, 5, 2)
    model = distributed(test_train_loop.Detector())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = lambda _, start: test_train_loop.numbers(share, start, test_trainings.BROKEN)
    trained = TrainLoop(model, data, optimizer, share, 3, folder, max_norm=1.0, skip=1)
    test_train_loop.run(trained, range(5))
    if comm.is_main_process():
        torch.save(test_train_loop.weights(trained), folder / "weights.pth")
    try:
        test_train_loop.run(trained, range(5, 6))
    except TrainingError as error:
        (folder / f"error{share.process}").write_text(str(error))


def train_in_group(folder, *words):
    os.setsid()  # with its workers, like a job of a shell or scheduler
    train(Trainer, folder, *KILLED.split(), *words)


def exit_code(context, number, rows, folder, *words):
    """Train, send a signal to the group after some rows of the log, and return the exit code."""
    process = context.Process(target=train_in_group, args=(folder, *words))
    process.start()
    log = folder / "metrics.jsonl"
    if number is not None:
        while process.is_alive() and not (log.exists() and log.read_bytes().count(b"\\n") >= rows):
            time.sleep(0.005)
        if number == signal.SIGKILL:
            time.sleep(random.random() * 0.3)
        os.killpg(process.pid, number)
    process.join()
    return process.exitcode


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    context = multiprocessing.get_context("fork")  # before PyTorch starts threads
    one, other, workers = folder / "whole", folder / "killed", ("DATALOADER.NUM_WORKERS", "2")
    codes = [
        exit_code(context, None, 0, one, "DATALOADER.NUM_WORKERS", "0"),
        exit_code(context, signal.SIGKILL, 3, other, *workers),
        exit_code(context, signal.SIGTERM, 6, other, *workers),
        exit_code(context, None, 0, other, *workers),
    ]
    (folder / "codes.json").write_text(json.dumps(codes))
    run_everywhere(train, Job(), (DoubleTrainer, folder / "accumulated", *DOUBLE.split()))
    run_everywhere(evaluate, Job(), (folder / "evaluated_by_one",))
    run_everywhere(train_in_two, Job(processes=2), (folder,))
'''


@pytest.fixture(scope="module")
def trained(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainings")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    annotations = datasets / "toy_coco" / "annotations" / "instances_train2017.json"
    document = json.loads(annotations.read_text())
    document["images"] = document["images"][:5]  # of which the processes get unequal shares
    kept = {image["id"] for image in document["images"]}
    objects = [each for each in document["annotations"] if each["image_id"] in kept]
    (folder / "five.json").write_text(json.dumps({**document, "annotations": objects}))
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder), str(root)],
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "4 = 2 x 2 (micro-batches x images), 2 on each of 1 processes" in done.stdout
    assert "4 = 2 x 2 (micro-batches x images), 1 on each of 2 processes" in done.stdout
    return folder


def state(folder: Path) -> dict[str, Any]:
    """Return weights, their moving average and momentum of a finished training."""
    content = torch.load(folder / "model_final.pth", weights_only=True)
    loop = content["trainer"]["_trainer"]
    momentum = loop["optimizer"]["state"]
    return {
        **content["model"],
        **{f"ema {name}": tensor for name, tensor in loop["ema"].items()},
        **{f"momentum {name}": each["momentum_buffer"] for name, each in momentum.items()},
    }


def test_accumulation_repeats_what_two_processes_do(trained: Path) -> None:
    """In double precision to 1e-10: a whole Faster R-CNN with its sampling and augmentation."""
    one, other = state(trained / "accumulated"), state(trained / "processes")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-10, msg=name)
    weight = "backbone.fpn_output3.weight"
    assert one[weight].dtype == torch.float64
    assert (one[weight] - one[f"ema module.{weight}"]).abs().max() > 1e-6  # it has learned


def test_processes_skip_non_finite_losses_together(trained: Path, tmp_path: Path) -> None:
    """One process computes three micro-batches, the other two."""
    alone = loop(Share(0, 1, 5, 2), folder=tmp_path, broken=BROKEN, max_norm=1.0, skip=1)
    run(alone, range(5))
    found = torch.load(trained / "weights.pth")
    torch.testing.assert_close(found, weights(alone), rtol=0, atol=1e-15)
    errors = [(trained / f"error{process}").read_text() for process in range(2)]
    assert errors[0] == errors[1] and "58.jpg, 59.jpg" in errors[0]


def test_two_processes_evaluate_like_one(trained: Path) -> None:
    """To the last bit."""
    results, entries = [], []
    for name in ("evaluated_by_one", "evaluated_by_two"):
        inference = trained / name / "inference"
        entry = json.loads((inference / "metrics.json").read_text())["datasets"]["five"]
        for key in ("date", "seconds_per_image"):
            entry.pop(key, None)
        entries.append(entry)
        results.append((inference / "detections_five.json").read_bytes())
    assert entries[0] == entries[1]
    assert results[0] == results[1]
    assert len(json.loads(results[0])) > 100


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    iterations = [line.pop("iteration") for line in lines]
    assert iterations == sorted(set(iterations))
    return {
        iteration: {name: value for name, value in line.items() if name not in MEASURED}
        for iteration, line in zip(iterations, lines)
    }


def test_a_killed_training_ends_like_an_uninterrupted_one(trained: Path) -> None:
    """Bit for bit, after SIGKILL, SIGTERM and two resumes, with another number of workers."""
    assert json.loads((trained / "codes.json").read_text()) == [0, -9, 75, 0]
    one, other = state(trained / "whole"), state(trained / "killed")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    expected, found = rows(trained / "whole"), rows(trained / "killed")
    assert list(expected) == list(range(ITERATIONS))
    assert {"total_loss", "lr", "bbox/AP", "ema/bbox/AP"} <= expected[3].keys()
    # SIGKILL between a checkpoint and its row loses the losses of that row.
    differing = [n for n in expected if found.get(n) != expected[n]]
    assert len(differing) <= 1
    assert all(found.get(n, {}).items() <= expected[n].items() for n in differing)
    checkpoints = {file.name for file in (trained / "killed").glob("model_*.pth")}
    others = {"model_0000007.pth", "model_final.pth", "model_best.pth", "model_final_ema.pth"}
    assert len(checkpoints - others) == 1 and others < checkpoints  # the one of SIGTERM counts
