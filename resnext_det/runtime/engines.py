"""Reading artifacts: each format's engine, opened with as little trust as it allows."""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnext_det.errors import ArtifactError, ConfigError, plain, quoted
from resnext_det.files import file_digest, open_regular
from resnext_det.runtime.description import KEY, Description

Arrays = Mapping[str, NDArray[Any]]
Run = Callable[[NDArray[np.uint8]], Arrays]
"""From pixels, (height, width, 3), to `OUTPUTS`: boxes (N, 4), scores (N,), labels (N,)."""

OUTPUTS = ("boxes", "scores", "labels", "masks")
"""Of every graph, in order; masks, (N, M, M), only with a mask head."""


@dataclass(frozen=True)
class Format:
    """A format of artifacts.

    Attributes:
        name: as `resnext-det export --format` takes it.
        suffix: of its files.
        engine: the module that runs it.
        open: returns the metadata's JSON and a function that runs the graph, given the file, the
            number of threads (0 for the engine's default) and the precision of layers in float.
        precisions: that the engine computes in.
    """

    name: str
    suffix: str
    engine: str
    open: Callable[[Path, int, str], tuple[str, Run]]
    precisions: tuple[str, ...] = ("fp32",)


def _open_onnx(file: Path, threads: int, _: str) -> tuple[str, Run]:
    onnxruntime: Any = importlib.import_module("onnxruntime")  # without types, as the next
    with open_regular(file) as stream:
        content = stream.read()  # from memory: the file then cannot name others to read
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as well
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]

    def run(pixels: NDArray[np.uint8]) -> Arrays:
        return dict(zip(names, session.run(None, {"image": pixels})))

    return session.get_modelmeta().custom_metadata_map.get(KEY, ""), run


@cache
def openvino_core() -> Any:
    """Return OpenVINO's core, one for the life of the process.

    The CPU plugin of a core gives the calling thread a stack for signal handlers, and when the core
    goes, frees it and restores the one before (OpenVINO 2026.4, `SigAltStackSetup`). When the older
    of two cores goes first, the younger one restores a stack that is freed: the next signal then
    overwrites whatever lies there.
    """
    openvino: Any = importlib.import_module("openvino")
    return openvino.Core()


def _open_openvino(file: Path, threads: int, precision: str) -> tuple[str, Run]:
    with open_regular(file):
        pass  # a regular file
    model = openvino_core().read_model(file)
    text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else ""
    if text:  # OpenVINO does not notice the .bin of another export
        weights = file.with_suffix(".bin")
        if Description.parse(text, quoted(file)).parts_sha256 != {".bin": file_digest(weights)}:
            raise ArtifactError(
                f"{quoted(weights)} does not belong to {quoted(file)}: copy both files of one "
                "export."
            )
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = {"fp32": "f32"}.get(precision, precision)
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino_core().compile_model(model, "CPU", settings)

    turn = threading.Lock()  # it has one request; a service may call from many threads

    def run(pixels: NDArray[np.uint8]) -> Arrays:
        with turn:
            found = compiled(pixels, share_outputs=False)
            return {name: found[n] for n, name in enumerate(OUTPUTS[: len(found)])}

    return text, run


def _open_torch(file: Path, threads: int, _: str) -> tuple[str, Run]:
    torch: Any = importlib.import_module("torch")
    importlib.import_module("torchvision")  # registers RoIAlign and NMS
    more = {KEY: ""}
    program = torch.export.load(file, extra_files=more).module()
    return more[KEY], _torch_run(torch, program, threads)


def _open_torchscript(file: Path, threads: int, _: str) -> tuple[str, Run]:
    torch: Any = importlib.import_module("torch")
    importlib.import_module("torchvision")
    more: dict[str, Any] = {KEY: ""}
    with open_regular(file) as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the format is deprecated
        program = torch.jit.load(stream, map_location="cpu", _extra_files=more)
    text = more[KEY]
    return text.decode() if isinstance(text, bytes) else text, _torch_run(torch, program, threads)


def _torch_run(torch: Any, program: Any, threads: int) -> Run:
    if threads:
        torch.set_num_threads(threads)

    def run(pixels: NDArray[np.uint8]) -> Arrays:
        # Optimizing a script for each new size takes far longer than it saves.
        with torch.no_grad(), torch.jit.optimized_execution(False):
            return dict(zip(OUTPUTS, (each.numpy() for each in program(torch.tensor(pixels)))))

    return run


FORMATS = (
    Format("onnx", ".onnx", "onnxruntime", _open_onnx),
    Format("openvino", ".xml", "openvino", _open_openvino, ("fp32", "bf16")),
    # These hold code, which runs when they are loaded.
    Format("torch", ".pt2", "torch", _open_torch),
    Format("torchscript", ".ts", "torch", _open_torchscript),
)
"""All formats."""


def format_of(file: Path) -> Format:
    """Return the format of an artifact by its suffix.

    Raises:
        ArtifactError: it has none of the suffixes.
    """
    for each in FORMATS:
        if file.suffix.lower() == each.suffix:
            return each
    listed = ", ".join(f"{each.suffix} ({each.name})" for each in FORMATS)
    raise ArtifactError(f"{quoted(file)} is no artifact: their names end in {listed}.")


def open_artifact(file: Path, threads: int = 0, precision: str = "fp32") -> tuple[Description, Run]:
    """Read an artifact.

    Raises:
        ArtifactError: it is missing, damaged, of another program or of a newer version.
        ConfigError: its engine is not installed, or does not compute in this precision.
    """
    form = format_of(file)
    if precision not in form.precisions:
        raise ConfigError(
            f"precision {quoted(precision)}: {form.engine} runs {form.suffix} files in "
            f"{' or '.join(form.precisions)}."
        )
    try:
        importlib.import_module(form.engine)
    except ImportError as error:
        raise ConfigError(
            f"{form.engine} is needed for {quoted(file)}, and importing it failed "
            f"({plain(str(error))}): pip install {form.engine}"
        ) from error
    try:
        text, run = form.open(file, threads, precision)
    except (ArtifactError, MemoryError):
        raise
    except OSError as error:
        raise ArtifactError(f"{quoted(file)} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # the engines raise errors of many classes
        first = plain(str(error).strip().partition("\n")[0], 200)
        raise ArtifactError(
            f"{quoted(file)} is damaged, or no {form.name} model that this {form.engine} can run: "
            f"{first}"
        ) from error
    return Description.parse(text, quoted(file)), run
