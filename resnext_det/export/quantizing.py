"""Quantizing an OpenVINO artifact to int8 by NNCF, within a budget of average precision."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from detectron2.config import CfgNode
from numpy.typing import NDArray

from resnext_det.config import config_of
from resnext_det.console import progress_bar
from resnext_det.errors import ArtifactError, ResNeXtError, plain
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.compare import Difference, compare, difference_table
from resnext_det.evaluation.detections import Detections, read_detections
from resnext_det.evaluation.results_file import read_metrics
from resnext_det.export.evaluating import evaluate_artifact, settings
from resnext_det.export.formats import needed, save_model
from resnext_det.runtime.description import Description
from resnext_det.runtime.engines import openvino_core

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 64
_LAYERS = ("Convolution", "GroupConvolution", "MatMul")


@contextlib.contextmanager
def nncf() -> Iterator[Any]:
    """Import NNCF, and keep it from printing while it works.

    Raises:
        ConfigError: it is not installed.
        ArtifactError: it failed.
    """
    with mock.patch.dict(os.environ, {"NNCF_CI": "1"}):  # else it reports its use to its authors
        module = needed("nncf", "int8", "int8")
    module.set_log_level(logging.ERROR)
    openvino, core = needed("openvino", "OpenVINO"), openvino_core()
    one_core = mock.patch.multiple(openvino, Core=openvino_core, compile_model=core.compile_model)
    try:
        with one_core, contextlib.redirect_stdout(io.StringIO()):
            yield module
    except ResNeXtError:
        raise
    except Exception as error:  # NNCF raises errors of many classes
        reason = plain(str(error).strip().partition("\n")[0].rstrip("."), 200)
        raise ArtifactError(f"NNCF cannot quantize this detector: {reason}.") from error


def quantize(
    cfg: CfgNode,
    description: Description,
    file: Path,
    pixels: list[NDArray[np.uint8]],
    lose_at_most: float,
) -> None:
    """Replace an OpenVINO artifact by one whose hidden layers compute in int8.

    The first data set of DATASETS.TEST judges it. If it loses too much, parts of the network return
    to float: one alone, or the costliest together, as few as are needed.

    Args:
        cfg: of the detector.
        description: of the artifact.
        file: the artifact, in a folder of its own.
        pixels: of the images to calibrate on, as the artifact takes them.
        lose_at_most: of the AP of boxes, in percentage points.

    Raises:
        ArtifactError: it loses more.
    """
    model = openvino_core().read_model(file)
    tested = cfg.DATASETS.TEST[0]
    with tempfile.TemporaryDirectory(dir=file.parent) as name:
        folder = Path(name)
        trials = _Trials(
            *(cfg, description, model, pixels, folder),
            *_evaluated(cfg, description, file, folder / "float"),
        )
        last = trials.run(())
        if last.lost.difference is None:
            raise ArtifactError(f"{tested} has no objects that could judge int8: name other data.")
        if last.loses > lose_at_most:
            last = _searched(trials.run, _parts(model), lose_at_most)
        layers, in_int8 = _layers(last.model)
        if last.loses > lose_at_most:
            raise ArtifactError(
                f"with {in_int8} of {layers} layers in int8 the detector loses {last.loses:.2f} "
                f"AP on {tested}, and --lose-at-most is {lose_at_most:g}: allow more, or export "
                "without --int8. Nothing was kept."
            )
        logger.info("%d of %d layers compute in int8", in_int8, layers)
        lost = last.lost
        logger.info("%s", difference_table((lost,)))
        figures = {"AP": lost.now, "AP_in_float": lost.before, "AP_difference_lower": lost.lower}
        figures |= {"AP_difference_upper": lost.upper, "layers": layers, "layers_in_int8": in_int8}
        known = {name: value for name, value in figures.items() if value is not None}
        comparison = {**description.comparison, **known}
        kept = folder / file.name
        save_model(last.model, replace(description, precision="int8", comparison=comparison), kept)
        for suffix in (".bin", ".xml"):
            kept.with_suffix(suffix).replace(file.with_suffix(suffix))


@dataclass(frozen=True)
class _Trial:
    """A quantized model and its difference from float."""

    model: Any
    lost: Difference

    @property
    def loses(self) -> float:
        return -(self.lost.difference or 0.0)


@dataclass(frozen=True)
class _Trials:
    """Quantizes, and compares with float on a data set."""

    cfg: CfgNode
    description: Description
    model: Any
    pixels: list[NDArray[np.uint8]]
    folder: Path
    truth: GroundTruth
    before: Detections

    def run(self, in_float: Sequence[str]) -> _Trial:
        """Quantize all layers but these, and evaluate."""
        int8 = quantized(self.model, self.pixels, in_float)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            file = Path(name) / "int8.xml"
            save_model(int8, self.description, file)
            _, now = _evaluated(self.cfg, self.description, file, Path(name))
        return _Trial(int8, compare(self.truth, self.before, now)[0])


def _searched(
    run: Callable[[Sequence[str]], _Trial], parts: Mapping[str, Sequence[str]], lose_at_most: float
) -> _Trial:
    """Return the first of some trials within the budget, or the last of all.

    First each part alone stays in float, small ones before large ones, then the costliest two,
    three, and so on: at most twice as many trials as there are parts.
    """
    trials: dict[str, _Trial] = {}
    for part, layers in sorted(parts.items(), key=lambda item: len(item[1])):
        trials[part] = _logged(run(layers), [part])
        if trials[part].loses <= lose_at_most:
            return trials[part]
    costliest = sorted(parts, key=lambda part: trials[part].loses)
    last = trials[costliest[0]]
    for count in range(2, len(parts)):  # with all parts in float, nothing would be in int8
        names = costliest[:count]
        last = _logged(run([layer for part in names for layer in parts[part]]), names)
        if last.loses <= lose_at_most:
            break
    return last


def _logged(trial: _Trial, parts: Sequence[str]) -> _Trial:
    logger.info("%s in float: AP %+.2f", ", ".join(parts), -trial.loses)
    return trial


def _parts(model: Any) -> dict[str, list[str]]:
    """Return the layers that can compute in int8, by part of the network."""
    in_float = set(_in_float(model))
    parts: dict[str, list[str]] = defaultdict(list)
    for operation in model.get_ops():
        name = operation.get_friendly_name()
        if operation.get_type_name() in _LAYERS and name not in in_float:
            stage = re.search(r"/(stem|res\d)[/.]", name)
            parts[stage[1] if stage else name.split("/")[1]].append(name)
    return parts


def _evaluated(
    cfg: CfgNode, description: Description, file: Path, folder: Path
) -> tuple[GroundTruth, Detections]:
    """Evaluate an artifact on one data set; return its annotations and the detections."""
    words = [*settings(description, file), "OUTPUT_DIR", str(folder)]
    evaluate_artifact(config_of(cfg, [*words, "DATASETS.TEST", str(cfg.DATASETS.TEST[:1])]), file)
    (found,) = read_metrics(folder).evaluations
    truth = read_ground_truth(found.annotations)
    return truth, read_detections(found.detections, truth)


def quantized(model: Any, pixels: list[NDArray[np.uint8]], in_float: Sequence[str] = ()) -> Any:
    """Quantize OpenVINO's model of a detector.

    Args:
        model: in float; it stays as it is.
        pixels: of the images to calibrate on.
        in_float: names of further operations that stay in float.

    Raises:
        ArtifactError: NNCF failed.
        ConfigError: it is not installed.
    """

    def counted(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        bar.update()
        return image

    names = [*_in_float(model), *in_float]
    with nncf() as module, progress_bar(desc="calibrating", unit="image") as bar:
        return module.quantize(
            model,
            module.Dataset(pixels, counted),
            subset_size=len(pixels),
            ignored_scope=module.IgnoredScope(names=names, validate=False),
        )


def _in_float(model: Any) -> list[str]:
    """Return the operations that stay in float.

    They are those outside the backbone, such as the arithmetic of boxes, except layers that a ReLU
    follows: so the last layers, whose outputs are scores and boxes, stay as well.
    """
    return [
        operation.get_friendly_name()
        for operation in model.get_ops()
        if operation.get_type_name() not in ("Constant", "Relu")
        and not operation.get_friendly_name().startswith("/backbone/")
        and not (operation.get_type_name() in _LAYERS and _before_relu(operation))
    ]


def _before_relu(operation: Any) -> bool:
    for output in operation.outputs():
        for target in output.get_target_inputs():
            after = target.get_node()
            kind = after.get_type_name()
            if kind == "Relu" or (kind in ("Add", "Multiply") and _before_relu(after)):
                return True
    return False


def _layers(model: Any) -> tuple[int, int]:
    """Count the layers, and those whose weights are quantized."""
    layers = [each for each in model.get_ops() if each.get_type_name() in _LAYERS]
    return len(layers), sum(map(_is_int8, layers))


def _is_int8(layer: Any) -> bool:
    node = layer.input_value(1).get_node()
    while node.get_input_size() and node.get_type_name() != "FakeQuantize":
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize" or node.get_element_type().size == 1)
