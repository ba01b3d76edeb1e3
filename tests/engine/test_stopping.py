from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from detectron2.engine import HookBase, TrainerBase

from resnext_det.engine import stopping
from resnext_det.engine.stopping import SIGNALS, STOPPED, Interrupted, Stop, StopOnSignal


class Signalled(TrainerBase):
    """A training that is sent signals in the middle of its third iteration."""

    def __init__(self, *signals: int, at: int = 2) -> None:
        super().__init__()
        self.saved: list[int] = []
        self.finished = -1
        self.start_iter = 0
        self._signals = signals
        self._at = at
        self.hook = StopOnSignal(lambda: self.saved.append(self.iter))
        self.register_hooks([self.hook])

    def run_step(self) -> None:
        if self.iter == self._at:
            for number in self._signals:
                os.kill(os.getpid(), number)
        self.finished = self.iter

    def go(self, end: int = 4) -> None:
        with SIGNALS.listening():
            self.train(0, end)


@pytest.fixture(autouse=True)
def usual_interrupts() -> Iterator[None]:
    """Ctrl-C as Python has it, also if these tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    training = Signalled(signal.SIGINT)
    training.go()
    assert (training.finished, training.saved) == (3, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_iteration_is_finished_and_saved(number: int) -> None:
    before = signal.getsignal(number)
    training = Signalled(number)
    with pytest.raises(Stop, match=r"after 3 of 4 iterations: .* --resume goes on") as caught:
        training.go()
    assert (training.finished, training.saved, caught.value.code) == (2, [2], STOPPED)
    assert signal.getsignal(number) is before


def test_what_may_be_dropped_is_dropped_at_once_and_once_alone() -> None:
    with SIGNALS.listening():
        done = []
        with pytest.raises(Interrupted), SIGNALS.obeyed_at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("after the signal")
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("after it was dropped")
        with pytest.raises(Interrupted), SIGNALS.obeyed_at_once():
            done.append("after a signal came before")
        assert SIGNALS.agreed() == signal.SIGTERM
    assert done == ["after it was dropped"]


def test_a_signal_to_another_process_is_none_of_a_forked_one() -> None:
    """A data loader's worker has the handler until it can put it aside."""
    with SIGNALS.listening():
        child = os.fork()
        if not child:
            with SIGNALS.obeyed_at_once():
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert not SIGNALS.received


def test_nothing_is_left_to_resume_after_the_last_iteration() -> None:
    training = Signalled(signal.SIGTERM, at=3)
    training.go()
    assert (training.finished, training.saved) == (3, [])


@pytest.mark.parametrize(
    ("iteration", "said", "saved"),
    [
        (-1, "before the first iteration was finished", []),
        (3, "all 4 iterations are done and saved, and the evaluation is left", [3]),
    ],
)
def test_what_is_left_is_said(iteration: int, said: str, saved: list[int]) -> None:
    training = Signalled()
    training.iter, training.max_iter = iteration, 4
    with pytest.raises(Stop, match=said) as caught:
        training.hook.stop(signal.SIGTERM)
    assert (training.saved, caught.value.code) == (saved, STOPPED)


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it did before the training began: SIGINT is Python's KeyboardInterrupt."""
    monkeypatch.setattr(stopping, "SAME_SIGNAL", 0.0)
    training = Signalled(signal.SIGTERM, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training.go()
    assert (training.finished, training.saved) == (1, [])


def test_a_signal_to_a_process_and_its_group_is_one() -> None:
    """As `timeout` sends it."""
    training = Signalled(signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(Stop):
        training.go()
    assert training.saved == [2]


def test_without_a_signal_nothing_happens() -> None:
    training = Signalled()
    training.go()
    assert (training.finished, training.saved) == (3, [])


def test_no_traceback_is_written_for_a_stop(caplog: pytest.LogCaptureFixture) -> None:
    class Ends(HookBase):
        def after_step(self) -> None:
            raise Stop("enough")

    training = Signalled()
    training.register_hooks([Ends()])
    with pytest.raises(Stop):
        training.go()
    assert "Exception during training" not in caplog.text
