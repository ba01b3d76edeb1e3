from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from resnext_det import load_config
from resnext_det.engine.writers import build_writers, check_wandb, forget_after, writing_period
from resnext_det.errors import ConfigError


def lines(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("broken", ["", '{"iteration": 6, "total_lo', "\x00\x00\n", "[]\n"])
def test_a_resumed_training_writes_no_iteration_twice(broken: str, tmp_path: Path) -> None:
    """The writer of the resumed training has the file open before it is cut."""
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"iteration": {n}, "total_loss": 1}}\n' for n in range(6)) + broken)
    with EventStorage(3) as storage:
        writer = JSONWriter(str(file))
        forget_after(3, tmp_path)
        storage.iter = 4
        storage.put_scalar("total_loss", 2.0)
        writer.write()
        writer.close()
    assert [(each["iteration"], each["total_loss"]) for each in lines(file)] == [
        *((n, 1) for n in range(4)),
        (4, 2.0),
    ]


def test_there_may_be_nothing_to_forget(tmp_path: Path) -> None:
    forget_after(3, tmp_path)
    assert not list(tmp_path.iterdir())


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
