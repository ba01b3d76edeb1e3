"""Computing an artifact in int8, within a budget of average precision."""

from __future__ import annotations

import logging
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from numpy.typing import NDArray

from resnext_det.config import config_of
from resnext_det.errors import ArtifactError
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.compare import Difference, compare, difference_table
from resnext_det.evaluation.detections import Detections, read_detections
from resnext_det.evaluation.results_file import read_metrics
from resnext_det.export.evaluating import evaluate_artifact, settings
from resnext_det.export.quantizers import QUANTIZERS, Quantizer
from resnext_det.runtime.description import Description
from resnext_det.runtime.engines import format_of

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 64


def quantize(
    cfg: CfgNode,
    description: Description,
    file: Path,
    pixels: list[NDArray[np.uint8]],
    lose_at_most: float,
) -> None:
    """Replace an artifact by one whose hidden layers compute in int8.

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
        ConfigError: a package is missing.
    """
    quantizer = QUANTIZERS[format_of(file).name]
    model = quantizer.read(file)
    tested = cfg.DATASETS.TEST[0]
    with tempfile.TemporaryDirectory(dir=file.parent) as name:
        folder = Path(name)
        trials = _Trials(
            *(cfg, description, quantizer, model, pixels, folder / file.name),
            *_evaluated(cfg, description, file, folder / "float"),
        )
        last = trials.run(())
        if last.lost.difference is None:
            raise ArtifactError(f"{tested} has no objects that could judge int8: name other data.")
        if last.loses > lose_at_most:
            last = _searched(trials.run, _parts(quantizer.layers(model)), lose_at_most)
        layers, in_int8 = quantizer.count(last.model)
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
        described = replace(description, precision="int8", comparison=comparison)
        quantizer.write(last.model, described, kept)
        for each in (each for each in folder.iterdir() if each.is_file()):
            each.replace(file.with_name(each.name))


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
    quantizer: Quantizer
    model: Any
    pixels: list[NDArray[np.uint8]]
    file: Path
    truth: GroundTruth
    before: Detections

    def run(self, in_float: Sequence[str]) -> _Trial:
        """Quantize all layers but these, and evaluate."""
        layers = [each for each in self.quantizer.layers(self.model) if each not in set(in_float)]
        int8 = self.quantizer.quantize(self.model, self.pixels, layers)
        with tempfile.TemporaryDirectory(dir=self.file.parent) as name:
            file = Path(name) / self.file.name
            self.quantizer.write(int8, self.description, file)
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


def _parts(layers: Iterable[str]) -> dict[str, list[str]]:
    """Return layers by part of the network."""
    parts: dict[str, list[str]] = defaultdict(list)
    for name in layers:
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
