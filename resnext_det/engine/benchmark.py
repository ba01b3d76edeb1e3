"""Time and peak memory of networks on this machine, measured side by side."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from resnext_det.environment import hardware, versions
from resnext_det.errors import ConfigError, ResNeXtError

logger = logging.getLogger(__name__)

Mode = Literal["inference", "training"]
MODES: tuple[Mode, ...] = ("inference", "training")


@dataclass(frozen=True)
class Subject:
    """A network to measure.

    Attributes:
        name: of the subject, in the results.
        build: makes the network. It must survive pickling, as memory is measured in processes of
            their own: functools.partial(ResNeXt, 50, "32x4d", norm="BN") does, a lambda does not.
        shape: of the input, (N, C, H, W) for an image network.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Measurement:
    """What one subject took in one mode.

    Attributes:
        subject: its name.
        mode: "inference", a forward pass in evaluation mode; "training", a forward and a backward
            pass in training mode, without the optimizer.
        seconds: of each round.
        peak_bytes: the most memory in use during the first pass beyond what the network and its
            input take: activations, in training gradients too, and what the kernels work in. On a
            CPU the hundreds of MiB of training repeat to some 5%, the tens of inference to 20%.
    """

    subject: str
    mode: Mode
    seconds: tuple[float, ...]
    peak_bytes: int

    @property
    def median_seconds(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Benchmark:
    """Several subjects, measured side by side.

    Attributes:
        measurements: of every subject in every mode.
        shapes: of the inputs, by subject.
        device: "cpu" or "cuda".
        versions: of Python and the packages.
        hardware: GPU, or processor and threads.
        load: how many processes ran or waited to run in the minute before, on average. Where others
            take a share of the processor, threads wait for each other, and times mean little.
    """

    measurements: tuple[Measurement, ...]
    shapes: Mapping[str, tuple[int, ...]]
    device: str
    versions: Mapping[str, str]
    hardware: str
    load: float

    def of(self, subject: str, mode: Mode) -> Measurement:
        """Return the measurement of a subject in a mode.

        Raises:
            KeyError: it was not measured.
        """
        for measurement in self.measurements:
            if (measurement.subject, measurement.mode) == (subject, mode):
                return measurement
        raise KeyError((subject, mode))

    def time_ratio(self, subject: str, to: str, mode: Mode) -> float:
        """Return how many times as long one subject took as another.

        It is the median of the ratios within each round: what slows the machine down for a while
        slows both subjects of a round, and so cancels out.
        """
        return self.time_ratio_quartiles(subject, to, mode)[1]

    def time_ratio_quartiles(self, subject: str, to: str, mode: Mode) -> tuple[float, float, float]:
        """Return first quartile, median and third quartile of the ratios of `time_ratio`.

        Half of the rounds lie between the outer two: far apart, they say that the machine was
        doing something else.
        """
        pairs = zip(self.of(subject, mode).seconds, self.of(to, mode).seconds)
        ratios = [ours / theirs for ours, theirs in pairs]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        return low, middle, high

    def memory_ratio(self, subject: str, to: str, mode: Mode) -> float:
        """Return how many times the peak memory of another subject one has."""
        return self.of(subject, mode).peak_bytes / self.of(to, mode).peak_bytes

    def document(self) -> dict[str, Any]:
        """Return all of it, with medians, as JSON takes it."""
        measured = [
            {**asdict(each), "median_seconds": each.median_seconds} for each in self.measurements
        ]
        return {**asdict(self), "measurements": measured}


def measure(
    subjects: Sequence[Subject],
    *,
    modes: Sequence[Mode] = MODES,
    rounds: int = 10,
    warm_up: int = 2,
    device: str | None = None,
) -> Benchmark:
    """Measure time and peak memory of networks on random input.

    Peak memory comes first, each from the first pass in a fresh process; then the times, in this
    process, subjects alternating and changing order with each round. The number of threads is left
    as it is. On a GPU the code is the same but for the clock, which waits for the GPU, and the
    memory, which is that of torch's allocator; this was not run on a GPU.

    Args:
        subjects: with different names.
        modes: "inference", "training" or both.
        rounds: how often each is timed.
        warm_up: rounds before that, which do not count.
        device: "cpu" or "cuda"; by default the GPU, if there is one.

    Raises:
        ConfigError: no subjects, or two of one name, or no rounds.
        ResNeXtError: there was not enough memory.
    """
    names = [subject.name for subject in subjects]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"subjects must be one or more of different names, not {names}.")
    if rounds < 1 or warm_up < 0:
        raise ConfigError(f"there must be 1 round or more, and {rounds} are asked for.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    steps, load = len(subjects) * len(modes), os.getloadavg()[0]
    with tqdm(total=steps * (1 + rounds + warm_up), desc="measuring", disable=None) as progress:
        peaks = {}
        for subject in subjects:
            for mode in modes:
                progress.set_postfix_str(f"memory, {subject.name}, {mode}")
                peaks[subject.name, mode] = peak_memory(subject, mode, device)
                progress.update()
        times = _times(subjects, modes, rounds, warm_up, device, progress)
    measurements = [
        Measurement(name, mode, tuple(seconds), peaks[name, mode])
        for (name, mode), seconds in times.items()
    ]
    shapes = {subject.name: subject.shape for subject in subjects}
    return Benchmark(tuple(measurements), shapes, device, versions(), hardware(), load)


def _times(
    subjects: Sequence[Subject],
    modes: Sequence[Mode],
    rounds: int,
    warm_up: int,
    device: str,
    progress: tqdm[Any],
) -> dict[tuple[str, Mode], list[float]]:
    """Return the seconds of each round, by subject and mode."""
    built = [(s.name, s.build().to(device), torch.randn(s.shape, device=device)) for s in subjects]
    times: dict[tuple[str, Mode], list[float]] = {(s.name, m): [] for s in subjects for m in modes}
    for index in range(warm_up + rounds):
        turn = index % len(built)
        for name, network, images in built[turn:] + built[:turn]:
            for mode in modes:
                progress.set_postfix_str(f"time, {name}, {mode}")
                seconds = _timed(network, images, mode)
                if index >= warm_up:
                    times[name, mode].append(seconds)
                progress.update()
    return times


def _timed(network: nn.Module, images: Tensor, mode: Mode) -> float:
    network.zero_grad(set_to_none=True)
    _wait(images)
    start = time.perf_counter()
    _step(network, images, mode)
    _wait(images)
    return time.perf_counter() - start


def _wait(images: Tensor) -> None:
    """Wait for the GPU."""
    if images.is_cuda:
        torch.cuda.synchronize()


def _step(network: nn.Module, images: Tensor, mode: Mode) -> None:
    """Run the network once; in training, backward from the mean of all that it puts out."""
    network.train(mode == "training")
    if mode == "inference":
        with torch.inference_mode():
            network(images)
        return
    outputs = list(_tensors(network(images)))
    loss = torch.stack([each.float().mean() for each in outputs]).sum()
    loss.backward()  # type: ignore[no-untyped-call]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    else:
        for each in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(each)


def peak_memory(subject: Subject, mode: Mode, device: str = "cpu") -> int:
    """Return the peak memory of a first pass, in bytes, from a fresh process.

    A process that has worked before keeps memory that it no longer needs, and would show less.

    Args:
        subject: the network.
        mode: "inference" or "training".
        device: "cpu" or "cuda".

    Raises:
        ResNeXtError: there was not enough memory.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        try:
            return process.submit(_peak_of_first_step, subject, mode, device).result()
        except RuntimeError as error:
            killed = isinstance(error, BrokenProcessPool | torch.OutOfMemoryError)
            if not killed and "alloc" not in str(error):
                raise
            raise ResNeXtError(
                f"{subject.name} in {mode} could not be measured, most likely for want of memory; "
                f"take a smaller input than {subject.shape} or a smaller network."
            ) from error


def _peak_of_first_step(subject: Subject, mode: Mode, device: str) -> int:
    network, images = subject.build().to(device), torch.randn(subject.shape, device=device)
    if device != "cpu":  # not run on a GPU
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(network, images, mode)
        return torch.cuda.max_memory_allocated() - before
    # Threads and kernel libraries start with the first use, and are not the network's.
    small = nn.Conv2d(8, 8, 3)
    small(torch.randn(2, 8, 16, 16)).sum().backward()
    before = _most_resident(forget=True)
    _step(network, images, mode)
    return _most_resident() - before


def _most_resident(forget: bool = False) -> int:
    """Return the most memory that this process ever had, in bytes.

    Args:
        forget: from now on instead of ever, on Linux. Where it cannot be forgotten, a difference
            of two answers is too small by as much as the first peak stands out.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    if forget:
        # proc(5): "5" resets the peak resident set size, VmHWM, to what is resident now.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    # Not ru_maxrss: on Linux a process inherits the one of the process that started it.
    lines = status.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
