"""What a figure was measured with: versions, hardware and the commit of the source tree."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

_PACKAGES = ("torch", "torchvision", "numpy", "hotcoco", "pycocotools")
_SECONDS = 10  # after which git is given up: a figure does not wait for a commit


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and those whose code a figure depends on."""
    import detectron2

    import resnext_det

    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    own = {"python": platform.python_version(), "resnext_det": resnext_det.__version__}
    return {**own, "detectron2": detectron2.__version__, **found}


def hardware() -> str:
    """Return the GPU's name, or the processor architecture and the number of its threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    count = torch.get_num_threads()
    return f"{platform.machine()} CPU, {count} thread{'' if count == 1 else 's'}, no GPU"


def commit(source: Path = Path(__file__)) -> str | None:
    """Return the git commit that this package is run from.

    Args:
        source: a file of the package. The commit is that of the checkout which has it under
            version control: a package that is installed into some other project's folder has none.

    Returns:
        The hash in hexadecimal digits, with "+changes" where files under version control differ
        from it; None outside of a checkout, without git, or where git refuses.
    """
    if _git(source, "ls-files", "--error-unmatch", "--", source.name) is None:
        return None
    found = _git(source, "rev-parse", "--verify", "HEAD")
    changes = _git(source, "status", "--porcelain", "--untracked-files=no")
    if found is None or changes is None:
        return None
    return f"{found}+changes" if changes else found


def _git(source: Path, *arguments: str) -> str | None:
    """Return what git says in the folder of a file, None where it fails."""
    # Inside a hook of git, GIT_DIR and others name the repository of that hook instead.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    # The folder of the package, and never the one that the user is in. Git would run what
    # core.fsmonitor names, and writes into the checkout unless told not to.
    options = ("-C", str(source.parent), "-c", "core.fsmonitor=false", "--no-optional-locks")
    try:
        done = subprocess.run(
            ["git", *options, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
