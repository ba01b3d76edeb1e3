"""Plain-language explanations of low-level training errors."""

from __future__ import annotations

import re

from resnext_det.errors import ResNeXtError, plain

_MEMORY = (
    "use smaller micro-batches (SOLVER.IMS_PER_MICRO_BATCH N) or fewer workers "
    "(DATALOADER.NUM_WORKERS N), or close other programs"
)
OUT_OF_MEMORY_KILLER = f"probably by the kernel's out-of-memory killer (see `dmesg`): {_MEMORY}"

# Symptoms of another process's failure.
_NO_RESPONSE = (
    r"Timed out waiting \d+ms for (send|recv) operation|collective operation timeout"
    r"|Watchdog caught collective|timed out in \S*(all_?reduce|barrier|broadcast|gather)"
)
_LOST_CONTACT = (
    r"gloo\S*\] .*(Connection closed by peer|Connection reset by peer|Broken pipe|"
    r"Connection refused|pair closure)|remote process (has )?(exited|terminated)"
    r"|NCCL communicator was aborted|ncclRemoteError|Connection was likely closed"
)
# Explanations by a pattern of "TypeName: message", from the most specific to the least. The texts
# of gloo and the data loader were observed with PyTorch 2.14; those of NCCL and CUDA come from
# PyTorch's sources and documentation.
_EXPLANATIONS = {
    r"DataLoader worker \(pid.*is killed by signal: (Killed|Bus error)": (
        f"a data loader worker was killed, {OUT_OF_MEMORY_KILLER}, or give a container more shared "
        "memory (docker run --shm-size 8g)"
    ),
    r"DataLoader worker \(pid.*(exited unexpectedly|is killed by signal)": (
        "a data loader worker died; DATALOADER.NUM_WORKERS 0 loads images in the main process, "
        "whose error says why"
    ),
    r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory": (
        "the GPU is out of memory: use smaller micro-batches (SOLVER.IMS_PER_MICRO_BATCH N), "
        "smaller images (INPUT.MAX_SIZE_TRAIN) or SOLVER.AMP.ENABLED True, and check with "
        "`nvidia-smi` whether another program is using it"
    ),
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|MemoryError": (
        f"this machine is out of memory: {_MEMORY}"
    ),
    r"Expected more than 1 value per channel when training": (
        "a batch norm in training needs more than one value per channel: use larger micro-batches "
        "(SOLVER.IMS_PER_BATCH, SOLVER.IMS_PER_MICRO_BATCH), larger images, or MODEL.RESNETS.NORM "
        "GN"
    ),
    r"EADDRINUSE|[Aa]ddress already in use": (
        "the rendezvous port is in use: choose another, the same on every machine (--dist-url "
        "tcp://HOST:PORT)"
    ),
    r"client socket has (timed out|failed)|\d+/\d+ clients joined|wait timeout after \d+ms": (
        "not all processes joined: start the job on every machine with the same --num-machines and "
        "its own --machine-rank, and check address, port and firewall (--dist-url)"
    ),
    _NO_RESPONSE: (
        "one process did not respond to the others: it hangs or is much slower; see the output of "
        "every machine"
    ),
    _LOST_CONTACT: (
        "another process of this job ended unexpectedly; its machine's output shows the cause"
    ),
}


def explain(error: BaseException) -> str | None:
    """Return what an error or one of its causes means and how to fix it.

    Returns:
        The message of this package's own errors; for a known low-level error, a sentence and the
        error's own line; None for an error that needs its traceback.
    """
    if isinstance(error, ResNeXtError):
        return str(error)
    if (found := _look_up(error)) is None:
        return None
    pattern, cause = found
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    line = next((line for line in lines if re.search(pattern, line)), lines[0])
    return f"{_EXPLANATIONS[pattern]}. The error was: {plain(line, 300)}"


def says_lost_contact(error: BaseException) -> bool:
    """Return whether an error is merely a symptom of another process's failure."""
    found = _look_up(error)
    return found is not None and found[0] in (_NO_RESPONSE, _LOST_CONTACT)


def _look_up(error: BaseException) -> tuple[str, BaseException] | None:
    """Return the most specific pattern that matches an error or one of its causes."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    for pattern in _EXPLANATIONS:
        for cause in causes:
            if re.search(pattern, f"{type(cause).__name__}: {cause}"):
                return pattern, cause
    return None
