"""The section on exported detectors: their speed, memory and size, in their own runtimes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from resnext_det.benchmark.contenders import FP32, STOCK, Agreement, example
from resnext_det.benchmark.measure import Row, Setup, Table, apart
from resnext_det.export.formats import save_model, saver
from resnext_det.export.graph import Graph
from resnext_det.export.quantizing import quantized
from resnext_det.runtime.description import Description
from resnext_det.runtime.engines import format_of, open_artifact, openvino_core

_FLOAT = {"onnxruntime fp32": ".onnx", "OpenVINO fp32": ".xml"}


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
        files = {name: Path(folder) / f"float{suffix}" for name, suffix in _FLOAT.items()}
        for name, file in list(files.items()):
            form = format_of(file)
            if not all(map(importlib.util.find_spec, ("onnx", form.engine))):
                del files[name]
                continue
            saver(form.name, Graph(STOCK.build(cfg)), pixels)(_UNDESCRIBED, file)
            if form.name == "openvino" and importlib.util.find_spec("nncf"):
                files["OpenVINO int8"] = Path(folder) / "int8.xml"
                model = quantized(openvino_core().read_model(file), [pixels.numpy()])
                save_model(model, _UNDESCRIBED, files["OpenVINO int8"])
        for name, file in files.items():
            parts = [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]
            sizes[name] = sum(each.stat().st_size for each in parts) / 2**20
            runs[name] = partial(_opened, file, pixels.numpy(), "fp32")
            if name == "OpenVINO fp32":
                runs["OpenVINO bf16"] = partial(_opened, file, pixels.numpy(), "bf16")
                sizes["OpenVINO bf16"] = sizes[name]
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
