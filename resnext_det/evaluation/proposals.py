"""An evaluator that writes an RPN's proposals to a file, and computes their average recall."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.structures import Instances
from detectron2.utils import comm
from numpy.typing import NDArray

from resnext_det.data.proposals import ProposalWriter, each_image, read_proposals
from resnext_det.evaluation.annotations import GroundTruth, ImageKey, read_ground_truth
from resnext_det.evaluation.coco import LIMITS, Engine
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.evaluator import DetectionEvaluator


class ProposalEvaluator(DetectionEvaluator):
    """Writes proposals to a file as they come, whatever their number: no process holds them all.

    The next evaluation of the same weights, images and settings completes the file of a killed one.
    """

    def __init__(
        self,
        dataset: str,
        output: Path,
        description: dict[str, str],
        engine: Engine,
        file: Path,
        most: int,
        *,
        figures: bool = True,
    ) -> None:
        """Prepare; see `DetectionEvaluator`.

        Args:
            dataset: its registered name.
            output: the folder for metrics.json.
            description: of the weights.
            engine: of the figures.
            file: to write.
            most: proposals per image.
            figures: whether to compute the recall, which holds all proposals in memory.
        """
        super().__init__(dataset, output, description, engine)
        self.file = file
        self._most = most
        self._figures = figures
        self._writer: ProposalWriter

    def keep(self, identity: str) -> frozenset[ImageKey]:
        """Open the file, and return the ids of the images that it holds. A collective call."""
        records = DatasetCatalog.get(self.dataset)
        images = {int(each["image_id"]): (each["width"], each["height"]) for each in records}
        self._writer = ProposalWriter(self.file, images, self._most, identity)
        if comm.is_main_process():
            self._writer.start()
        comm.synchronize()
        return frozenset(self._writer.open())

    def is_complete(self, done: frozenset[ImageKey]) -> bool:
        """Tell whether `done` holds all images."""
        return len(done) == len(self._writer)

    def reset(self) -> None:
        """Keep what is written."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Write the proposals of a batch."""
        for record, output in zip(inputs, outputs):
            found: Instances = output["proposals"].to("cpu")
            boxes, scores = found.proposal_boxes.tensor, found.objectness_logits
            self._writer.add(int(record["image_id"]), boxes.float().numpy(), scores.float().numpy())

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Complete the file, and compute the recall as `DetectionEvaluator` does.

        Raises:
            DatasetError: the annotations cannot be evaluated.
            EvaluationError: the engines differ.
        """
        self._writer.close()
        comm.synchronize()
        if comm.is_main_process():
            self._writer.finish()
        comm.synchronize()
        if not self._figures or not comm.is_main_process():
            return OrderedDict()
        truth = read_ground_truth(self.annotations, checked=True)
        proposals = best_proposals(self.file, truth)
        return OrderedDict(box_proposals=self._proposals(truth, proposals))

    def forget(self) -> None:
        """Keep the file."""


def best_proposals(file: Path, truth: GroundTruth) -> Detections:
    """Read as many proposals per image as the figures need.

    Raises:
        DatasetError: the file cannot be read or is malformed.
    """
    ids: list[int] = []
    boxes: list[NDArray[np.floating[Any]]] = [np.zeros((0, 4))]
    scores: list[NDArray[np.floating[Any]]] = [np.zeros(0)]
    for image, corners, logits in each_image(read_proposals(file)):
        count = min(len(logits), max(LIMITS))
        ids += [image] * count
        boxes.append(np.hstack([corners[:count, :2], corners[:count, 2:] - corners[:count, :2]]))
        scores.append(logits[:count])
    category = next(iter(truth.categories))
    return Detections(
        np.array(ids, np.int64),
        np.full(len(ids), category, np.int64),
        np.concatenate(boxes).astype(np.float64),
        np.concatenate(scores).astype(np.float64),
    )
