"""The section on exported detectors: their speed, memory and size, in their own runtimes."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances

from resnext_det.benchmark.contenders import FP32, STOCK, Agreement, example
from resnext_det.benchmark.measure import Row, Setup, Table, apart
from resnext_det.errors import ConfigError
from resnext_det.export.formats import saver
from resnext_det.export.graph import Graph
from resnext_det.export.quantizers import QUANTIZERS
from resnext_det.runtime.description import Description
from resnext_det.runtime.engines import format_of, open_artifact

_SUFFIXES = {"onnxruntime": ".onnx", "OpenVINO": ".xml"}


def artifacts(setup: Setup) -> list[Table]:
    """Measure one image by the detector and by its exports, each in a process of its own."""
    cfg, (height, width) = setup.cfg, setup.sizes.image
    inputs = [example(height, width)]
    pixels = inputs[0]["image"].permute(1, 2, 0).contiguous()
    runs: dict[str, Any] = {
        each.name: partial(each.alone, "inference", cfg, inputs) for each in (STOCK, FP32)
    }
    sizes: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        for name, (file, precision) in _exported(cfg, Path(folder), pixels).items():
            parts = [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]
            sizes[name] = sum(each.stat().st_size for each in parts) / 2**20
            runs[name] = partial(_opened, file, pixels.numpy(), precision)
        measured = apart(runs, setup.rounds, "artifacts")
    stock = measured[STOCK.name].result[0]["instances"]
    rows = []
    for name, each in measured.items():
        found = _instances(each.result) if name in sizes else each.result[0]["instances"]
        difference = Agreement.of(stock, found)
        more: dict[str, Any] = {"memory, MiB": each.memory}
        if name in sizes:
            more["file, MiB"] = sizes[name]
        more["matched, %"] = 100 * difference.matched
        if difference.matched:
            more["boxes off by, px"], more["scores off by"] = difference.pixels, difference.score
        rows.append(Row("whole detector", name, each.seconds, more))
    note = (
        f"One generated image of {height} x {width} pixels by what `resnext-det export` writes, "
        "each in a process of its own, with as many threads as torch has. Memory is what the first "
        "pass adds to a process that has loaded the detector. Columns as under Inference. Int8 is "
        "calibrated on this image, and its differences are of random weights: for those of trained "
        "ones see Deployment. The "
        "export command itself compares on real images, and keeps no artifact that differs."
    )
    return [Table("Exported detectors", note, rows)]


def _exported(cfg: CfgNode, folder: Path, pixels: torch.Tensor) -> dict[str, tuple[Path, str]]:
    """Write artifacts for the engines that are installed; return files and precisions by name."""
    found: dict[str, tuple[Path, str]] = {}
    for engine, suffix in _SUFFIXES.items():
        file, int8 = (folder / f"{name}{suffix}" for name in ("float", "int8"))
        form = format_of(file)
        if not all(map(importlib.util.find_spec, ("onnx", form.engine))):
            continue
        saver(form.name, Graph(STOCK.build(cfg)), pixels)(_UNDESCRIBED, file)
        found |= {f"{engine} {each}": (file, each) for each in form.precisions}
        quantizer = QUANTIZERS[form.name]
        with contextlib.suppress(ConfigError):  # NNCF is not installed
            quantizer.package()
            model = quantizer.read(file)
            quantized = quantizer.quantize(model, [pixels.numpy()], quantizer.layers(model))
            quantizer.write(quantized, _UNDESCRIBED, int8)
            found[f"{engine} int8"] = int8, "fp32"
    return found


def _opened(file: Path, pixels: Any, precision: str) -> Callable[[], Mapping[str, Any]]:
    _, run = open_artifact(file, torch.get_num_threads(), precision)
    return partial(run, pixels)


def _instances(found: Mapping[str, Any]) -> Instances:
    instances = Instances((1, 1))
    instances.pred_boxes = Boxes(torch.tensor(np.asarray(found["boxes"])))
    instances.scores = torch.tensor(np.asarray(found["scores"]))
    instances.pred_classes = torch.tensor(np.asarray(found["labels"]))
    return instances


_UNDESCRIBED = Description(
    class_names=(),
    category_ids=(),
    pixel_format="BGR",
    pixel_mean=(),
    pixel_std=(),
    shortest_side=0,
    longest_side=0,
    enlarge="pillow",
    score_threshold=0.0,
    architecture="",
    run="",
    weights="",
    weights_sha256="",
    precision="fp32",
    versions={},
    comparison={},
    parts_sha256={},
)
