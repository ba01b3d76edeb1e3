"""Detections -> COCO's figures and tables, for Detectron2's programs and for files."""

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

from resnext_det.errors import ConfigError, DatasetError
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.coco import (
    ENGINES,
    Protocol,
    accumulated,
    compute,
    hotcoco_evaluation,
)
from resnext_det.evaluation.detections import Detections, check_detections
from resnext_det.evaluation.error_analysis import ErrorAnalysis, analyse_errors
from resnext_det.evaluation.figures import Figures, figures_of, proposal_figures, proposal_table
from resnext_det.evaluation.plausibility import suspicions
from resnext_det.evaluation.predictions import ImageKey, Predictions, found_in
from resnext_det.evaluation.results_file import (
    check_no_training_log,
    file_name_of,
    write_detections,
    write_metrics,
)
from resnext_det.files import file_digest, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """What computes the figures.

    Attributes:
        name: "hotcoco", or "pycocotools", the reference, which takes a hundred times as long.
        cross_check: compute by both, and refuse any difference.
    """

    name: str = "hotcoco"
    cross_check: bool = False

    def __post_init__(self) -> None:
        """Refuse an engine that is not known."""
        if self.name not in ENGINES:
            raise ConfigError(
                f"there is no engine {self.name!r} to compute figures with: {' or '.join(ENGINES)}"
            )


@dataclass(frozen=True)
class Evaluated:
    """The figures of detections, and where they err."""

    figures: Figures
    details: ErrorAnalysis


def evaluate_detections(
    truth: GroundTruth,
    detections: Detections,
    engine: Engine = Engine(),
    source: str = "the detections",
    protocol: Protocol = Protocol(),
) -> Evaluated:
    """Compute COCO's figures, and where the detector errs.

    Detections that look as if they were in another form than COCO's are warned about.

    Args:
        truth: the annotations.
        detections: of its images. Without any, the figures are 0, as nothing was found.
        engine: what computes the figures; the tables of errors are hotcoco's.
        source: where the detections are from, for messages.
        protocol: of boxes, masks or keypoints.

    Raises:
        DatasetError: detections of other images or classes; annotations without masks or
            keypoints, or with other ones.
        EvaluationError: the engines differ.
    """
    check_detections(detections, truth, source)
    if protocol.kind == "bbox":
        for suspicion in suspicions(truth, detections):
            logger.warning("%s: %s", source, suspicion)
    # Ties in score go to the first: the order must not depend on how images were shared out.
    ordered = detections.in_order(truth.image_ids)
    evaluation = hotcoco_evaluation(truth, ordered, protocol)
    fast = accumulated(evaluation, protocol)
    found = fast
    if engine != Engine():
        found = compute(
            truth, ordered, protocol, engine=engine.name, cross_check=engine.cross_check
        )
    figures = figures_of(found, truth, protocol)
    return Evaluated(figures, analyse_errors(evaluation, fast, truth, ordered, protocol))


def evaluate_boxes(annotations: Path, detections: Sequence[dict[str, Any]]) -> Figures:
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
    return evaluate_detections(read_ground_truth(annotations), Detections.of(detections)).figures


def write_evaluated(
    folder: Path,
    dataset: str,
    description: Mapping[str, str],
    truth: GroundTruth,
    detections: Path | Detections,
    evaluated: Mapping[str, Evaluated],
    entry: Mapping[str, Any],
) -> None:
    """Write an evaluation: metrics.json, the detections, the details.

    Args:
        folder: RUN/inference.
        dataset: its name.
        description: see `results_file.write_metrics`.
        truth: the annotations.
        detections: a file that there is already, or what to write.
        evaluated: by kind, "bbox" among them: its figures stand at the data set itself.
        entry: what else to record of the data set, such as the folder of the images.
    """
    if isinstance(detections, Detections):
        file = Path(f"detections_{file_name_of(dataset)}.json")
        keys = dict(zip(truth.numbers.values(), truth.numbers))
        write_detections(folder / file, detections, keys)
    else:
        file = detections.resolve()
    details = f"details_{file_name_of(dataset)}.json"
    others = {kind: each for kind, each in evaluated.items() if kind != "bbox"}
    more = {kind: each.details.document(truth) for kind, each in others.items()}
    document = {**evaluated["bbox"].details.document(truth), **more}
    write_json(folder / details, document, indent=None)
    write_metrics(
        folder,
        dataset,
        description,
        {
            "annotations": str(truth.file.resolve()),
            "annotations_sha256": truth.sha256,
            "image_count": len(truth.image_ids),
            "detections": str(file),
            "detections_sha256": file_digest(folder / file),
            "details": details,
            **entry,
            **evaluated["bbox"].figures.document(),
            **{kind: each.figures.document() for kind, each in others.items()},
        },
    )


class DetectionEvaluator(DatasetEvaluator):
    """Detectron2's evaluator protocol: gathers detections, computes and writes the figures.

    Evaluates boxes and, if the model gives them, masks and keypoints. Writes `metrics.json`,
    `detections_DATASET.json` and `details_DATASET.json` into the output folder; for an RPN alone,
    `metrics.json` with the average recall of its proposals.
    """

    def __init__(
        self,
        dataset: str,
        output: Path,
        description: dict[str, str],
        engine: Engine = Engine(),
        sigmas: Sequence[float] = (),
    ) -> None:
        """Prepare for one data set.

        Args:
            dataset: a registered data set with a COCO annotation file.
            output: the folder for what is written.
            description: what to record beside the figures, such as the weights' name.
            engine: what computes the figures.
            sigmas: of keypoints, as TEST.KEYPOINT_OKS_SIGMAS; empty for COCO's.

        Raises:
            ConfigError: Detectron2's trainer logs to metrics.json in the output folder.
        """
        check_no_training_log(output)
        self.dataset = dataset
        self.output = output
        self.description = description
        self.engine = engine
        self.sigmas = tuple(sigmas)
        self.metadata = MetadataCatalog.get(dataset)
        if "json_file" not in self.metadata.as_dict():
            self.metadata.json_file = _converted(dataset, output)
        self.measured: dict[str, float] = {}  # of the model, for metrics.json
        self._predictions = Predictions()
        self._kept = False

    @property
    def annotations(self) -> Path:
        """The annotation file."""
        return Path(self.metadata.json_file)

    @property
    def images(self) -> str:
        """The folder of the images, "" where the data set names none."""
        folder = self.metadata.get("image_root", "")
        return str(Path(folder).resolve()) if folder else ""

    def needs_none_but(self, done: frozenset[ImageKey]) -> bool:
        """Tell whether all images are among those that are done; the same in all processes."""
        found = comm.is_main_process() and done.issuperset(
            read_ground_truth(self.annotations, checked=True).image_keys
        )
        return any(comm.all_gather(found))

    def keep(self, identity: str) -> frozenset[ImageKey]:
        """Keep predictions on disk until `forget`, and go on from those there are.

        Called in all processes together, before the first image.

        Args:
            identity: of weights, images and settings.

        Returns:
            The ids of the images that need not be predicted again.
        """
        self._predictions = Predictions()
        done = self._predictions.keep_in(
            self.output, f"predictions_{file_name_of(self.dataset)}", identity
        )
        self._kept = True
        return done

    def reset(self) -> None:
        """Forget what was gathered, except for what `keep` just took over."""
        if not self._kept:
            self._predictions = Predictions()
        self._kept = False

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Gather the detections of a batch.

        Args:
            inputs: the model's inputs; "image_id" is read.
            outputs: the model's outputs, with `Instances` under "instances", or under "proposals".
        """
        for record, output in zip(inputs, outputs):
            key = record["image_id"]
            self._predictions.add(key if isinstance(key, str) else int(key), found_in(output))

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Compute the figures of all processes' detections.

        Returns:
            {"bbox": {"AP": ..., "AP50": ..., "AP-person": ...}} in percent, NaN for what cannot
            be computed, as Detectron2's own evaluator, and so for "segm" and "keypoints" if the
            model has them; {"box_proposals": {"AR@1000": ...}} for proposals; nothing but on the
            main process.

        Raises:
            EvaluationError: images were left out, the model has other classes than the data, or
                the engines differ.
        """
        of_proposals = any(comm.all_gather(self._predictions.of_proposals))
        truth = read_ground_truth(self.annotations, checked=True)
        # A data set without such a table counts its categories as a model does.
        table = self.metadata.get("thing_dataset_id_to_contiguous_id")
        categories = dict(enumerate(truth.categories))
        if table is not None:
            categories = {position: category for category, position in table.items()}
        detections = self._predictions.gather(truth.numbers, categories)
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if detections is not None:
            write = self._proposals if of_proposals else self._instances
            results = OrderedDict(write(truth, detections))
        if not self._predictions.on_disk:
            self._predictions.forget()
        return results

    def forget(self) -> None:
        """Forget what `keep` kept: all is written. Called in all processes."""
        self._predictions.forget()

    def _instances(self, truth: GroundTruth, detections: Detections) -> dict[str, dict[str, float]]:
        evaluated: dict[str, Evaluated] = {}
        for kind in detections.kinds:
            try:
                protocol = Protocol.of(kind, self.sigmas)
                evaluated[kind] = evaluate_detections(
                    truth, detections, self.engine, protocol=protocol
                )
            except DatasetError as error:
                if kind == "bbox":
                    raise
                # The training is done, and its boxes have figures.
                logger.error("%s is not evaluated: %s", kind, error)
        images = {"images": self.images}
        arguments = self.output, self.dataset, self.description, truth, detections, evaluated
        write_evaluated(*arguments, {**images, **self.measured, "engine": vars(self.engine)})
        for kind, each in evaluated.items():
            self._tell(truth, kind, each.figures.table())
        return {kind: each.figures.flat() for kind, each in evaluated.items()}

    def _proposals(self, truth: GroundTruth, proposals: Detections) -> dict[str, dict[str, float]]:
        figures = proposal_figures(
            truth, proposals, engine=self.engine.name, cross_check=self.engine.cross_check
        )
        entry = {
            "annotations": str(truth.file.resolve()),
            "annotations_sha256": truth.sha256,
            "image_count": len(truth.image_ids),
            "images": self.images,
            "proposals": figures,
        }
        write_metrics(self.output, self.dataset, self.description, entry)
        self._tell(truth, "box_proposals", proposal_table(figures))
        flat = {name: float("nan") if v is None else v for name, v in figures.items()}
        return {"box_proposals": flat}

    def _tell(self, truth: GroundTruth, kind: str, table: str) -> None:
        images = len(truth.image_ids)
        logger.info("%s of %s, %d images, by %s:", kind, self.dataset, images, truth.file)
        logger.info("\n%s", table)


def _converted(dataset: str, output: Path) -> str:
    """Write a data set that was registered without a file into one, as Detectron2 does."""
    file = output / f"{file_name_of(dataset)}_coco_format.json"
    if comm.is_main_process():
        output.mkdir(parents=True, exist_ok=True)
        logger.info("%s has no annotation file: it is written to %s", dataset, file)
        convert_to_coco_json(dataset, str(file), allow_cached=False)
    comm.synchronize()
    return str(file)


def detection_evaluator(
    dataset: str, output: str, weights: str, sigmas: Sequence[float] = ()
) -> DetectionEvaluator:
    """Return a `DetectionEvaluator` of arguments that a LazyConfig can hold and save.

    Args:
        dataset: a registered data set with a COCO annotation file.
        output: the folder for what is written.
        weights: their name, to record beside the figures.
        sigmas: of keypoints; empty for COCO's.
    """
    return DetectionEvaluator(dataset, Path(output), {"weights": weights}, sigmas=sigmas)
