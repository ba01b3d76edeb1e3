"""Measuring: contenders in turn, their quartiles, and their memory in fresh processes."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from resnext_det.console import progress_bar
from resnext_det.errors import ignore_others_warnings

Run = Callable[[], Any]
"""What is measured: one pass, one step."""


@dataclass(frozen=True)
class Row:
    """One contender in one case.

    Attributes:
        case: what is measured, such as "512 boxes, forward"; the first row of a case is its
            baseline.
        name: of the contender.
        seconds: one for each round.
        more: other figures by column, with their unit in its name.
    """

    case: str
    name: str
    seconds: Sequence[float]
    more: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile of the rounds."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Table:
    """Rows that belong together.

    Attributes:
        title: the heading.
        note: what was measured and what the columns mean.
        rows: in order.
        compared: whether the rows of a case do the same, so that a ratio means something.
        axis: what the cases are points of, if a plot is to show them.
    """

    title: str
    note: str
    rows: Sequence[Row]
    compared: bool = True
    axis: str = ""

    def ratio(self, row: Row) -> float:
        """Return how many times as fast as the baseline of its case a row is."""
        baseline = next(each for each in self.rows if each.case == row.case)
        return baseline.median / row.median


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        image: height and width of an image in inference and for RoIAlign.
        training: of both images of a training step, and of those in a batch.
        regions: boxes that RoIAlign pools.
        photographs: JPEG files that a loader reads in a round.
        evaluated: images and detections of an evaluation.
        shorter_sides: of an image, in pixels; it is 1.36 times as long.
        batches: images in a batch.
        proposals: regions that the heads classify.
        networks: depth, cardinality and width per group.
        matrix: side of the matrices whose product gives the machine's peak.
        classified: images of an update of a classifier, and the side of their crops.
    """

    image: tuple[int, int] = (800, 1088)
    training: tuple[int, int] = (480, 640)
    regions: tuple[int, ...] = (512, 1000)
    photographs: int = 48
    evaluated: tuple[int, int] = (5_000, 500_000)
    shorter_sides: tuple[int, ...] = (400, 600, 800, 1067, 1333)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    proposals: tuple[int, ...] = (100, 300, 1000, 2000)
    networks: tuple[tuple[int, int, int], ...] = ((50, 32, 4), (101, 32, 4), (101, 32, 8))
    matrix: int = 2048
    classified: tuple[int, int] = (16, 224)


QUICK = Sizes(
    image=(96, 128),
    training=(96, 128),
    regions=(20,),
    photographs=2,
    evaluated=(30, 1500),
    shorter_sides=(64, 96),
    batches=(2,),
    proposals=(50,),
    networks=((26, 4, 4),),
    matrix=256,
    classified=(2, 64),
)


@dataclass(frozen=True)
class Setup:
    """What to measure, and how often.

    Attributes:
        cfg: the detector; contenders choose MODEL.RESNEXT.PRECISION.
        rounds: timed rounds of each contender.
        sizes: of the inputs.
        images: a folder of JPEG files for the loader, or None for generated ones.
    """

    cfg: CfgNode
    rounds: int
    sizes: Sizes = Sizes()
    images: Path | None = None


def alternate(
    runs: Mapping[str, Run],
    rounds: int,
    description: str,
    *,
    warm_up: int = 1,
    timer: Callable[[Run], float] | None = None,
) -> dict[str, list[float]]:
    """Time every run once a round, in turn, so that a change of the machine's pace hits all alike.

    Args:
        runs: by name.
        rounds: timed ones.
        description: for the progress bar.
        warm_up: rounds that are not timed.
        timer: takes the time of a run elsewhere than in this process.

    Returns:
        The seconds of each round, by name.
    """
    timer = timer or _timed
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    total = (warm_up + rounds) * len(runs)
    with progress_bar(total=total, desc=description, unit="run") as bar:
        for number in range(-warm_up, rounds):
            for name, run in runs.items():
                duration = timer(run)
                if number >= 0:
                    seconds[name].append(duration)
                bar.update()
    return seconds


@dataclass(frozen=True)
class Measured:
    """What a contender took in a process of its own.

    Attributes:
        seconds: one for each round.
        memory: MiB by which two runs raised the memory above what was built: the GPU's if there
            is one, else the resident memory.
        result: of the last run of the warm-up.
    """

    seconds: Sequence[float]
    memory: float
    result: Any


def apart(
    builds: Mapping[str, Callable[[], Run]], rounds: int, description: str
) -> dict[str, Measured]:
    """Measure each contender in a fresh process, in turn with the others.

    So what one does to its process, such as keeping freed memory, does not serve another.

    Args:
        builds: by name, functions or partials that pickle can name; each returns what to run.
        rounds: timed ones.
        description: for the progress bar.
    """
    with ExitStack() as stack:
        first, runs = {}, {}
        for name, build in progress_bar(builds.items(), desc="building", unit="contender"):
            pool = stack.enter_context(ProcessPoolExecutor(1, fresh_processes()))
            first[name] = pool.submit(_first, build, torch.get_num_threads()).result()
            runs[name] = partial(_in, pool)
        seconds = alternate(runs, rounds, description, warm_up=0, timer=lambda run: run())
    return {name: Measured(seconds[name], *first[name]) for name in builds}


def _in(pool: ProcessPoolExecutor) -> float:
    return pool.submit(_again).result()


_built: list[Run] = []  # in a process of `apart`


def _first(build: Callable[[], Run], threads: int) -> tuple[float, Any]:
    ignore_others_warnings()
    torch.set_num_threads(threads)
    run = build()
    _built.append(run)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _reset_peak_resident()
    run()
    result = run()  # the first may allocate what later ones keep, such as the momentum
    after = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_resident()
    return (after - before) / 2**20, result


def _again() -> float:
    return _timed(_built[0])


def _timed(run: Run) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fresh_processes() -> BaseContext:
    """Return a context whose processes have imported this package, and nothing else."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["resnext_det.benchmark.contenders"])
    return context


_STATUS = Path("/proc/self/status")


def _reset_peak_resident() -> int:
    """Forget the peak of the building if the system can; return the peak from here on."""
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak_resident()


def _peak_resident() -> int:
    if _STATUS.exists():  # on Linux ru_maxrss starts at the parent's peak
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
