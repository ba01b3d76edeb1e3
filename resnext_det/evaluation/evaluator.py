"""From detections to COCO's figures and their files; an evaluator for Detectron2."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from resnext_det.errors import DatasetError, EvaluationError
from resnext_det.evaluation.annotations import GroundTruth, ImageKey, read_ground_truth
from resnext_det.evaluation.coco import (
    Engine,
    Figures,
    Protocol,
    compute,
    figures_of,
    nan_for_none,
    proposal_figures,
    proposal_table,
)
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.error_analysis import (
    Details,
    analyse_errors,
    threshold_line,
    thresholds,
)
from resnext_det.evaluation.panoptic import Segments, panoptic_figures, panoptic_table
from resnext_det.evaluation.predictions import Predictions, found_in
from resnext_det.evaluation.results_file import (
    check_no_training_log,
    file_name_of,
    write_metrics,
)
from resnext_det.files import file_digest, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """The figures of detections, and the analysis of their errors."""

    figures: Figures
    details: Details

    def document(self) -> dict[str, Any]:
        """Return what metrics.json says about them."""
        return self.figures.document() | thresholds(self.details)


def evaluate_detections(
    truth: GroundTruth,
    detections: Detections,
    protocol: Protocol = Protocol(),
    engine: Engine = Engine(),
) -> Evaluated:
    """Compute COCO's figures by an engine, and analyse errors by hotcoco.

    Raises:
        DatasetError: masks or keypoints are missing, or those of the files do not fit together.
        EvaluationError: the engines differ.
    """
    found, evaluation = compute(truth, detections, protocol, engine)
    details = analyse_errors(evaluation, found, truth, detections, protocol)
    return Evaluated(figures_of(found, truth, protocol), details)


def write_evaluated(
    folder: Path,
    dataset: str,
    description: Mapping[str, str],
    truth: GroundTruth,
    detections: Path | Detections,
    evaluated: Mapping[str, Evaluated],
    entry: Mapping[str, Any],
) -> None:
    """Write metrics.json, details_DATASET.json and, given `Detections`, detections_DATASET.json.

    Args:
        folder: RUN/inference.
        dataset: its name.
        description: of the weights; see `write_metrics`.
        truth: the annotations.
        detections: of the images, or the file that holds them.
        evaluated: by kind, including "bbox".
        entry: more to record about the data set, such as the folder of the images.
    """
    if isinstance(detections, Detections):
        file = Path(f"detections_{file_name_of(dataset)}.json")
        write_json(folder / file, detections.results(truth), indent=None)
    else:
        file = detections.resolve()
    figures: dict[str, Any] = {}
    details: dict[str, Any] = {}
    for kind, each in evaluated.items():
        figures |= each.document() if kind == "bbox" else {kind: each.document()}
        details |= each.details if kind == "bbox" else {kind: each.details}
    details_file = f"details_{file_name_of(dataset)}.json"
    write_json(folder / details_file, details, indent=None)
    recorded = {
        **_recorded(truth),
        "detections": str(file),
        "detections_sha256": file_digest(folder / file),
        "details": details_file,
        **entry,
        **figures,
    }
    write_metrics(folder, dataset, description, recorded)


def _recorded(truth: GroundTruth) -> dict[str, Any]:
    return {
        "annotations": str(truth.file.resolve()),
        "annotations_sha256": truth.sha256,
        "image_count": len(truth.image_ids),
    }


class DetectionEvaluator(DatasetEvaluator):
    """Evaluates what the model returns: boxes, masks and keypoints, or an RPN's proposals.

    Proposals get their average recall in metrics.json, and no other file.
    """

    def __init__(
        self,
        dataset: str,
        output: Path,
        description: dict[str, str],
        engine: Engine = Engine(),
        sigmas: Sequence[float] = (),
    ) -> None:
        """Prepare, writing an annotation file for a data set that was registered without one.

        Args:
            dataset: its registered name.
            output: the folder to write to.
            description: of the weights, such as {"weights": "model_final.pth"}.
            engine: hotcoco, pycocotools, or both.
            sigmas: TEST.KEYPOINT_OKS_SIGMAS; empty for COCO's.

        Raises:
            ConfigError: metrics.json in the output folder is the log of Detectron2's trainer.
        """
        check_no_training_log(output)
        self.dataset = dataset
        self.output = output
        self.description = description
        self.engine = engine
        self.sigmas = tuple(sigmas)
        self.metadata = MetadataCatalog.get(dataset)
        if "json_file" not in self.metadata.as_dict():
            file = output / f"{file_name_of(dataset)}_coco_format.json"
            if comm.is_main_process():
                logger.info("%s has no annotation file: writing %s", dataset, file)
                output.mkdir(parents=True, exist_ok=True)
                convert_to_coco_json(dataset, str(file), allow_cached=False)
            comm.synchronize()
            self.metadata.json_file = str(file)
        self.measured: dict[str, float] = {}
        """Speed and size of the model, for metrics.json."""
        self._predictions = Predictions()

    @property
    def annotations(self) -> Path:
        """The annotation file."""
        return Path(self.metadata.json_file)

    @property
    def images(self) -> str:
        """The folder of the images, "" if unknown."""
        folder = self.metadata.get("image_root", "")
        return str(Path(folder).resolve()) if folder else ""

    def keep(self, identity: str) -> frozenset[ImageKey]:
        """Keep predictions on disk until `forget`, and resume a killed evaluation.

        A collective call, before the first image. Returns the ids of the images that are done; see
        `Predictions.keep_in`.
        """
        self._predictions = Predictions()
        name = f"predictions_{file_name_of(self.dataset)}"
        return self._predictions.keep_in(self.output, name, identity)

    def is_complete(self, done: frozenset[ImageKey]) -> bool:
        """Tell whether `done` holds all images. A collective call."""
        found = comm.is_main_process() and done.issuperset(
            read_ground_truth(self.annotations, checked=True).numbers
        )
        return any(comm.all_gather(found))

    def forget(self) -> None:
        """Remove what `keep` stored. A collective call, once the figures are written."""
        self._predictions.forget()

    def reset(self) -> None:
        """Start over; what `keep` restored stays."""
        if not self._predictions.on_disk:
            self._predictions = Predictions()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Gather the detections of a batch."""
        for record, output in zip(inputs, outputs):
            key = record["image_id"]
            self._predictions.add(key if isinstance(key, str) else int(key), found_in(output))

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Compute and write the figures of all processes' detections.

        Returns:
            As Detectron2's evaluator, {"bbox": {"AP": ..., "AP-person": ...}, "segm": ...,
            "keypoints": ..., "panoptic_seg": {"PQ": ...}} in percent, NaN without objects;
            {"box_proposals": {"AR@1000": ...}} for proposals; empty except on the main process.

        Raises:
            DatasetError: the annotations cannot be evaluated.
            EvaluationError: images are missing, the model has other classes than the data, or the
                engines differ.
        """
        of_proposals = any(comm.all_gather(self._predictions.of_proposals))
        truth = read_ground_truth(self.annotations, checked=True)
        categories = dict(enumerate(truth.categories))
        table = self.metadata.get("thing_dataset_id_to_contiguous_id")
        if table is not None:
            categories = {position: category for category, position in table.items()}
        segments = self._predictions.gather_segments()
        detections = self._predictions.gather(truth.numbers, categories)
        if detections is None:
            return OrderedDict()
        if of_proposals:
            return OrderedDict(box_proposals=self._proposals(truth, detections))
        return OrderedDict(self._instances(truth, detections, segments))

    def _instances(
        self,
        truth: GroundTruth,
        detections: Detections,
        segments: Mapping[ImageKey, Segments | None],
    ) -> dict[str, dict[str, float]]:
        evaluated: dict[str, Evaluated] = {}
        for kind in detections.kinds:
            protocol = Protocol.of(kind, self.sigmas)
            try:
                evaluated[kind] = evaluate_detections(truth, detections, protocol, self.engine)
            except DatasetError as error:
                if kind == "bbox":
                    raise
                # Keep the boxes' figures: a training may have taken days.
                logger.error("%s is not evaluated: %s", kind, error)
        panoptic = self._panoptic(segments)
        entry = {"images": self.images, **self.measured, "engine": vars(self.engine), **panoptic}
        write_evaluated(
            self.output, self.dataset, self.description, truth, detections, evaluated, entry
        )
        for kind, each in evaluated.items():
            self._log(truth, kind, f"{each.figures.table()}\n\n{threshold_line(each.details)}")
        for kind, figures in panoptic.items():
            self._log(truth, kind, panoptic_table(figures))
        return {kind: each.figures.flat() for kind, each in evaluated.items()} | panoptic

    def _panoptic(
        self, segments: Mapping[ImageKey, Segments | None]
    ) -> dict[str, dict[str, float]]:
        described = any(each is not None for each in segments.values())
        if not described or not self.metadata.get("panoptic_json"):
            return {}
        try:
            return {"panoptic_seg": panoptic_figures(self.metadata, segments)}
        except (DatasetError, EvaluationError) as error:  # as above
            logger.error("panoptic_seg is not evaluated: %s", error)
            return {}

    def _proposals(self, truth: GroundTruth, proposals: Detections) -> dict[str, float]:
        figures = proposal_figures(truth, proposals, self.engine)
        entry = {**_recorded(truth), "images": self.images, "proposals": figures}
        write_metrics(self.output, self.dataset, self.description, entry)
        self._log(truth, "box_proposals", proposal_table(figures))
        return nan_for_none(figures)

    def _log(self, truth: GroundTruth, kind: str, table: str) -> None:
        images = len(truth.image_ids)
        logger.info("%s of %s, %d images, by %s:", kind, self.dataset, images, truth.file)
        logger.info("\n%s", table)


def detection_evaluator(
    dataset: str, output: str, weights: str, sigmas: Sequence[float] = ()
) -> DetectionEvaluator:
    """Return a `DetectionEvaluator`, given arguments that a LazyConfig can save."""
    return DetectionEvaluator(dataset, Path(output), {"weights": weights}, sigmas=sigmas)
