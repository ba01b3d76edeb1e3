"""The plan's numbers, against what the hooks do."""

from __future__ import annotations

import functools
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import TrainerBase, hooks

from resnext_det import load_config
from resnext_det.engine.checkpoints import Checkpointer, Checkpoints, checkpoint_bytes
from resnext_det.engine.plan import Plan
from resnext_det.engine.schedule import scale
from resnext_det.files import free_bytes, size_text

PAPER = "faster_rcnn_X_50_32x4d_FPN_paper"


def planned(*words: object, processes: int = 1) -> Plan:
    return scale(load_config(PAPER, [str(word) for word in words]), processes)[1]


class Idle(TrainerBase):  # type: ignore[misc]
    def run_step(self) -> None:
        pass


def test_evaluations_and_checkpoints_are_those_that_come(tmp_path: Path) -> None:
    """Detectron2's EvalHook and the hook that writes checkpoints, run to the end."""
    for case, (end, period, keep) in enumerate(
        itertools.product((1, 6, 7), (1, 2, 3, 6, 10), (0, 1, 3))
    ):
        plan = planned(
            *("SOLVER.MAX_ITER", end, "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", 0),
            *("SOLVER.CHECKPOINT_PERIOD", period, "TEST.EVAL_PERIOD", period),
            *("SOLVER.KEEP_LAST", keep, "TEST.BEST.METRIC", "''"),
        )
        folder = tmp_path / str(case)
        folder.mkdir()
        evaluated: list[int] = []
        saved: list[int] = []
        files = Checkpointer(torch.nn.Linear(1, 1), folder, count=Counter(saved))
        trainer = Idle()
        trainer.register_hooks(
            [
                hooks.EvalHook(period, functools.partial(evaluated.append, 1)),
                Checkpoints(files, period, keep),
            ]
        )
        trainer.train(0, end)
        assert plan.evaluations == len(evaluated)
        assert plan.checkpoints_written == len(saved)
        assert plan.checkpoints_kept == len(list(folder.glob("*.pth")))


class Counter:
    """Counts how often it is saved."""

    def __init__(self, saved: list[int]) -> None:
        self.saved = saved

    def state_dict(self) -> dict[str, int]:
        self.saved.append(1)
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError("nothing is loaded here")


def test_evaluation_at_the_end_alone_or_never() -> None:
    assert planned().evaluations == 1
    never = planned("DATASETS.TEST", "()", "TEST.EVAL_PERIOD", 10)
    assert (never.evaluations, never.keeps_best) == (0, False)
    assert "DATASETS.TEST is empty" in never.describe()


def test_the_best_checkpoint_is_one_more() -> None:
    assert planned("TEST.BEST.METRIC", "''").checkpoints_kept == 5 + 1
    assert planned().checkpoints_kept == 5 + 2
    assert planned("SOLVER.KEEP_LAST", 0).checkpoints_kept == 35 + 2


def test_epochs_of_the_paper() -> None:
    """24.35 epochs, falling at 16.23: 16 images an iteration of 118,287."""
    lines = planned().describe(images=118_287).splitlines()
    told = {line[:20].strip(): line[20:] for line in lines}
    assert told["Images per update"] == "16 = 1 process x 8 micro-batches x 2 images"
    assert told["Images to train on"] == "118,287"
    assert "SOLVER.IMS_PER_MICRO_BATCH 16 or a divisor of it" in told["Faster"]
    assert "Faster" not in planned("SOLVER.IMS_PER_MICRO_BATCH", 16).describe()
    assert told["Scaling"] == "accumulate, nothing changed; written for 8 processes"
    assert told["Learning rate"] == "0.02"
    assert told["Warm-up"] == "1,000 iterations (0.14 epochs), from 2e-05"
    assert told["Decay"] == "to 0.002 at iteration 120,000 (16.23 epochs)"
    assert told["End"] == "iteration 180,000 (24.35 epochs)"
    assert told["Checkpoints"].startswith("36, every 5,000 iterations and at the end; 7 kept")
    assert told["Evaluations"] == "1, at the end"
    assert "Disk" not in told
    assert "epochs" not in planned().describe()


def test_a_plan_tells_what_was_scaled_and_what_else_is_set() -> None:
    told = planned(
        *("SOLVER.SCALING", "linear", "TEST.EVAL_PERIOD", 5000, "TEST.BEST.PATIENCE", 3),
        *("DATASETS.TEST", "('coco_2014_minival','toy_coco_minival')", "SOLVER.WARMUP_ITERS", 0),
        processes=16,
    ).describe()
    for part in (
        "linear, from 8 to 16 processes",
        "SOLVER.IMS_PER_BATCH 16 -> 32\n",
        "SOLVER.BASE_LR 0.02 -> 0.04\n",
        "SOLVER.STEPS (120000,) -> (60000,)\n",
        "36, every 2,500 iterations and at the end, each of 2 data sets; training stops after 3",
        "Warm-up             none\n",
    ):
        assert part in told
    for plan in (planned(processes=8), planned("SOLVER.REFERENCE_WORLD_SIZE", 0)):
        assert "accumulate, nothing changed\n" in plan.describe()
    cosine = planned("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 0.001)
    assert "Decay               to 0.001 at the end, as a cosine\n" in cosine.describe()
    patient = planned("TEST.BEST.PATIENCE", 3, "TEST.BEST.METRIC", "''")
    assert "without a better one" not in patient.describe()
    steady = planned("SOLVER.STEPS", "()")
    assert "Decay               none\n" in steady.describe()


def test_too_small_a_disk_is_told() -> None:
    plan, one = planned(), 300 * 2**20
    assert plan.disk_bytes(one) == 8 * one  # those kept, and the one that is being written
    assert plan.shortage(one, 8 * one) is None
    warning = plan.shortage(one, 8 * one - 1)
    assert warning is not None
    assert "need 2.3 GiB of disk space, and 2.3 GiB are free" in warning
    assert "SOLVER.KEEP_LAST" in warning
    disk = "Disk                2.3 GiB needed, 300.0 MiB a checkpoint"
    assert plan.describe(None, one).endswith(disk)
    assert plan.describe(None, one, 2**20).endswith(f"{disk}; 1.0 MiB free")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("average", [False, True])
def test_a_checkpoint_is_as_large_as_a_real_one(
    momentum: float, average: bool, tmp_path: Path
) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(200, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 400)
    )
    model.register_buffer("statistics", torch.zeros(50_000))
    model[0].requires_grad_(False)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=momentum)
    model(torch.randn(4, 200)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if average:
        state["average"] = {name: each.detach().clone() for name, each in model.named_parameters()}
    torch.save(state, tmp_path / "real.pth")
    cfg: CfgNode = load_config(
        PAPER, ["SOLVER.MOMENTUM", str(momentum), "SOLVER.EMA.ENABLED", str(average)]
    )
    estimate = checkpoint_bytes(model, cfg)
    assert estimate == pytest.approx((tmp_path / "real.pth").stat().st_size, rel=0.02)


def test_free_space_of_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    there = shutil.disk_usage(tmp_path).free
    # Others may write meanwhile.
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(there, abs=2**28)
    assert size_text(3 * 2**29) == "1.5 GiB"
    assert size_text(3 * 2**19) == "1.5 MiB"
