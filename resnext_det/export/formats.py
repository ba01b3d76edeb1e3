"""Writing a traced graph in each format, by the converters of torch and OpenVINO."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resnext_det.errors import ArtifactError, ConfigError, plain
from resnext_det.export.graph import Graph, exported, traced
from resnext_det.files import file_digest
from resnext_det.runtime.description import KEY, Description
from resnext_det.runtime.engines import OUTPUTS, openvino_core

OPSET = 17
"""Of ONNX: from 16 on, RoiAlign aligns as Detectron2 does."""


Save = Callable[[Description, Path], None]
"""Writes an artifact."""


def saver(name: str, graph: Graph, image: torch.Tensor, opset: int = OPSET) -> Save:
    """Convert a graph, and return what writes it in a format.

    Args:
        name: of the format.
        graph: the detector.
        image: (height, width, 3), in which it finds objects.
        opset: of ONNX.

    Raises:
        ArtifactError: the format cannot express the detector.
        ConfigError: a package is missing.
    """
    if name == "torch":
        try:
            return partial(_save_torch, exported(graph, image))
        except Exception as error:  # torch raises errors of many classes
            raise ArtifactError(
                f"torch.export cannot express this detector: {_first_line(error)}. Choose another "
                "format."
            ) from error
    script = traced(graph, image)
    if name == "torchscript":
        return partial(_save_torchscript, script)
    model = _as_onnx(script, image, opset, OUTPUTS if graph.has_masks else OUTPUTS[:3])
    if name == "openvino":
        return partial(_save_openvino, model)
    _widen_groups(model)
    return partial(save_onnx, model)


def _as_onnx(
    script: torch.jit.ScriptModule, image: torch.Tensor, opset: int, outputs: Sequence[str]
) -> Any:
    """Return a graph as an ONNX model.

    Raises:
        ArtifactError: the opset cannot express it.
        ConfigError: onnx is not installed.
    """
    onnx = needed("onnx", "ONNX and OpenVINO")
    stream = io.BytesIO()
    axes = {"image": {0: "height", 1: "width"}, **{name: {0: "detections"} for name in outputs}}
    try:
        with _quiet():
            torch.onnx.export(
                script,
                (image,),
                stream,  # type: ignore[arg-type]  # TorchScript's exporter takes streams
                input_names=["image"],
                output_names=list(outputs),
                dynamic_axes=axes,
                opset_version=opset,
                dynamo=False,
            )
    except Exception as error:  # torch raises errors of many classes
        raise ArtifactError(
            f"opset {opset} of ONNX cannot express this detector: {_first_line(error)}. The "
            f"default is {OPSET}."
        ) from error
    model = onnx.load_from_string(stream.getvalue())
    _merge_copies(model.graph)
    return model


def _merge_copies(graph: Any) -> None:
    """Let nodes read weights directly, as int8 needs.

    Of weights that are equal, such as untrained biases, torch keeps one and copies it at run time.
    """
    weights = {each.name for each in graph.initializer}
    original = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Identity" and node.input[0] in weights
    }
    for node in list(graph.node):
        if node.output[0] in original:
            graph.node.remove(node)
        else:
            node.input[:] = [original.get(name, name) for name in node.input]


def _widen_groups(model: Any) -> None:
    """Merge groups of each convolution, until each has 16 input channels; the new weights are 0.

    onnxruntime's fast kernels take no fewer: on a CPU with AVX-512 a ResNeXt-50 detector gains 5 %
    in float and 10 % in int8.
    """
    onnx = needed("onnx", "ONNX and OpenVINO")
    known = {each.name: each for each in model.graph.initializer}
    weights = {name: onnx.numpy_helper.to_array(each) for name, each in known.items()}
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[1] not in weights:
            continue
        weight = weights[node.input[1]]  # as they were: several nodes may share it
        outputs, width = weight.shape[:2]
        groups = next(each for each in node.attribute if each.name == "group")
        merged = math.gcd(groups.i, -(-16 // width))
        if width == 1 or merged == 1:
            continue  # depthwise convolutions have kernels of their own
        wide = np.zeros((outputs, merged, *weight.shape[1:]), weight.dtype)
        member = np.arange(outputs) // (outputs // groups.i) % merged
        wide[np.arange(outputs), member] = weight
        wide = wide.reshape(outputs, merged * width, *weight.shape[2:])
        known[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(wide, node.input[1]))
        groups.i //= merged


def save_onnx(model: Any, description: Description, file: Path) -> None:
    """Write an ONNX model with its metadata."""
    onnx = needed("onnx", "ONNX and OpenVINO")
    del model.metadata_props[:]
    model.metadata_props.add(key=KEY, value=description.text())
    onnx.save_model(model, file)


def _save_openvino(model: Any, description: Description, file: Path) -> None:
    passes = needed("openvino.passes", "OpenVINO")
    converted = openvino_core().read_model(model.SerializeToString())
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())  # grouped convolutions in int8 need it
    manager.run_passes(converted)
    save_model(converted, description, file)


def save_model(model: Any, description: Description, file: Path) -> None:
    """Write OpenVINO's model as .xml, and its weights as .bin beside it."""
    openvino = needed("openvino", "OpenVINO")
    openvino.save_model(model, file, compress_to_fp16=False)
    digest = {".bin": file_digest(file.with_suffix(".bin"))}
    model.set_rt_info(replace(description, parts_sha256=digest).text(), [KEY])
    openvino.save_model(model, file, compress_to_fp16=False)


def _save_torch(
    program: torch.export.ExportedProgram, description: Description, file: Path
) -> None:
    torch.export.save(program, file, extra_files={KEY: description.text()})


def _save_torchscript(script: torch.jit.ScriptModule, description: Description, file: Path) -> None:
    save: Any = torch.jit.save  # without types
    save(script, str(file), _extra_files={KEY: description.text()})


def _first_line(error: Exception) -> str:
    return plain(str(error).strip().partition("\n")[0].rstrip("."), 200)


def needed(module: str, purpose: str, extra: str = "export") -> Any:
    """Import an optional module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"exporting to {purpose} needs {module}, and importing it failed "
            f"({plain(str(error))}): pip install 'resnext_det[{extra}]'"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says about its own future."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(level)
