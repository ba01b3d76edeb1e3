from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from detectron2.engine import HookBase, TrainerBase

from resnext_det.engine.stopping import Stop, StopOnSignal
from resnext_det.launching.endings import STOPPED


class Signalled(TrainerBase):
    """A training that is sent signals in the middle of its third iteration."""

    def __init__(self, *signals: int, evaluating: bool = False) -> None:
        super().__init__()
        self.saved: list[int] = []
        self.finished = -1
        self.start_iter = 0
        self._signals = signals
        self.hook = StopOnSignal(lambda: self.saved.append(self.iter))
        self.hook.interruptible = evaluating
        self.register_hooks([self.hook])

    def run_step(self) -> None:
        if self.iter == 2:
            for number in self._signals:
                os.kill(os.getpid(), number)
        self.finished = self.iter


@pytest.fixture(autouse=True)
def usual_interrupts() -> Iterator[None]:
    """Ctrl-C as Python has it, also where these tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    training = Signalled(signal.SIGINT)
    training.train(0, 4)
    assert (training.finished, training.saved) == (3, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_iteration_is_finished_and_saved(number: int) -> None:
    before = signal.getsignal(number)
    training = Signalled(number)
    with pytest.raises(Stop, match="--resume") as caught:
        training.train(0, 10)
    assert (training.finished, training.saved, caught.value.code) == (2, [2], STOPPED)
    assert signal.getsignal(number) is before


def test_an_evaluation_is_not_waited_for() -> None:
    training = Signalled(signal.SIGTERM, evaluating=True)
    with pytest.raises(Stop):
        training.train(0, 10)
    assert (training.finished, training.saved) == (1, [2])


def test_a_second_signal_ends_at_once() -> None:
    """As it did before the training began: SIGINT is Python's KeyboardInterrupt."""
    training = Signalled(signal.SIGTERM, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training.train(0, 10)
    assert (training.finished, training.saved) == (1, [])


def test_without_a_signal_nothing_happens() -> None:
    training = Signalled()
    training.train(0, 4)
    assert (training.finished, training.saved) == (3, [])


def test_no_traceback_is_written_for_a_stop(caplog: pytest.LogCaptureFixture) -> None:
    class Ends(HookBase):
        def after_step(self) -> None:
            raise Stop("enough")

    training = Signalled()
    training.register_hooks([Ends()])
    with pytest.raises(Stop):
        training.train(0, 4)
    assert "Exception during training" not in caplog.text
