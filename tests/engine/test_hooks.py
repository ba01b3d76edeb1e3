from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase, TrainerBase
from torch import Tensor, nn

from resnext_det.engine import hooks
from resnext_det.engine.hooks import (
    SIGNALS,
    EarlyStop,
    Evaluation,
    Interrupted,
    PreciseBN,
    Progress,
    StopOnSignal,
    Throughput,
    validation_losses,
)


class Counting(TrainerBase):
    """A training that only counts, and is sent signals during an iteration."""

    def __init__(
        self, *hooks: HookBase, start: int = 0, end: int = 12, signals: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1)
        self.start_iter, self.max_iter = start, end
        self.finished = -1
        self._signals = signals
        self.register_hooks(hooks)

    def run_step(self) -> None:
        if self.iter == 2:
            for number in self._signals:
                os.kill(os.getpid(), number)
        self.finished = self.iter

    def go(self) -> None:
        with SIGNALS.listening():
            self.train(self.start_iter, self.max_iter)


# Evaluation.


def evaluation(
    values: dict[int, float], metric: str = "bbox/AP", patience: int = 0, **training: Any
) -> tuple[Counting, Evaluation, list[int], list[int]]:
    """Return a training with known AP, its hook, and when it evaluated and saved the best."""
    evaluated: list[int] = []
    saved: list[int] = []

    def evaluate() -> dict[str, Any]:
        evaluated.append(trainer.iter)
        return {"bbox": {"AP": values[trainer.iter], "loss": values[trainer.iter]}}

    hook = Evaluation(evaluate, 3, lambda: saved.append(trainer.iter), metric, patience)
    trainer = Counting(hook, **training)
    return trainer, hook, evaluated, saved


@pytest.mark.parametrize(("metric", "best"), [("bbox/AP", [2, 5, 10]), ("bbox/loss", [2])])
def test_evaluates_periodically_and_at_the_end_and_saves_the_best(
    metric: str, best: list[int]
) -> None:
    trainer, hook, evaluated, saved = evaluation({2: 1, 5: 3, 8: 2, 10: 4}, metric, end=11)
    trainer.go()
    assert evaluated == [2, 5, 8, 10]
    assert saved == best and hook.best_iteration == best[-1]
    assert trainer.storage.history("bbox/AP").values() == [(1, 2), (3, 5), (2, 8), (4, 10)]


@pytest.mark.parametrize("metric", ["", "segm/AP"])
def test_trains_without_a_best(metric: str, caplog: pytest.LogCaptureFixture) -> None:
    trainer, hook, evaluated, saved = evaluation({2: 1, 5: 1}, metric, 1, end=6)
    trainer.go()
    assert evaluated == [2, 5] and not saved and hook.best is None
    assert ("'segm/AP', but the evaluation gives only bbox/AP" in caplog.text) == bool(metric)


@pytest.mark.parametrize(
    ("values", "end", "best"),
    [
        ({2: 5, 5: 4, 8: 4}, 8, 5),
        ({2: 5, 5: 4, 8: 6, 11: 6, 14: 5}, 14, 6),
        ({2: math.nan, 5: 1, 8: 0, 11: math.nan}, 11, 1),
    ],
)
def test_patience(values: dict[int, float], end: int, best: float) -> None:
    trainer, hook, _, _ = evaluation(values, patience=2, end=100)
    with pytest.raises(EarlyStop, match=r"TEST\.BEST\.PATIENCE"):
        trainer.go()
    assert (trainer.finished, hook.best) == (end, best)
    resumed, hook, evaluated, _ = evaluation({}, patience=2, start=end + 1, end=100)
    hook.load_state_dict({"last": end, "best": best, "best_iteration": 5, "waited": 2})
    with pytest.raises(EarlyStop):
        resumed.go()
    assert resumed.finished == -1 and not evaluated


def test_resumes_the_best_and_repeats_a_missed_evaluation() -> None:
    """A checkpoint is written before the evaluation at the same iteration."""
    state = {"metric": "bbox/AP", "last": 2, "best": 5.0, "best_iteration": 2, "waited": 0}
    trainer, hook, evaluated, saved = evaluation({5: 4, 8: 3}, patience=2, start=6, end=100)
    hook.load_state_dict(state)
    with pytest.raises(EarlyStop):
        trainer.go()
    assert evaluated == [5, 8] and not saved and hook.best == 5
    assert hook.state_dict() == {**state, "last": 8, "waited": 2}
    again, hook, evaluated, saved = evaluation({8: 1}, "bbox/loss", start=6, end=9)
    hook.load_state_dict({**state, "last": 5})
    again.go()
    assert evaluated == saved == [8]  # another metric: the old best does not count
    over, _, evaluated, _ = evaluation({8: 2}, start=9, end=9)
    over.go()
    assert evaluated == [8]


class Detector(nn.Module):
    """One loss is the mean of its images, another learns statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert self.training
        images = torch.stack([each["image"] for each in batch])
        return {"loss_a": self.norm(images).mean(), "loss_b": images.mean() * 2}


def test_validation_losses_are_means_over_images_and_change_nothing() -> None:
    model = Detector().eval()
    images = torch.rand(5, 1, 4, 4)
    batches = [[{"image": image} for image in part] for part in (images[:4], images[4:])]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = validation_losses(model, batches)
    assert found["loss_b"] == pytest.approx(float(images.mean() * 2))
    assert found["total_loss"] == pytest.approx(found["loss_a"] + found["loss_b"])
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training and not model.norm.training
    assert validation_losses(model, []) == {}


def test_precise_bn_always_uses_the_same_images() -> None:
    model = nn.BatchNorm1d(1)
    hook = PreciseBN(0, model, list(torch.rand(6, 4, 1)), 3)
    hook.update_stats()
    mean = model.running_mean.clone()
    hook.update_stats()
    assert torch.equal(model.running_mean, mean)


# Progress.


def test_logs_progress_by_time(caplog: pytest.LogCaptureFixture) -> None:
    class Losses(HookBase):
        def after_step(self) -> None:
            self.trainer.storage.put_scalars(total_loss=2.0, loss_cls=2.0, time=0.5)

    trainer = Counting(Losses(), Throughput(8), Progress(12, seconds=3600))
    with caplog.at_level(logging.INFO, "resnext_det"):
        trainer.go()
    first, last = [record.getMessage() for record in caplog.records]
    assert "iter: 0  total_loss: 2  loss_cls: 2" in first and "eta: 0:00:05" in first
    assert "iter: 11  total_loss: 2" in last
    assert trainer.storage.history("images_per_second").latest() == 16


# Signals.


@pytest.fixture()
def usual_interrupts() -> Iterator[None]:
    """Python's own handling of SIGINT, which a shell's background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_interrupts")
@pytest.mark.parametrize(
    "signals", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM)]
)
def test_a_signal_stops_after_the_iteration(
    signals: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """One sent to a process and to its group, as by `timeout`, counts once."""
    before = signal.getsignal(signals[0])
    training = Counting(StopOnSignal(), signals=signals)
    with pytest.raises(Interrupted) as caught:
        training.go()
    assert (training.finished, caught.value.number) == (2, signals[0])
    assert signal.getsignal(signals[0]) is before
    assert "Exception during training" not in caplog.text


@pytest.mark.usefixtures("usual_interrupts")
def test_signals_that_do_not_stop_after_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    for training in (
        Counting(StopOnSignal()),
        Counting(StopOnSignal(), end=3, signals=(signal.SIGTERM,)),  # the last iteration
    ):
        training.go()
        assert training.finished == training.max_iter - 1
    monkeypatch.setattr(hooks, "SAME_SIGNAL", 0.0)
    second = Counting(StopOnSignal(), signals=(signal.SIGTERM, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        second.go()
    assert second.finished == 1  # at once
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignored = Counting(StopOnSignal(), signals=(signal.SIGINT,))
    ignored.go()
    assert ignored.finished == 11


def test_a_signal_ends_an_evaluation_after_the_batch() -> None:
    done = []
    with SIGNALS.listening(), pytest.raises(Interrupted):
        for batch in SIGNALS.interrupting(range(5)):
            done.append(batch)
            if batch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    assert done == [0, 1]
    assert list(SIGNALS.interrupting(range(3))) == [0, 1, 2]  # nobody is listening


def test_a_forked_process_ignores_signals() -> None:
    """A data loader's worker inherits the handler."""
    with SIGNALS.listening():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(SIGNALS.received)
        assert os.waitpid(child, 0)[1] == 0 and not SIGNALS.received
