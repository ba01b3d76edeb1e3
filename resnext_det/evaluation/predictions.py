"""Predictions of a model by image, kept on disk so that a killed evaluation can resume."""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from numpy.typing import NDArray

from resnext_det.errors import EvaluationError, quoted
from resnext_det.evaluation.annotations import ImageKey
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.panoptic import Segments, segments_in

_DIGITS = 16  # of the identity, in the folder's name


@dataclass(frozen=True)
class Found:
    """The predictions for one image.

    Attributes:
        rows: (N, 6): x, y, width and height in pixels, score, class of the model.
        segmentations: N masks as COCO's compressed RLE; None from a model without masks.
        keypoints: (N, K, 3): x, y and score; None from a model without keypoints.
        of_proposals: True for an RPN's proposals, which have no class.
        segments: of a Panoptic FPN; None from other models.
    """

    rows: NDArray[np.float64]
    segmentations: list[dict[str, Any]] | None = None
    keypoints: NDArray[np.float64] | None = None
    of_proposals: bool = False
    segments: Segments | None = None


def found_in(output: Mapping[str, Any]) -> Found:
    """Convert a Detectron2 model's output for one image.

    Raises:
        EvaluationError: it has neither "instances" nor "proposals".
    """
    of_proposals = "instances" not in output
    if of_proposals and "proposals" not in output:
        raise EvaluationError(
            f"the model returns {', '.join(output) or 'nothing'}, and this evaluator needs "
            "instances or proposals: use one of Detectron2's."
        )
    instances: Instances = output["proposals" if of_proposals else "instances"].to("cpu")
    if instances.has("pred_boxes"):
        boxes, scores = instances.pred_boxes.tensor, instances.scores
        classes = instances.pred_classes
    else:
        boxes, scores = instances.proposal_boxes.tensor, instances.objectness_logits
        classes = torch.zeros_like(scores)
    placed: torch.Tensor = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)  # type: ignore[assignment]  # a tensor for a tensor
    columns = [part.double() for part in (placed, scores[:, None], classes[:, None])]
    rows: NDArray[np.float64] = torch.cat(columns, dim=1).numpy()
    masks, poses = instances.has("pred_masks"), instances.has("pred_keypoints")
    if of_proposals or not (masks or poses):
        return Found(rows, of_proposals=of_proposals, segments=segments_in(output))
    copied = Instances(instances.image_size, **instances.get_fields())
    if poses:  # Detectron2's conversion modifies them in place
        copied.pred_keypoints = instances.pred_keypoints.clone()
    results = instances_to_coco_json(copied, 0)
    found = [each["keypoints"] for each in results] if poses else []
    shape = len(rows), (instances.pred_keypoints.shape[1] if poses else 0), 3
    return Found(
        rows,
        [each["segmentation"] for each in results] if masks else None,
        np.array(found, np.float64).reshape(shape) if poses else None,
        segments=segments_in(output),
    )


class Predictions:
    """The predictions for this process's share of the images, each image once.

    After `keep_in`, each image is also a line of this process's own file. The next evaluation of
    the same weights, images and settings resumes from the files of a killed one, on any number of
    processes.
    """

    def __init__(self) -> None:
        self._found: dict[ImageKey, Found] = {}
        self._folder: Path | None = None
        self._file: IO[str] | None = None

    @property
    def of_proposals(self) -> bool:
        """Tell whether these are an RPN's proposals."""
        return any(each.of_proposals for each in self._found.values())

    @property
    def on_disk(self) -> bool:
        """Tell whether `keep_in` was called."""
        return self._folder is not None

    def keep_in(self, parent: Path, name: str, identity: str) -> frozenset[ImageKey]:
        """Keep predictions on disk, and restore those of a killed evaluation. A collective call.

        Args:
            parent: the folder in which to make a folder for them.
            name: of the data set, safe for a file name.
            identity: a hexadecimal digest of weights, images and settings, the same in all
                processes; predictions with another one are removed.

        Returns:
            The ids of the images that are done in any process.
        """
        self._folder = parent / f"{name}.{identity[:_DIGITS]}.partial"
        if comm.get_local_rank() == 0:  # each machine may have a disk of its own
            for folder in parent.glob(f"{glob.escape(name)}.*.partial"):
                if folder != self._folder:
                    shutil.rmtree(folder, ignore_errors=True)
            self._found = _read(self._folder)
        comm.synchronize()
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{comm.get_rank()}-{os.getpid()}-{time.time_ns()}.jsonl"
        self._file = file.open("x", buffering=1, encoding="utf-8")
        return frozenset().union(*comm.all_gather(frozenset(self._found)))

    def add(self, image: ImageKey, found: Found) -> None:
        """Add the predictions for an image, unless it has some."""
        if image in self._found:
            return
        self._found[image] = found
        if self._file is not None:
            poses = None if found.keypoints is None else found.keypoints.tolist()
            line = [image, found.rows.tolist(), found.of_proposals, found.segmentations, poses]
            line.append(found.segments)
            self._file.write(json.dumps(line) + "\n")

    def forget(self) -> None:
        """Remove all, on disk as well. A collective call, once the figures are written."""
        if self._file is not None:
            self._file.close()
        comm.synchronize()
        if self._folder is not None and comm.get_local_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._found, self._folder, self._file = {}, None, None

    def gather_segments(self) -> dict[ImageKey, Segments | None]:
        """Return the segments of all processes' images; empty except on the main process."""
        own = {image: each.segments for image, each in self._found.items()}
        shares = comm.gather(own, dst=0)
        return {image: each for share in shares for image, each in share.items()}

    def gather(
        self, numbers: Mapping[ImageKey, int], category_ids: Mapping[int, int]
    ) -> Detections | None:
        """Return the detections of all processes; None except on the main one.

        Args:
            numbers: of all images; see `GroundTruth.numbers`.
            category_ids: by class of the model.

        Raises:
            EvaluationError: an image is missing, or an image or class is unknown.
        """
        shares = comm.gather(self._found, dst=0)
        if not comm.is_main_process():
            return None
        found = {image: each for share in shares for image, each in share.items()}
        _check_images(found, numbers)
        ordered = [found[image] for image in numbers]
        table = np.concatenate([np.zeros((0, 6)), *(each.rows for each in ordered)])
        classes = table[:, 5].astype(np.int64)
        if len(classes) and classes.max() >= len(category_ids):
            raise EvaluationError(
                f"the model finds class {classes.max()}, and the data set has {len(category_ids)} "
                "classes: set MODEL.ROI_HEADS.NUM_CLASSES to that, or evaluate on other data."
            )
        counts = [len(each.rows) for each in ordered]
        ids = np.array([category_ids[number] for number in range(len(category_ids))], np.int64)
        masks = None
        if any(each.segmentations is not None for each in ordered):
            masks = np.empty(len(table), np.object_)
            masks[:] = [mask for each in ordered for mask in each.segmentations or []]
        poses = [each.keypoints for each in ordered if each.keypoints is not None]
        # Empty keypoints read from disk have lost their number of points.
        poses = [each for each in poses if len(each)] or poses[:1]
        return Detections(
            np.repeat(np.array(list(numbers.values()), np.int64), counts),
            ids[classes],
            table[:, :4],
            table[:, 4],
            masks,
            np.concatenate(poses) if poses else None,
        )


def _check_images(found: Mapping[ImageKey, Found], numbers: Mapping[ImageKey, int]) -> None:
    missing = [image for image in numbers if image not in found]
    if missing:
        raise EvaluationError(
            f"{len(missing)} of {len(numbers)} images were not predicted, such as "
            f"{quoted(missing[:5])}, so their objects would count as missed: predict all images "
            "that the annotations list."
        )
    unknown = sorted(set(found) - set(numbers), key=str)
    if unknown:
        raise EvaluationError(
            f"{len(unknown)} predicted images are not in the annotations, such as "
            f"{quoted(unknown[:5])}: register the images and annotations of one data set."
        )


def _read(folder: Path) -> dict[ImageKey, Found]:
    """Read the files of a killed evaluation, skipping damaged lines."""
    found: dict[ImageKey, Found] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                image, rows, of_proposals, masks, poses, segments = json.loads(line)
                table = np.array(rows, np.float64).reshape(len(rows), 6)
                if poses is not None:
                    poses = np.array(poses, np.float64)
                    poses = poses.reshape(len(rows), -1 if rows else 0, 3)
                whole = masks is None or len(masks) == len(rows)
            except (ValueError, TypeError, RecursionError):
                continue
            if isinstance(image, ImageKey) and isinstance(of_proposals, bool) and whole:
                found[image] = Found(table, masks, poses, of_proposals, segments)
    return found
