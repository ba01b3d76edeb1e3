"""Trainings in one, two and three processes that end with the same bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnext_det.data.stream import Share
from resnext_det.engine.exact_sum import TreeSum, branches
from resnext_det.engine.train_loop import check_batch_norms
from resnext_det.errors import ConfigError

from .test_train_loop import Detector, loop, run, weights

SCRIPT = """
import multiprocessing
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from resnext_det import load_config
from resnext_det.engine import exact_sum
from resnext_det.engine.trainer import Trainer

COMMON = "SOLVER.IMS_PER_BATCH 4 SOLVER.IMS_PER_MICRO_BATCH 1 SOLVER.WARMUP_ITERS 2"
COMMON += " SOLVER.STEPS (2,) DATASETS.TEST () INPUT.MIN_SIZE_TRAIN (48,64)"
COMMON += " INPUT.MAX_SIZE_TRAIN 80 SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.5"
COMMON += " SOLVER.CLIP_GRADIENTS.ENABLED True SOLVER.CLIP_GRADIENTS.CLIP_TYPE global_norm"
COMMON += " SOLVER.BASE_LR 0.01 SOLVER.KEEP_LAST 0 SOLVER.CHECKPOINT_PERIOD 2 SOLVER.EXACT_SUM True"
LEVELS = "['res3','res4','res5']"
KINDS = {
    "faster_rcnn": "SOLVER.MAX_ITER 12",
    "retinanet": "SOLVER.MAX_ITER 3 MODEL.META_ARCHITECTURE RetinaNet MODEL.RETINANET.NUM_CLASSES 6"
    " MODEL.BACKBONE.NAME build_retinanet_resnext_fpn_backbone MODEL.RESNETS.NORM BN"
    f" MODEL.RESNETS.OUT_FEATURES {LEVELS} MODEL.FPN.IN_FEATURES {LEVELS}",
}


def train(rank, processes, folder, kind):
    torch.set_num_threads(1)
    exact_sum._BUCKET = 100_000  # several, of which the last is shorter
    if processes > 1:
        address = f"file://{folder.parent}/meet-{folder.name}"
        dist.init_process_group("gloo", address, rank=rank, world_size=processes)
        comm.create_local_process_group(processes)
    words = ["OUTPUT_DIR", str(folder), *COMMON.split(), *KINDS[kind].split()]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", words)
    folder.mkdir(exist_ok=True)
    seed_all_rng(cfg.SEED + rank)  # as Detectron2's setup does
    trainer = Trainer(cfg)
    trainer._trainer._scaler = torch.GradScaler("cpu", enabled=kind == "retinanet")
    trainer.resume_or_load(resume=True)
    trainer.train()


def everywhere(processes, folder, kind):
    started = [
        context.Process(target=train, args=(rank, processes, folder, kind))
        for rank in range(processes)
    ]
    for each in started:
        each.start()
    for each in started:
        each.join()
        assert each.exitcode == 0


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # before PyTorch starts threads
    folder = Path(sys.argv[1])
    kind, *counts = sys.argv[2:]
    for processes in map(int, counts):
        everywhere(processes, folder / f"{processes}", kind)
    # Two updates in three processes, then one or more in two.
    (folder / "3then2").mkdir()
    shutil.copy(folder / "3" / "model_0000001.pth", folder / "3then2")
    everywhere(2, folder / "3then2", kind)
"""


def train(datasets: Path, folder: Path, *words: str) -> None:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder), *words],
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def state(folder: Path) -> dict[str, Any]:
    content = torch.load(folder / "model_final.pth", weights_only=True)
    inner = content["trainer"]["_trainer"]
    momentum = inner["optimizer"]["state"]
    return {
        **content["model"],
        **{f"ema {name}": tensor for name, tensor in inner["ema"].items()},
        **{f"momentum {name}": each["momentum_buffer"] for name, each in momentum.items()},
        "normalizer": torch.tensor(inner["loss_normalizer"] or 0.0, dtype=torch.float64),
    }


def check_equal(one: dict[str, Any], folders: Iterable[Path]) -> None:
    for folder in folders:
        found = state(folder)
        assert found.keys() == one.keys()
        assert [name for name in one if not torch.equal(one[name], found[name])] == []


def test_any_number_of_processes_trains_retinanet_to_the_same_bits(
    datasets: Path, tmp_path: Path
) -> None:
    """Of weights, momentum, moving average, batch norms' statistics and the normalizer."""
    train(datasets, tmp_path, "retinanet", "1", "3")
    one = state(tmp_path / "1")
    check_equal(one, (tmp_path / "3", tmp_path / "3then2"))
    assert one["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"] == 3
    assert one["backbone.bottom_up.stem.conv1.norm.running_mean"].abs().max() > 1e-3
    assert one["normalizer"] not in (0, 100)


@pytest.mark.slow
def test_any_number_of_processes_trains_faster_rcnn_to_the_same_bits(
    datasets: Path, tmp_path: Path
) -> None:
    train(datasets, tmp_path, "faster_rcnn", "1", "2", "3")
    check_equal(state(tmp_path / "1"), (tmp_path / name for name in ("2", "3", "3then2")))


def test_the_order_of_a_sum_follows_from_its_length() -> None:
    numbers = torch.randn(21, 3, generator=torch.Generator().manual_seed(0)) * 1e3

    def tree(first: int, size: int) -> Tensor:
        """Add up two halves of a power of two."""
        if size == 1:
            return numbers[first]
        return tree(first, size // 2) + tree(first + size // 2, size // 2)

    choose = random.Random(2)
    for length in range(1, 22):
        rest = []
        start = 0
        for power in (16, 8, 4, 2, 1):
            if length & power:
                rest.append(tree(start, power))
                start += power
        expected = rest.pop()
        while rest:
            expected = rest.pop() + expected
        for processes in {1, length, choose.randint(1, length)}:
            merged = TreeSum()
            for process in range(processes):
                streams = Share(process, processes, length, 1).streams
                own = TreeSum()
                for stream in streams:
                    own.add(stream, 1, numbers[stream].clone())
                assert [(first, size) for first, size, _ in own.branches] == branches(streams)
                for branch in own.branches:
                    merged.add(*branch)
            assert torch.equal(merged.total(), expected)
    # Of 8 micro-batches, a process of 2, 4 or 8 has one branch to send.
    for processes, most in ((1, 1), (2, 1), (3, 2), (4, 1), (5, 2), (8, 1)):
        counts = [len(branches(Share(n, processes, 8, 1).streams)) for n in range(processes)]
        assert max(counts) == most


class Normalized(Detector):
    """Also with a batch norm, a normalizer as Detectron2's RetinaNet has, and an idle weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, batch: Any) -> dict[str, Tensor]:
        losses = super().forward(batch)
        self.loss_normalizer = getattr(self, "loss_normalizer", 100) * 0.9 + batch[0]["number"]
        inputs = torch.tensor([[each["number"], 1.0] for each in batch], dtype=torch.float64)
        return {**losses, "loss_norm": self.norm(inputs).square().mean() / self.loss_normalizer}


def test_statistics_become_the_mean_over_micro_batches() -> None:
    trained = loop(Share(0, 1, 4, 2), model=Normalized(), exact=True)
    run(trained, range(1))
    means = [number + 0.5 for number in (0, 2, 4, 6)]
    assert trained.model.norm.running_mean[0].item() == pytest.approx(0.1 * sum(means) / 4)
    assert trained.model.norm.num_batches_tracked == 1
    assert trained.model.loss_normalizer == pytest.approx(90 + 3)
    run(trained, range(1, 2))
    assert trained.model.loss_normalizer == pytest.approx(93 * 0.9 + 11)


def test_an_exact_sum_is_the_same_update() -> None:
    """To rounding; and an update that is skipped changes nothing."""
    exact, usual = (loop(Share(0, 1, 5, 2), exact=each) for each in (True, False))
    for each in (exact, usual):
        run(each, range(3))
    torch.testing.assert_close(weights(exact), weights(usual), rtol=0, atol=1e-14)


def test_a_weight_that_no_loss_needs_does_not_decay() -> None:
    trained = loop(Share(0, 1, 4, 2), model=Normalized(), exact=True)
    trained.optimizer.param_groups[0]["weight_decay"] = 0.1
    run(trained, range(1))
    assert torch.equal(trained.model.idle, torch.ones(2))
    assert not torch.equal(trained.model.norm.weight, torch.ones(2))


def test_a_skipped_update_changes_nothing(tmp_path: Path) -> None:
    trained = loop(
        Share(0, 1, 2, 2), model=Normalized(), folder=tmp_path, broken=(6,), skip=1, exact=True
    )
    run(trained, range(1))
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    normalizer = trained.model.loss_normalizer
    run(trained, range(1, 2))
    assert trained.skipped_updates == 1 and trained.model.loss_normalizer == normalizer
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_warns_of_other_kernels(caplog: pytest.LogCaptureFixture) -> None:
    trained = loop(exact=True)
    state = trained.state_dict()
    trained.load_state_dict(state)
    assert not caplog.text
    trained.load_state_dict({**state, "kernels": "cpu, 77 threads"})
    assert "resumes with other kernels (cpu, 77 threads before" in caplog.text


def test_refuses_syncbn() -> None:
    with pytest.raises(ConfigError, match="SyncBN, which normalizes over the processes"):
        check_batch_norms(nn.Sequential(nn.SyncBatchNorm(1)), Share(0, 1, 8, 2), exact=True)
