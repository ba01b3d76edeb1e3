"""Predictions of a model, image by image; kept on disk as they come, where that is asked for."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from numpy.typing import NDArray

from resnext_det.errors import EvaluationError
from resnext_det.evaluation.detections import Detections

logger = logging.getLogger(__name__)

_DIGITS = 16  # of the identity, in the folder's name
_ABANDONED = 24 * 3600  # seconds since anything was written

Rows = NDArray[np.float64]
"""(N, 6): x, y, width and height in pixels, score, class of the model."""


def rows_of(output: Mapping[str, Any]) -> Rows:
    """Return what a model of Detectron2 found in one image, in the model's order.

    Args:
        output: with `Instances` under "instances", or of an RPN alone under "proposals".
    """
    found: Instances = (output["instances"] if "instances" in output else output["proposals"]).to(
        "cpu"
    )
    if found.has("pred_boxes"):
        boxes, scores, classes = found.pred_boxes.tensor, found.scores, found.pred_classes
    else:
        boxes, scores = found.proposal_boxes.tensor, found.objectness_logits
        classes = torch.zeros_like(scores)
    placed: torch.Tensor = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)  # type: ignore[assignment]  # a tensor for a tensor
    # 64 bits hold what 32 do, to the last one.
    columns = [part.double() for part in (placed, scores[:, None], classes[:, None])]
    rows: Rows = torch.cat(columns, dim=1).numpy()
    return rows


class Predictions:
    """What was found in each image, once: neither twice nor, after `check`, not at all.

    In a folder, every image is a line of a file that the process alone writes. An evaluation that
    was killed leaves it behind, and the next one of the same weights, images and settings goes on
    from there, on any number of processes.

    Attributes:
        of_proposals: whether they are an RPN's, which have no class.
    """

    def __init__(self) -> None:
        """Begin with no image, and keep nothing on disk."""
        self.of_proposals = False
        self._rows: dict[int, Rows] = {}
        self._folder: Path | None = None
        self._file: IO[str] | None = None

    def keep_in(self, parent: Path, name: str, identity: str) -> frozenset[int]:
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
            self._rows, self.of_proposals = _read(self._folder)
        comm.synchronize()
        file = f"{comm.get_rank()}-{os.getpid()}-{time.time_ns()}.jsonl"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / file).open("x", buffering=1, encoding="utf-8")
        except OSError as error:
            self._keep_no_more(error)
        return frozenset().union(*comm.all_gather(frozenset(self._rows)))

    def add(self, image_id: int, rows: Rows, *, of_proposals: bool = False) -> None:
        """Add what was found in an image; a second time is passed over.

        Args:
            image_id: of the image.
            rows: what was found.
            of_proposals: whether it is an RPN's.
        """
        if image_id in self._rows:
            return
        self.of_proposals = of_proposals
        self._rows[image_id] = rows
        if self._file is None:
            return
        try:
            self._file.write(json.dumps([image_id, rows.tolist(), of_proposals]) + "\n")
        except OSError as error:
            self._keep_no_more(error)

    def _keep_no_more(self, error: OSError) -> None:
        """Go on in memory: a full disk is no reason to end an evaluation, or a training."""
        logger.warning(
            "predictions cannot be kept in %s (%s): if this evaluation is killed, it begins anew",
            self._folder,
            error,
        )
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None

    def gather(
        self, image_ids: Iterable[int], category_ids: Mapping[int, int]
    ) -> Detections | None:
        """Return the detections of all processes, in the order of the images.

        Args:
            image_ids: of all images that there are.
            category_ids: of the annotations, by class of the model, from 0 on.

        Returns:
            The detections; None on all processes but the main one.

        Raises:
            EvaluationError: images that no process was given, classes the annotations have not.
        """
        gathered = comm.gather(self._rows, dst=0)
        if not comm.is_main_process():
            return None
        rows: dict[int, Rows] = {}
        for share in gathered:
            rows.update(share)
        known = list(image_ids)
        _check_images(rows, known)
        table = np.concatenate([np.zeros((0, 6)), *(rows[image_id] for image_id in known)])
        classes = table[:, 5].astype(np.int64)
        _check_classes(classes, category_ids)
        numbers = np.array([category_ids[kind] for kind in range(len(category_ids))], np.int64)
        of_images = np.repeat(known, [len(rows[image_id]) for image_id in known]).astype(np.int64)
        return Detections(of_images, numbers[classes], table[:, :4], table[:, 4])

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
        self._rows, self._folder, self._file = {}, None, None


def _check_images(rows: Mapping[int, Rows], known: Sequence[int]) -> None:
    lost = [number for number in known if number not in rows]
    if lost:
        raise EvaluationError(
            f"{len(lost)} of {len(known)} images were not predicted, such as {lost[:5]}: all that "
            "the annotations list must be, as their objects count as missed otherwise."
        )
    strange = sorted(set(rows) - set(known))
    if strange:
        raise EvaluationError(
            f"{len(strange)} images were predicted that the annotations do not list, such as "
            f"{strange[:5]}: the data set's images and its annotation file differ."
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


def _read(folder: Path) -> tuple[dict[int, Rows], bool]:
    """Read what was left, and whether it is of proposals.

    Of a line that is none, such as half a line, the image counts as open.
    """
    rows: dict[int, Rows] = {}
    of_proposals = False
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                image_id, found, kind = json.loads(line)
                table = np.array(found, np.float64).reshape(len(found), 6)
            except (ValueError, TypeError, LookupError, RecursionError):
                continue
            if isinstance(image_id, int) and isinstance(kind, bool):
                rows[image_id], of_proposals = table, kind
    return rows, of_proposals
