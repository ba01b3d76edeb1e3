"""Plain-language explanations of low-level training errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from resnext_det.errors import ResNeXtError

_LONGEST_DETAIL = 300


@dataclass(frozen=True)
class _Known:
    """An error recognized by its text.

    Attributes:
        pattern: regular expression searched for in "TypeName: message".
        sentence: meaning and remedy, without the full stop.
        lost_contact: a symptom of another process's failure, not its cause.
    """

    pattern: str
    sentence: str
    lost_contact: bool = False


# Texts from PyTorch 2.14 and its gloo and NCCL. Those of NCCL and CUDA are taken from PyTorch's
# sources and documentation and have not been observed on a GPU.
_KNOWN = (
    _Known(
        r"DataLoader worker \(pid.*is killed by signal: (Terminated|Interrupt|Hangup)",
        "a worker that loads images was sent a signal from outside, to end",
    ),
    _Known(
        r"DataLoader worker \(pid.*is killed by signal: (Killed|Bus error)",
        "a worker that loads images was killed, mostly by the kernel's out-of-memory killer (see "
        "`dmesg`) or because there is too little shared memory: use fewer workers "
        "(DATALOADER.NUM_WORKERS N, or 0 for none), close other programs, or give a container more "
        "(docker run --shm-size 8g)",
    ),
    _Known(
        r"DataLoader worker \(pid.*(exited unexpectedly|is killed by signal)",
        "a worker that loads images has ended: DATALOADER.NUM_WORKERS 0 loads them in the process "
        "itself, whose error says why",
    ),
    _Known(
        r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory",
        "the GPU has no memory left: put fewer images on it at once (SOLVER.IMS_PER_MICRO_BATCH "
        "N), make them smaller (INPUT.MAX_SIZE_TRAIN), set SOLVER.AMP.ENABLED True, or see with "
        "`nvidia-smi` whether another program fills it",
    ),
    _Known(
        r"DefaultCPUAllocator: (can't allocate|not enough) memory|MemoryError",
        "this machine has no memory left: put fewer images into a micro-batch "
        "(SOLVER.IMS_PER_MICRO_BATCH N), load with fewer workers (DATALOADER.NUM_WORKERS N) or "
        "close other programs",
    ),
    _Known(
        r"EADDRINUSE|[Aa]ddress already in use",
        "the port where the processes meet is in use: take another, the same on every machine "
        "(--dist-url tcp://HOST:PORT)",
    ),
    _Known(
        r"client socket has timed out|waiting for clients\. \d+/\d+ clients joined",
        "not all processes came to where they meet: start the job on every machine, and check the "
        "address, the port and the firewall (--dist-url)",
    ),
    _Known(
        r"Timed out waiting \d+ms for (send|recv) operation|collective operation timeout"
        r"|Watchdog caught collective|timed out in \S*(all_?reduce|barrier|broadcast|gather)",
        "the processes waited for one of them in vain: it hangs, or takes far longer than the "
        "others; look at the output of every machine",
        lost_contact=True,
    ),
    _Known(
        r"gloo\S*\] .*(Connection closed by peer|Connection reset by peer|Broken pipe|"
        r"Connection refused|pair closure)|remote process (has )?(exited|terminated)"
        r"|NCCL communicator was aborted|ncclRemoteError|Connection was likely closed",
        "another process of this job has ended, and this one cannot go on without it: the cause "
        "is in the output of the machine where it ran",
        lost_contact=True,
    ),
)


def explain(error: BaseException) -> str | None:
    """Return what an error means and what to do about it, or None if it needs its traceback.

    Args:
        error: its chain of causes is searched, too.

    Returns:
        The message of this package's own errors; for a known low-level error, a sentence and the
        error's own first line.
    """
    if isinstance(error, ResNeXtError):
        return str(error)
    found = [(known, cause) for cause in _causes(error) if (known := _look_up(cause))]
    if not found:
        return None
    # The table runs from the most specific explanation to the least.
    known, cause = min(found, key=lambda pair: _KNOWN.index(pair[0]))
    return f"{known.sentence}. It said: {_detail(known, cause)}"


def says_lost_contact(error: BaseException) -> bool:
    """Return whether an error is merely a symptom of another process's failure."""
    return any((known := _look_up(cause)) and known.lost_contact for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Return an error followed by its chain of causes."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        current = current.__cause__
    return iter(seen)


def _look_up(error: BaseException) -> _Known | None:
    text = f"{type(error).__name__}: {error}"
    return next((known for known in _KNOWN if re.search(known.pattern, text)), None)


def _detail(known: _Known, error: BaseException) -> str:
    """Return the line of the message that matched, else its first, truncated."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = next((line for line in lines if re.search(known.pattern, line)), lines[0])
    return line if len(line) <= _LONGEST_DETAIL else f"{line[:_LONGEST_DETAIL]} ..."
