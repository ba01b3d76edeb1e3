"""Quantizing models of each format: OpenVINO's by NNCF, ONNX's by onnxruntime."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from resnext_det.console import progress_bar
from resnext_det.errors import ArtifactError, ResNeXtError, plain
from resnext_det.export.formats import needed, save_model, save_onnx
from resnext_det.runtime.description import Description
from resnext_det.runtime.engines import openvino_core

Images = Sequence[NDArray[np.uint8]]
"""As an artifact takes them, (height, width, 3)."""


@dataclass(frozen=True)
class Quantizer:
    """What quantizes models of one format.

    The backbone's layers, and others that a ReLU follows, can compute in int8. The last layers,
    whose outputs are scores and boxes, stay in float, as does the arithmetic of boxes.

    Attributes:
        package: that it needs, imported by a function that raises ConfigError without it.
        read: returns the model of a file.
        layers: returns the names of layers of a model that can compute in int8.
        quantize: returns a model of which the named layers compute in int8, calibrated on images;
            raises ArtifactError if that fails.
        count: counts all layers of a model, and those in int8.
        write: writes a model with its description.
    """

    package: Callable[[], Any]
    read: Callable[[Path], Any]
    layers: Callable[[Any], list[str]]
    quantize: Callable[[Any, Images, Sequence[str]], Any]
    count: Callable[[Any], tuple[int, int]]
    write: Callable[[Any, Description, Path], None]


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ResNeXtError:
        raise
    except Exception as error:  # they raise errors of many classes
        reason = plain(str(error).strip().partition("\n")[0].rstrip("."), 200)
        raise ArtifactError(f"{name} cannot quantize this detector: {reason}.") from error


# OpenVINO

_OPENVINO_LAYERS = ("Convolution", "GroupConvolution", "MatMul")


def _nncf() -> Any:
    with mock.patch.dict(os.environ, {"NNCF_CI": "1"}):  # else it reports its use to its authors
        module = needed("nncf", "int8", "int8")
    # Its own `set_log_level` would silence handlers that other loggers share, such as pytest's.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return module


def _openvino_layers(model: Any) -> list[str]:
    return [
        each.get_friendly_name()
        for each in model.get_ops()
        if each.get_type_name() in _OPENVINO_LAYERS
        and (each.get_friendly_name().startswith("/backbone/") or _before_relu(each))
    ]


def _before_relu(operation: Any) -> bool:
    for output in operation.outputs():
        for target in output.get_target_inputs():
            after = target.get_node()
            kind = after.get_type_name()
            if kind == "Relu" or (kind in ("Add", "Multiply") and _before_relu(after)):
                return True
    return False


def _quantize_openvino(model: Any, pixels: Images, layers: Sequence[str]) -> Any:
    def counted(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        bar.update()
        return image

    wanted = set(layers)
    in_float = [
        name
        for each in model.get_ops()
        if (name := each.get_friendly_name()) not in wanted
        and each.get_type_name() not in ("Constant", "Relu")
        and (each.get_type_name() in _OPENVINO_LAYERS or not name.startswith("/backbone/"))
    ]
    nncf, openvino, core = _nncf(), needed("openvino", "OpenVINO"), openvino_core()
    one_core = mock.patch.multiple(openvino, Core=openvino_core, compile_model=core.compile_model)
    with _explained("NNCF"), one_core, progress_bar(desc="calibrating", unit="image") as bar:
        return nncf.quantize(
            model,
            nncf.Dataset(list(pixels), counted),
            subset_size=len(pixels),
            ignored_scope=nncf.IgnoredScope(names=in_float, validate=False),
        )


def _count_openvino(model: Any) -> tuple[int, int]:
    layers = [each for each in model.get_ops() if each.get_type_name() in _OPENVINO_LAYERS]
    return len(layers), sum(map(_is_int8, layers))


def _is_int8(layer: Any) -> bool:
    node = layer.input_value(1).get_node()
    while node.get_input_size() and node.get_type_name() != "FakeQuantize":
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize" or node.get_element_type().size == 1)


# ONNX

_ONNX_LAYERS = ("Conv", "Gemm", "MatMul")


def _onnx_layers(model: Any) -> list[str]:
    readers = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)

    def before_relu(node: Any) -> bool:
        return any(
            after.op_type == "Relu" or (after.op_type == "Add" and before_relu(after))
            for name in node.output
            for after in readers[name]
        )

    return [
        node.name
        for node in model.graph.node
        if node.op_type in _ONNX_LAYERS
        and (node.name.startswith("/backbone/") or before_relu(node))
    ]


def _quantize_onnx(model: Any, pixels: Images, layers: Sequence[str]) -> Any:
    onnx = needed("onnx", "ONNX")
    quantization = needed("onnxruntime.quantization", "int8")
    bar = progress_bar(pixels, desc="calibrating", unit="image")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        images = iter(bar)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            image = next(self.images, None)
            return None if image is None else {"image": image}

    def is_ours(record: logging.LogRecord) -> bool:
        return record.name != "root"  # where onnxruntime logs advice on graphs of other kinds

    root = logging.getLogger()
    root.addFilter(is_ours)
    try:
        with _explained("onnxruntime"), tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "int8.onnx"
            quantization.quantize_static(
                copy.deepcopy(model),  # it moves the weights of its input into files
                file,
                Reader(),
                per_channel=True,
                nodes_to_quantize=list(layers),
                op_types_to_quantize=list(_ONNX_LAYERS),
                weight_type=quantization.QuantType.QInt8,
                activation_type=quantization.QuantType.QUInt8,
            )
            return onnx.load(file)
    finally:
        root.removeFilter(is_ours)


def _count_onnx(model: Any) -> tuple[int, int]:
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    layers = [node for node in model.graph.node if node.op_type in _ONNX_LAYERS]
    return len(layers), sum(made_by.get(each.input[1]) == "DequantizeLinear" for each in layers)


QUANTIZERS = {
    "openvino": Quantizer(
        package=_nncf,
        read=lambda file: openvino_core().read_model(file),
        layers=_openvino_layers,
        quantize=_quantize_openvino,
        count=_count_openvino,
        write=save_model,
    ),
    "onnx": Quantizer(
        package=lambda: needed("onnxruntime.quantization", "int8"),
        read=lambda file: needed("onnx", "ONNX").load(file),
        layers=_onnx_layers,
        quantize=_quantize_onnx,
        count=_count_onnx,
        write=save_onnx,
    ),
}
"""By format."""
