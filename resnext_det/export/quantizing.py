"""Quantizing an OpenVINO artifact to int8 by NNCF, within a budget of average precision."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from numpy.typing import NDArray

from resnext_det.config import config_of
from resnext_det.console import progress_bar
from resnext_det.errors import ArtifactError, ResNeXtError, plain
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.coco import compute
from resnext_det.evaluation.compare import Difference, compare, difference_table
from resnext_det.evaluation.detections import Detections, read_detections
from resnext_det.evaluation.results_file import read_metrics
from resnext_det.export.evaluating import evaluate_artifact, settings
from resnext_det.export.formats import needed, save_model
from resnext_det.runtime.description import Description
from resnext_det.runtime.detector import Detector
from resnext_det.runtime.engines import OUTPUTS, Arrays, openvino_core

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 64
_RANKING_IMAGES = 32  # to order the layers by what they cost
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

    The first data set of DATASETS.TEST judges it. If it loses too much, NNCF searches layers to
    keep in float, on the same images.

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
        trial = _Trial(cfg, description, folder, *_evaluated(cfg, description, file, folder / "0"))
        int8 = quantized(model, pixels)
        lost = trial.lost(int8, "1")
        if lost.difference is None:
            raise ArtifactError(f"{tested} has no objects that could judge int8: name other data.")
        if not -lost.difference <= lose_at_most:
            logger.info("AP %+.2f: searching layers to keep in float", lost.difference)
            int8 = quantized(model, pixels, trial, lose_at_most)
            lost = trial.lost(int8, "2")
        layers, in_int8 = _layers(int8)
        difference = lost.difference or 0.0
        if not (in_int8 and -difference <= lose_at_most):
            raise ArtifactError(
                f"with {in_int8} of {layers} layers in int8 the detector loses {-difference:.2f} "
                f"AP on {tested}, and --lose-at-most is {lose_at_most:g}: allow more, or export "
                "without --int8. Nothing was kept."
            )
        logger.info("%d of %d layers compute in int8", in_int8, layers)
        logger.info("%s", difference_table((lost,)))
        figures = {"AP": lost.now, "AP_in_float": lost.before, "AP_difference_lower": lost.lower}
        figures |= {"AP_difference_upper": lost.upper, "layers": layers, "layers_in_int8": in_int8}
        known = {name: value for name, value in figures.items() if value is not None}
        comparison = {**description.comparison, **known}
        kept = folder / file.name
        save_model(int8, replace(description, precision="int8", comparison=comparison), kept)
        for suffix in (".bin", ".xml"):
            kept.with_suffix(suffix).replace(file.with_suffix(suffix))


@dataclass(frozen=True)
class _Trial:
    """Compares int8 with float on a data set."""

    cfg: CfgNode
    description: Description
    folder: Path
    truth: GroundTruth
    before: Detections

    def lost(self, model: Any, name: str) -> Difference:
        """Evaluate a model as an artifact; return the difference of its AP."""
        file = self.folder / f"{name}.xml"
        save_model(model, self.description, file)
        _, now = _evaluated(self.cfg, self.description, file, self.folder / name)
        return compare(self.truth, self.before, now)[0]

    def average_precision(
        self, compiled: Any, records: Iterable[dict[str, Any]], bar: Any
    ) -> tuple[float, list[float]]:
        """Return the AP of a compiled model on images, and on each alone, as NNCF's search asks."""

        def run(pixels: NDArray[np.uint8]) -> Arrays:
            return dict(zip(OUTPUTS, compiled(pixels, share_outputs=False).values()))

        detector = Detector(self.description, run)
        found: dict[Any, list[dict[str, Any]]] = {}
        for record in records:
            key = record["image_id"]
            found[key] = detector(record["file_name"]).to_coco(key, list(self.truth.categories))
            bar.update()
        each = [_precision(self.truth, {key: rows}) for key, rows in found.items()]
        return _precision(self.truth, found), each


def _evaluated(
    cfg: CfgNode, description: Description, file: Path, folder: Path
) -> tuple[GroundTruth, Detections]:
    """Evaluate an artifact on one data set; return its annotations and the detections."""
    words = [*settings(description, file), "OUTPUT_DIR", str(folder)]
    evaluate_artifact(config_of(cfg, [*words, "DATASETS.TEST", str(cfg.DATASETS.TEST[:1])]), file)
    (found,) = read_metrics(folder).evaluations
    truth = read_ground_truth(found.annotations)
    return truth, read_detections(found.detections, truth)


def _precision(truth: GroundTruth, found: dict[Any, list[dict[str, Any]]]) -> float:
    """Return the AP of the results of some images, by id, in percent; 0 without objects."""
    numbers = {key: truth.numbers[key] for key in found}
    ids = np.array(list(numbers.values()), np.int64)
    some = replace(
        truth,
        numbers=numbers,
        sizes=truth.sizes[truth.positions(ids)],
        objects=truth.objects.where(np.isin(truth.objects.image_ids, ids)),
    )
    detections = Detections.of(list(itertools.chain(*found.values())), some)
    return 100 * max(0.0, float(compute(some, detections)[0].summary[0]))


def quantized(
    model: Any,
    pixels: list[NDArray[np.uint8]],
    trial: _Trial | None = None,
    lose_at_most: float = 0,
) -> Any:
    """Quantize OpenVINO's model of a detector.

    Args:
        model: of float layers.
        pixels: of the images to calibrate on.
        trial: searches layers to keep in float.
        lose_at_most: what the search may lose, in points of AP.

    Raises:
        ArtifactError: NNCF failed.
        ConfigError: it is not installed.
    """

    def counted(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        bar.update()
        return image

    work = "searching" if trial else "calibrating"
    with nncf() as module, progress_bar(desc=work, unit="image") as bar:
        calibration = module.Dataset(pixels, counted)
        shared = {
            "subset_size": len(pixels),
            "ignored_scope": module.IgnoredScope(names=_in_float(model), validate=False),
        }
        if trial is None:
            return module.quantize(model, calibration, **shared)
        return module.quantize_with_accuracy_control(
            model,
            calibration,
            module.Dataset(DatasetCatalog.get(trial.cfg.DATASETS.TEST[0])),
            lambda compiled, records: trial.average_precision(compiled, records, bar),
            max_drop=lose_at_most,
            advanced_accuracy_restorer_parameters=module.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=_RANKING_IMAGES, num_ranking_workers=1
            ),
            **shared,
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
