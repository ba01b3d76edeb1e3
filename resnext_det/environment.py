"""Versions, hardware and commit, recorded with every figure."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # in glibc's malloc.h
_PACKAGES = ("torch", "torchvision", "numpy", "hotcoco", "pycocotools")


def versions() -> dict[str, str]:
    """Return the versions of Python and of all packages that figures depend on."""
    import detectron2

    import resnext_det

    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    own = {"python": platform.python_version(), "resnext_det": resnext_det.__version__}
    return {**own, "detectron2": detectron2.__version__, **found}


def hardware() -> str:
    """Return the GPU's name, or the processor architecture and the number of threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    count = torch.get_num_threads()
    return f"{platform.machine()} CPU, {count} thread{'' if count == 1 else 's'}, no GPU"


def is_slow(precision: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether this processor multiplies bf16 or fp16 more slowly than fp32.

    x86 processors do without AMX, even those with AVX-512 for the precision: with one core of such
    a Xeon a ResNeXt-50 detector took 1.6 times as long in bf16 as in fp32, and 1.5 times in fp16.
    False if unknown, as for other processors.
    """
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return False
    flags = re.search(r"^flags\s*:(.*)", text, re.MULTILINE)
    return (
        precision in ("bf16", "fp16")
        and flags is not None
        and (f"amx_{precision}" not in flags[1].split())
    )


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory in this process for the next tensors.

    By default it returns large blocks to the system, which clears their pages at the next request:
    a fifth of the time of a detector on a CPU. Without glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def commit(source: Path = Path(__file__)) -> str | None:
    """Return the git commit of a source file's checkout.

    Returns:
        The hash, with "+changes" if files under version control differ from it; None if the file
        is not under version control (the package may be installed into another project's
        checkout), or git is missing or fails.
    """
    # A git hook sets GIT_DIR and others, which name the hook's repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    # Git would run the program that core.fsmonitor names, and write to the checkout.
    git = ["git", "-C", str(source.parent), "-c", "core.fsmonitor=false", "--no-optional-locks"]
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    found = ""
    for words in (["ls-files", "--error-unmatch", "--", source.name], describe):
        try:
            found = subprocess.run(
                [*git, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=10,  # figures do not wait for a commit
                check=True,
            ).stdout.strip()
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
    return found
