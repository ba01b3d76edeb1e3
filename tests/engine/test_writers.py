from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resnext_det import load_config
from resnext_det.engine.stopping import Stop
from resnext_det.engine.writers import (
    History,
    MetricsWriter,
    TensorBoardWriter,
    Writers,
    build_writers,
    check_wandb,
    writing_period,
)
from resnext_det.errors import ConfigError


def lines(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("broken", ["", '{"iteration": 6, "total_lo', "\x00\x00\n", "[]\n"])
def test_a_resumed_training_writes_no_iteration_twice(broken: str, tmp_path: Path) -> None:
    """The writer of the resumed training has the file open before it is cut."""
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"iteration": {n}, "total_loss": 1}}\n' for n in range(6)) + broken)
    with EventStorage(3) as storage:
        writer = MetricsWriter(str(file))
        writer.go_on_after(3)
        storage.put_scalar("total_loss", 5.0, cur_iter=3)  # of the checkpoint
        storage.put_scalar("total_loss", 2.0, cur_iter=4, smoothing_hint=True)
        writer.write()
        writer.close()
    rows = [(each["iteration"], each["total_loss"]) for each in lines(file)]
    assert rows == [*((n, 1) for n in range(4)), (4, 3.5)]


class Training(TrainerBase):
    """A training of numbers alone, whose rows are medians; its state goes from one to the next."""

    def __init__(self, folder: Path, end: int, state: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.checkpoints: dict[int, dict[str, Any]] = {}
        writers = [MetricsWriter(str(folder / "metrics.jsonl")), TensorBoardWriter(str(folder))]
        self.register_hooks([History(), Evaluates(), Writers(lambda: list(writers), 4)])
        if state is not None:
            self.load_state_dict(state)
        self.max_iter = 20
        with contextlib.suppress(Stop):
            self.end = end
            self.train(0 if state is None else state["iteration"] + 1, self.max_iter)

    def run_step(self) -> None:
        if self.iter == self.end:  # killed in the middle of an update
            self.storage.put_scalar("loss", -1.0)
            raise Stop("killed")
        for micro_batch in range(2):
            self.storage.put_scalar("loss", math.sin(self.iter + micro_batch / 2))
        self.storage.put_scalar("lr", 1 / (self.iter + 1), smoothing_hint=False)


class Evaluates(HookBase):
    """Saves every iteration, and evaluates after it, at times that are none of the rows."""

    def before_train(self) -> None:
        if self.trainer.start_iter:
            self._evaluate(self.trainer.start_iter - 1)

    def after_step(self) -> None:
        trainer: Any = self.trainer
        trainer.checkpoints[trainer.iter] = copy.deepcopy(trainer.state_dict())
        self._evaluate(trainer.iter)

    def _evaluate(self, iteration: int) -> None:
        if iteration % 6 == 5:
            self.trainer.storage.put_scalar(
                "AP", iteration**2, smoothing_hint=False, cur_iter=iteration
            )


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(each.step, each.value) for each in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("checkpoint", [0, 3, 5, 6, 7, 11, 19])
def test_the_log_of_a_resumed_training_is_that_of_one_that_was_not_killed(
    checkpoint: int, tmp_path: Path
) -> None:
    """Rows are medians over 20 iterations; some evaluations come between two rows."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    Training(whole, end=-1)
    state = Training(killed, end=min(checkpoint + 3, 20)).checkpoints[checkpoint]
    Training(killed, end=-1, state=state)
    assert lines(killed / "metrics.jsonl") == lines(whole / "metrics.jsonl")
    assert len(lines(whole / "metrics.jsonl")) == 7
    assert in_tensorboard(killed) == in_tensorboard(whole)


def test_a_new_training_in_an_old_folder_has_a_new_log(tmp_path: Path) -> None:
    Training(tmp_path, end=-1)
    before = lines(tmp_path / "metrics.jsonl")
    Training(tmp_path, end=-1)
    assert lines(tmp_path / "metrics.jsonl") == before


def test_every_iteration_of_a_short_training_is_written() -> None:
    assert (writing_period(1000), writing_period(1001)) == (1, 20)


def test_metrics_and_tensorboard_are_always_written(tmp_path: Path) -> None:
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", ["OUTPUT_DIR", str(tmp_path / "new")])
    with EventStorage() as storage:
        writers = build_writers(cfg)
        storage.put_scalar("total_loss", 2.0)
        for writer in writers:
            writer.write()
            writer.close()
    assert lines(tmp_path / "new" / "metrics.jsonl") == [{"iteration": 0, "total_loss": 2.0}]
    assert list((tmp_path / "new").glob("events.out.tfevents.*"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_is_asked_for_before_the_training(tmp_path: Path) -> None:
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", ["WANDB.ENABLED", "True"])
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_wandb(cfg)
    check_wandb(load_config("faster_rcnn_X_26_8x4d_FPN_toy"))
