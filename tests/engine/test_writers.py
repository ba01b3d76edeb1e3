from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils.events import EventStorage, JSONWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from resnext_det import load_config
from resnext_det.engine.hooks import Evaluation
from resnext_det.engine.writers import Writers, build_writers, check_wandb, writing_period
from resnext_det.errors import ConfigError

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"


class Training(TrainerBase):
    """A training of numbers alone, killed at the beginning of an iteration."""

    def __init__(self, folder: Path, *hooks: HookBase, killed: int = -1) -> None:
        super().__init__()
        self.killed = killed
        self.model = nn.Identity()
        cfg = load_config(TOY, ["OUTPUT_DIR", str(folder)])
        writers = Writers(build_writers(cfg), writing_period(cfg.SOLVER.MAX_ITER))
        self.register_hooks([*hooks, writers])

    def run_step(self) -> None:
        if self.iter == self.killed:
            raise KeyboardInterrupt
        self.storage.put_scalar("total_loss", 1 / (1 + self.iter))


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("broken", ["", '{"iteration": 9, "total_lo', "\x00\x00\n", "[]\n"])
def test_a_resumed_training_writes_every_iteration_once(broken: str, tmp_path: Path) -> None:
    """And the log is Detectron2's."""
    stock = tmp_path / "stock.json"
    with EventStorage() as storage:
        writer = JSONWriter(str(stock), 1)
        for iteration in range(12):
            storage.put_scalar("total_loss", 1 / (1 + iteration), cur_iter=iteration)
            writer.write()
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        Training(folder, killed=8).train(0, 12)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(broken)
    if not broken:
        time.sleep(1)  # TensorBoard orders its files by the second
    Training(folder).train(5, 12)
    assert (folder / "metrics.jsonl").read_text() == stock.read_text()
    if not broken:
        events = EventAccumulator(str(folder)).Reload().Scalars("total_loss")
        assert [event.step for event in events] == list(range(12))
    Training(folder).train(0, 2)  # a new training in the same folder
    assert [row["iteration"] for row in rows(folder)] == [0, 1]


def test_resume_adds_an_interrupted_evaluation_to_its_row(tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Training(tmp_path, Evaluation(interrupted, 4, lambda: None)).train(0, 6)
    evaluation = Evaluation(lambda: {"bbox": {"AP": 37.0}}, 4, lambda: None)
    Training(tmp_path, evaluation).train(4, 6)
    expected = [{"iteration": n, "total_loss": 1 / (1 + n)} for n in range(6)]
    expected[3]["bbox/AP"] = expected[5]["bbox/AP"] = 37.0
    assert rows(tmp_path) == expected
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("bbox/AP")
    assert [event.step for event in events] == [3, 5]


def test_writes_every_iteration_of_short_trainings_only() -> None:
    assert (writing_period(1000), writing_period(1001)) == (1, 20)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_refuses_wandb_if_it_is_not_installed() -> None:
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_wandb(load_config(TOY, ["WANDB.ENABLED", "True"]))
    check_wandb(load_config(TOY))
