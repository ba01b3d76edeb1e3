from __future__ import annotations

import io
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from resnext_det import console
from resnext_det.engine.hooks import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture()
def log(tmp_path: Path) -> Iterator[Path]:
    """A log.txt for the package's lines, beside a handler for the terminal."""
    package = logging.getLogger("resnext_det")
    file = logging.FileHandler(tmp_path / "log.txt")
    level = package.level
    package.addHandler(file)
    package.setLevel(logging.INFO)
    yield tmp_path / "log.txt"
    package.removeHandler(file)
    package.setLevel(level)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_training_leaves_lines_in_the_log(
    terminal: bool, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    hook = Progress(seconds=3600)
    with EventStorage() as storage:
        hook.trainer = types.SimpleNamespace(storage=storage, max_iter=50, start_iter=0, iter=0)
        hook.before_train()
        for hook.trainer.iter in range(50):
            storage.put_scalars(total_loss=2.0, loss_cls=2.0)
            hook.after_step()
            storage.step()
        hook.after_train()
    first, last = log.read_text().splitlines()
    assert first.startswith("iteration 1/50: loss 2.000 (cls 2.000)")
    assert last.startswith("iteration 50/50: loss 2.000")
    assert ("training" in screen.getvalue()) == terminal


def test_without_a_terminal_a_bar_logs_lines(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(console, "SECONDS", 0.0)
    for _ in console.progress_bar(range(3), desc="toy", unit="image"):
        pass
    lines = log.read_text().splitlines()
    assert any(line.startswith("toy: 2 of 3 images, 00:00 elapsed") for line in lines), lines


def test_log_lines_are_printed_above_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    log = logging.Logger("log")
    log.addHandler(logging.StreamHandler(screen))
    console.print_above_bars(log)
    with tqdm(total=2, file=screen, mininterval=0) as bar:
        bar.update()
        log.warning("a line")
    # The bar is wiped, and drawn again below.
    before, _, after = screen.getvalue().partition("a line\n")
    assert before.endswith("\r")
    assert "1/2" in after
