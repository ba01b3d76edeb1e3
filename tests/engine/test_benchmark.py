"""Time and memory of networks that take a known time and a known memory."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch import nn

from resnext_det.engine import benchmark
from resnext_det.engine.benchmark import Benchmark, Measurement, Mode, Subject, measure
from resnext_det.errors import ConfigError, ResNeXtError
from resnext_det.files import write_json

Tool = Callable[..., "CompletedProcess[str]"]

MEBIBYTE = 2**20
# 64 MiB a map; PReLU has a parameter, each Sigmoid keeps its output for the backward pass.
SIGMOIDS = Subject(
    "sigmoids",
    functools.partial(nn.Sequential, nn.PReLU(), *[nn.Sigmoid() for _ in range(4)]),
    (64, 2**18),
)


class Clock:
    """Stands in for the module `time`: it moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Worker(nn.Module):
    """Takes a known time of a clock, and writes down how it was called."""

    def __init__(
        self,
        name: str,
        seconds: float,
        calls: list[tuple[str, bool, bool, bool]],
        clock: Clock,
    ) -> None:
        super().__init__()
        self.name, self.seconds, self.calls, self.clock = name, seconds, calls, clock
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        gradients, fresh = torch.is_grad_enabled(), self.weight.grad is None
        self.calls.append((self.name, self.training, gradients, fresh))
        self.clock.now += self.seconds
        return {"a": x * self.weight, "b": [x + self.weight]}


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory in no time."""
    sizes = {"quick": 100, "slow": 250}

    def peak(subject: Subject, mode: Mode, device: str) -> int:
        return sizes[subject.name] * (4 if mode == "training" else 1)

    monkeypatch.setattr(benchmark, "peak_memory", peak)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(benchmark, "time", made)
    return made


def workers(calls: list[Any], clock: Clock) -> list[Subject]:
    return [
        Subject("quick", lambda: Worker("quick", 2.0, calls, clock), (2, 3)),
        Subject("slow", lambda: Worker("slow", 6.0, calls, clock), (5, 3)),
    ]


@pytest.mark.usefixtures("no_processes")
def test_times_and_ratios(clock: Clock) -> None:
    found = measure(workers([], clock), rounds=3, warm_up=0, device="cpu")
    assert [(each.subject, each.mode) for each in found.measurements] == [
        *[("quick", "inference"), ("quick", "training")],
        *[("slow", "inference"), ("slow", "training")],
    ]
    for mode in benchmark.MODES:
        assert found.of("quick", mode).seconds == pytest.approx([2.0] * 3)
        assert found.of("quick", mode).median_seconds == pytest.approx(2)
        assert found.time_ratio("slow", "quick", mode) == pytest.approx(3)
        assert found.memory_ratio("slow", "quick", mode) == 2.5
    assert found.of("quick", "training").peak_bytes == 400
    assert (found.device, found.shapes["slow"]) == ("cpu", (5, 3))
    with pytest.raises(KeyError):
        found.of("other", "training")


@pytest.mark.usefixtures("no_processes")
def test_subjects_take_turns_and_the_warm_up_does_not_count(clock: Clock) -> None:
    calls: list[tuple[str, bool, bool, bool]] = []
    found = measure(workers(calls, clock), rounds=2, warm_up=1, device="cpu")
    assert all(len(each.seconds) == 2 for each in found.measurements)
    order = [name for name, *_ in calls[::2]]
    assert order == ["quick", "slow", "slow", "quick", "quick", "slow"]
    # In turns: evaluation mode without gradients; training mode with gradients, none left over.
    for (_, *inference), (_, *training) in zip(calls[::2], calls[1::2]):
        assert inference == [False, False, True]
        assert training == [True, True, True]


@pytest.mark.usefixtures("no_processes")
def test_threads_are_left_alone(clock: Clock) -> None:
    before = torch.get_num_threads(), dict(os.environ)
    measure(workers([], clock), modes=["inference"], rounds=1, warm_up=0, device="cpu")
    assert (torch.get_num_threads(), dict(os.environ)) == before


def test_time_ratio_pairs_the_rounds() -> None:
    """Slow rounds slow both; what disturbs one alone is an outlier. Medians apart would say 8/3."""
    ours, theirs = (2.0, 8.0, 30.0), (1.0, 4.0, 3.0)
    measurements = (Measurement("a", "training", ours, 1), Measurement("b", "training", theirs, 2))
    found = Benchmark(measurements, {}, "cpu", {}, "", 0.0)
    assert found.time_ratio("a", "b", "training") == 2
    assert found.time_ratio_quartiles("a", "b", "training") == (2, 2, 6)
    assert found.time_ratio_quartiles("b", "b", "training") == (1, 1, 1)
    assert found.memory_ratio("a", "b", "training") == 0.5


@pytest.mark.parametrize(
    ("names", "rounds", "message"),
    [([], 1, "subjects"), (["a", "a"], 1, "different names"), (["a"], 0, "1 round or more")],
)
def test_what_cannot_be_measured_is_refused(names: list[str], rounds: int, message: str) -> None:
    subjects = [Subject(name, nn.Identity, (1, 1)) for name in names]
    with pytest.raises(ConfigError, match=message):
        measure(subjects, rounds=rounds)


def test_peak_memory_of_training() -> None:
    """Four kept maps, and the gradient on its way through a layer, which is two more."""
    found = benchmark.peak_memory(SIGMOIDS, "training")
    assert 5.9 * 64 <= found / MEBIBYTE < 6.5 * 64


def test_peak_memory_of_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map in and a map out, 128 MiB, whatever the depth.

    Neither what it took to build the network counts, nor what the process has that measures.
    """
    (tmp_path / "wasteful.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.ones(2**26).sum()\n"
        "    return torch.nn.Sequential(*[torch.nn.Sigmoid() for _ in range(4)])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # a new process gets the same path
    subject = Subject("sigmoids", importlib.import_module("wasteful").build, (64, 2**18))
    ballast = torch.ones(2**28)
    found = benchmark.peak_memory(subject, "inference")
    assert 128 <= found / MEBIBYTE < 136
    del ballast


def test_a_process_that_dies_is_reported() -> None:
    dying = Subject("dying", functools.partial(os._exit, 9), (1, 1))
    with pytest.raises(ResNeXtError, match="dying in training could not be measured"):
        benchmark.peak_memory(dying, "training")


def test_an_error_in_the_network_is_its_own() -> None:
    wrong = Subject("wrong", functools.partial(nn.Linear, 3, 3), (2, 4))
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        benchmark.peak_memory(wrong, "inference")
    assert not isinstance(caught.value, ResNeXtError)


def test_json_is_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file.json"
    write_json(file, {"a": (1, 2)})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": [1, 2]}
    assert [path.name for path in file.parent.iterdir()] == ["file.json"]


@pytest.mark.slow
def test_tool_measures(tool: Tool, tmp_path: Path) -> None:
    arguments = [
        "--compare",
        "1x4d",
        "2x8d:checkpointed",
        "--depth",
        26,
        "--size",
        64,
        32,
        "--batch",
        2,
    ]
    output = tmp_path / "measured.json"
    done = tool("complexity.py", [*arguments, "--measure", "--rounds", 3, "--output", output])
    assert done.returncode == 0, done.stderr
    for row in ("inference, time", "training step, time", "training step, peak memory"):
        assert row in done.stdout
    written = json.loads(output.read_text())
    shape = [2, 3, 64, 32]
    assert written["shapes"] == {"1x4d": shape, "2x8d:checkpointed": shape}
    assert [len(each["seconds"]) for each in written["measurements"]] == [3] * 4
    assert all(each["peak_bytes"] > 0 for each in written["measurements"])
    assert written["load"] >= 0
    assert written["hardware"] and written["versions"]["detectron2"]
