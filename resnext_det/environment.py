"""What a figure was measured with: versions and hardware."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

_PACKAGES = ("torch", "torchvision", "numpy", "hotcoco", "pycocotools")


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
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, no GPU"
