"""Predictions of a model, image by image; kept on disk as they come, where that is asked for."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
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
from resnext_det.evaluation.detections import Detections

logger = logging.getLogger(__name__)

_DIGITS = 16  # of the identity, in the folder's name
_ABANDONED = 24 * 3600  # seconds since anything was written

ImageKey = int | str
"""The id of an image, as its record has it."""


@dataclass(frozen=True)
class Found:
    """What a model found in one image.

    Attributes:
        rows: (N, 6): x, y, width and height in pixels, score, class of the model.
        segmentations: N masks as COCO's compressed RLE; None from a model without masks.
        keypoints: (N, K, 3): x, y and score; None from a model without keypoints.
        of_proposals: whether it is an RPN's, which have no class.
    """

    rows: NDArray[np.float64]
    segmentations: list[dict[str, Any]] | None = None
    keypoints: NDArray[np.float64] | None = None
    of_proposals: bool = False


def found_in(output: Mapping[str, Any]) -> Found:
    """Return what a model of Detectron2 found in one image, in the model's order.

    Args:
        output: with `Instances` under "instances", or of an RPN alone under "proposals".

    Raises:
        EvaluationError: it has neither.
    """
    of_proposals = "instances" not in output
    if of_proposals and "proposals" not in output:
        raise EvaluationError(
            f"the model gives {', '.join(output) or 'nothing'} for an image, and what is evaluated "
            "is instances or proposals: use Detectron2's evaluator for it, which train_net.py does "
            "not."
        )
    instances: Instances = output["proposals" if of_proposals else "instances"].to("cpu")
    if instances.has("pred_boxes"):
        boxes, scores = instances.pred_boxes.tensor, instances.scores
        classes = instances.pred_classes
    else:
        boxes, scores = instances.proposal_boxes.tensor, instances.objectness_logits
        classes = torch.zeros_like(scores)
    placed: torch.Tensor = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)  # type: ignore[assignment]  # a tensor for a tensor
    # 64 bits hold what 32 do, to the last one.
    columns = [part.double() for part in (placed, scores[:, None], classes[:, None])]
    rows: NDArray[np.float64] = torch.cat(columns, dim=1).numpy()
    if of_proposals:
        return Found(rows, of_proposals=True)
    masks, poses = instances.has("pred_masks"), instances.has("pred_keypoints")
    if not masks and not poses:
        return Found(rows)
    copied = Instances(instances.image_size, **instances.get_fields())
    if poses:  # the conversion changes them in place
        copied.pred_keypoints = instances.pred_keypoints.clone()
    # Detectron2's own, so that masks are encoded and keypoints placed as in its evaluation.
    results = instances_to_coco_json(copied, 0)
    found = [each["keypoints"] for each in results] if poses else []
    shape = len(rows), (instances.pred_keypoints.shape[1] if poses else 0), 3
    return Found(
        rows,
        [each["segmentation"] for each in results] if masks else None,
        np.array(found, np.float64).reshape(shape) if poses else None,
    )


class Predictions:
    """What was found in each image, once: neither twice nor, after `check`, not at all.

    In a folder, every image is a line of a file that the process alone writes. An evaluation that
    was killed leaves it behind, and the next one of the same weights, images and settings goes on
    from there, on any number of processes.
    """

    def __init__(self) -> None:
        """Begin with no image, and keep nothing on disk."""
        self._found: dict[ImageKey, Found] = {}
        self._folder: Path | None = None
        self._file: IO[str] | None = None

    @property
    def of_proposals(self) -> bool:
        """Tell whether they are an RPN's, which have no class."""
        return any(each.of_proposals for each in self._found.values())

    def keep_in(self, parent: Path, name: str, identity: str) -> frozenset[ImageKey]:
        """Keep what comes on disk, and take over what an evaluation that was killed left.

        Called in all processes together.

        Args:
            parent: the folder in which one of their own is made.
            name: that the name of it begins with.
            identity: of weights, images and settings, in hexadecimal digits, the same in all
                processes; predictions of another one are not looked at.

        Returns:
            The ids of the images that need not be predicted again, the same in all processes.
        """
        self._folder = parent / f"{name}.{identity[:_DIGITS]}.partial"
        # One process of each machine reads, which may have a disk of its own.
        if comm.get_local_rank() == 0:
            _remove_abandoned(parent, name)
            self._found = _read(self._folder)
        comm.synchronize()
        file = f"{comm.get_rank()}-{os.getpid()}-{time.time_ns()}.jsonl"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / file).open("x", buffering=1, encoding="utf-8")
        except OSError as error:
            self._keep_no_more(error)
        return frozenset().union(*comm.all_gather(frozenset(self._found)))

    def add(self, image: ImageKey, found: Found) -> None:
        """Add what was found in an image; a second time is ignored.

        Args:
            image: the id of the image.
            found: in it.
        """
        if image in self._found:
            return
        self._found[image] = found
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(_line(image, found)) + "\n")
        except OSError as error:
            self._keep_no_more(error)

    def _keep_no_more(self, error: OSError) -> None:
        """Go on in memory: a full disk is no reason to end an evaluation, or a training."""
        logger.warning(
            "predictions cannot be kept in %s (%s): a killed evaluation would start over",
            self._folder,
            error,
        )
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None

    def gather(
        self, numbers: Mapping[ImageKey, int], category_ids: Mapping[int, int]
    ) -> Detections | None:
        """Return the detections of all processes, in the order of the images.

        Args:
            numbers: of all images that there are, by their ids; see `GroundTruth.numbers`.
            category_ids: of the annotations, by class of the model, from 0 on.

        Returns:
            The detections; None on all processes but the main one.

        Raises:
            EvaluationError: images that no process was given, classes the annotations have not.
        """
        gathered = comm.gather(self._found, dst=0)
        if not comm.is_main_process():
            return None
        found: dict[ImageKey, Found] = {}
        for share in gathered:
            found.update(share)
        _check_images(found, list(numbers))
        ordered = [found[image] for image in numbers]
        table = np.concatenate([np.zeros((0, 6)), *(each.rows for each in ordered)])
        classes = table[:, 5].astype(np.int64)
        _check_classes(classes, category_ids)
        ids = np.array([category_ids[kind] for kind in range(len(category_ids))], np.int64)
        many = [len(each.rows) for each in ordered]
        masks = None
        if any(each.segmentations is not None for each in ordered):
            masks = np.empty(len(table), np.object_)
            masks[:] = [mask for each in ordered for mask in each.segmentations or []]
        poses = [each.keypoints for each in ordered if each.keypoints is not None]
        # An image without detections does not say how many keypoints there are.
        poses = [each for each in poses if len(each)] or poses[:1]
        return Detections(
            np.repeat(np.array(list(numbers.values()), np.int64), many),
            ids[classes],
            table[:, :4],
            table[:, 4],
            masks,
            np.concatenate(poses) if poses else None,
        )

    @property
    def on_disk(self) -> bool:
        """Tell whether they are kept."""
        return self._folder is not None

    def forget(self) -> None:
        """Forget all, on disk as well: the figures are written. Called in all processes."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        comm.synchronize()
        if self._folder is not None and comm.get_local_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._found, self._folder, self._file = {}, None, None


def _check_images(found: Mapping[ImageKey, Found], known: Sequence[ImageKey]) -> None:
    lost = [image for image in known if image not in found]
    if lost:
        raise EvaluationError(
            f"{len(lost)} of {len(known)} images were not predicted, such as {quoted(lost[:5])}: "
            "all that the annotations list must be, as their objects count as missed otherwise."
        )
    strange = sorted(set(found) - set(known), key=str)
    if strange:
        raise EvaluationError(
            f"{len(strange)} images were predicted that the annotations do not list, such as "
            f"{quoted(strange[:5])}: the data set's images and its annotation file differ."
        )


def _check_classes(classes: NDArray[np.int64], category_ids: Mapping[int, int]) -> None:
    if len(classes) and classes.max() >= len(category_ids):
        raise EvaluationError(
            f"the model finds class {classes.max()}, and the data set has {len(category_ids)} "
            "classes: set MODEL.ROI_HEADS.NUM_CLASSES to that, or evaluate on the data that it "
            "was trained for."
        )


def _remove_abandoned(parent: Path, name: str) -> None:
    """Remove predictions that nobody will go on with; others may be of an evaluation that runs."""
    for folder in parent.glob(f"{glob.escape(name)}.*.partial"):
        with contextlib.suppress(OSError, ValueError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > _ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def _line(image: ImageKey, found: Found) -> list[Any]:
    poses = None if found.keypoints is None else found.keypoints.tolist()
    return [image, found.rows.tolist(), found.of_proposals, found.segmentations, poses]


def _read(folder: Path) -> dict[ImageKey, Found]:
    """Read what was left. A line that is broken, such as half a line, leaves its image open."""
    found: dict[ImageKey, Found] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                image, rows, of_proposals, masks, poses = json.loads(line)
                table = np.array(rows, np.float64).reshape(len(rows), 6)
                points = None
                if poses is not None:
                    points = np.array(poses, np.float64).reshape(len(rows), -1 if rows else 0, 3)
                whole = masks is None or len(masks) == len(rows)
            except (ValueError, TypeError, LookupError, RecursionError):
                continue
            if isinstance(image, (int, str)) and isinstance(of_proposals, bool) and whole:
                found[image] = Found(table, masks, points, of_proposals)
    return found
