"""Detections of boxes -> COCO's 12 figures and a row for every class."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from tabulate import tabulate

from resnext_det.environment import hardware, versions
from resnext_det.errors import DatasetError

logger = logging.getLogger(__name__)

FIGURES = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
"""The 12 figures in the order of COCO's own summary."""


@dataclass(frozen=True)
class ClassFigures:
    """What one class reached.

    Attributes:
        name: of the class.
        AP: averaged over IoU 0.50 to 0.95, in percent; None without any instance.
        AP50: at IoU 0.50, in percent; None without any instance.
        instances: objects of the class in the annotations, crowds not counted.
    """

    name: str
    AP: float | None
    AP50: float | None
    instances: int


@dataclass(frozen=True)
class BoxFigures:
    """COCO's 12 figures by name, in percent (None where there is nothing to find), and by class."""

    figures: dict[str, float | None]
    per_class: tuple[ClassFigures, ...]

    def table(self) -> str:
        """Return the figures and the classes as text for a terminal."""
        halves = FIGURES[:6], FIGURES[6:]
        upper = "\n\n".join(
            tabulate([[_shown(self.figures[name]) for name in names]], headers=names)
            for names in halves
        )
        rows = [
            [entry.name, _shown(entry.AP), _shown(entry.AP50), entry.instances]
            for entry in self.per_class
        ]
        return f"{upper}\n\n{tabulate(rows, headers=['class', 'AP', 'AP50', 'instances'])}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def evaluate_boxes(annotations: Path, detections: list[dict[str, Any]]) -> BoxFigures:
    """Compute COCO's figures for boxes.

    Args:
        annotations: a COCO annotation file.
        detections: in COCO's results format: image_id, category_id, bbox (x, y, width, height in
            pixels) and score.

    Returns:
        The figures in percent. Without any detection they are 0, as nothing was found.

    Raises:
        DatasetError: the annotations or the detections cannot be evaluated.
    """
    try:
        truth = hotcoco.COCO(str(annotations))
        evaluation = hotcoco.COCOeval(truth, truth.load_res(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the table as it computes it
            evaluation.summarize()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DatasetError(f"cannot evaluate against {annotations}: {error}") from error
    results = evaluation.get_results()
    figures = {name: _percent(results[name]) for name in FIGURES}
    # (IoU thresholds, recalls, classes, areas, most detections); -1 where a class has no instance.
    precision = (evaluation.eval or {})["precision"][:, :, :, 0, -1]
    names = {entry["id"]: str(entry["name"]) for entry in truth.dataset["categories"]}
    rows = []
    for position, category in enumerate(evaluation.params.cat_ids):
        instances = len(truth.get_ann_ids(cat_ids=[category], iscrowd=False))
        of_class = precision[:, :, position]
        rows.append(ClassFigures(names[category], _mean(of_class), _mean(of_class[:1]), instances))
    return BoxFigures(figures, tuple(rows))


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)


def _mean(precision: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    valid = precision[precision > -1]
    return 100 * float(valid.mean()) if valid.size else None


class BoxEvaluator(DatasetEvaluator):
    """Detectron2's evaluator protocol: gathers detections, computes and writes the figures.

    Writes `metrics.json` and `detections_DATASET.json` into the output folder.
    """

    def __init__(self, dataset: str, output: Path, description: dict[str, str]) -> None:
        """Prepare for one data set.

        Args:
            dataset: a registered data set with a COCO annotation file.
            output: the folder for what is written.
            description: what stands beside the figures, such as the weights' name.
        """
        self.dataset = dataset
        self.output = output
        self.description = description
        self.metadata = MetadataCatalog.get(dataset)
        self._detections: list[dict[str, Any]] = []
        self._images = 0

    def reset(self) -> None:
        """Forget what was gathered."""
        self._detections = []
        self._images = 0

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Gather the detections of a batch.

        Args:
            inputs: the model's inputs; "image_id" is read.
            outputs: the model's outputs, with `Instances` under "instances".
        """
        for record, output in zip(inputs, outputs):
            instances = output["instances"].to("cpu")
            self._detections += instances_to_coco_json(instances, record["image_id"])
            self._images += 1

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Compute the figures of all processes' detections.

        Returns:
            {"bbox": {"AP": ..., "AP50": ..., "AP-person": ...}} in percent, NaN for what cannot
            be computed, as Detectron2's own evaluator; nothing but on the main process.
        """
        comm.synchronize()
        gathered = comm.gather(self._detections, dst=0)
        images = sum(comm.gather(self._images, dst=0))
        if not comm.is_main_process():
            return OrderedDict()
        positions = self.metadata.thing_dataset_id_to_contiguous_id
        categories = {position: category for category, position in positions.items()}
        detections = [
            {**found, "category_id": categories[found["category_id"]]}
            for found in itertools.chain(*gathered)
        ]
        figures = evaluate_boxes(Path(self.metadata.json_file), detections)
        self._write(figures, detections, images)
        logger.info("%s, %d images:\n%s", self.dataset, images, figures.table())
        flat = dict(figures.figures) | {f"AP-{row.name}": row.AP for row in figures.per_class}
        numbers = {name: float("nan") if v is None else v for name, v in flat.items()}
        return OrderedDict(bbox=numbers)

    def _write(self, figures: BoxFigures, detections: list[dict[str, Any]], images: int) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        name = f"detections_{self.dataset}.json"
        write_json(self.output / name, detections)
        target = self.output / "metrics.json"
        document: dict[str, Any] = {
            **self.description,
            "versions": versions(),
            "hardware": hardware(),
            "datasets": _other_datasets(target, self.description),
        }
        document["datasets"][self.dataset] = {
            "annotations": str(Path(self.metadata.json_file).resolve()),
            "images": str(Path(self.metadata.image_root).resolve()),
            "detections": name,
            "image_count": images,
            "figures": figures.figures,
            "per_class": [vars(row) for row in figures.per_class],
        }
        write_json(target, document)
        logger.info("wrote %s", target)


def box_evaluator(dataset: str, output: str, weights: str) -> BoxEvaluator:
    """Return a `BoxEvaluator` made of text alone, which is what a LazyConfig can hold and save.

    Args:
        dataset: a registered data set with a COCO annotation file.
        output: the folder for what is written.
        weights: the name that stands beside the figures.
    """
    return BoxEvaluator(dataset, Path(output), {"weights": weights})


def _other_datasets(target: Path, description: dict[str, str]) -> dict[str, Any]:
    """Return what the same weights reached on other data sets, from an earlier evaluation."""
    try:
        earlier = json.loads(target.read_text())
        same = all(earlier[key] == value for key, value in description.items())
        return dict(earlier["datasets"]) if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_json(target: Path, content: object) -> None:
    """Write JSON beside `target`, then rename: never half a file."""
    beside = target.with_name(f".{target.name}.partial")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(target)
