"""A loss that is not finite: which images, which losses, and what to look at."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor

from resnext_det.errors import TrainingError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadUpdate:
    """An update with a loss that is NaN or infinite.

    Attributes:
        iteration: of it, from 0.
        process: that this part of it was computed by.
        learning_rate: at that iteration.
        losses: by name, one mapping for each micro-batch.
        files: of the images, one list for each micro-batch.
        batches: what the model was given.
    """

    iteration: int
    process: int
    learning_rate: float
    losses: Sequence[dict[str, float]]
    files: Sequence[list[str]]
    batches: Sequence[list[dict[str, Any]]]

    @classmethod
    def of(
        cls,
        iteration: int,
        process: int,
        learning_rate: float,
        losses: Sequence[dict[str, Tensor]],
        batches: Sequence[list[dict[str, Any]]],
    ) -> BadUpdate:
        """Make one of what a process computed."""
        numbers = [{name: float(loss) for name, loss in part.items()} for part in losses]
        files = [[str(record.get("file_name")) for record in batch] for batch in batches]
        return cls(iteration, process, learning_rate, numbers, files, batches)

    @property
    def bad(self) -> list[int]:
        """The micro-batches that have a loss which is not finite."""
        return [
            number
            for number, part in enumerate(self.losses)
            if not all(math.isfinite(loss) for loss in part.values())
        ]

    def describe(self) -> str:
        """Return iteration, learning rate, losses and images in one sentence; "" if all is well."""
        parts = [
            f"{', '.join(f'{name} {loss:g}' for name, loss in self.losses[number].items())} "
            f"for {', '.join(self.files[number])}"
            for number in self.bad
        ]
        return "; ".join(parts)

    def save(self, folder: Path) -> Path:
        """Write what the model was given, and the losses, for a look.

        Args:
            folder: of the run.

        Returns:
            The .json file; a .pth of the same name has the images and their boxes, which
            `torch.load(FILE, weights_only=True)` reads.
        """
        file = folder / f"bad_update_{self.iteration:07d}_process{self.process}.json"
        content = {
            "iteration": self.iteration,
            "learning_rate": self.learning_rate,
            "micro_batches": [
                {"files": self.files[number], "losses": self.losses[number]} for number in self.bad
            ],
        }
        file.write_text(json.dumps(content, indent=1))
        records = [_plain(record) for number in self.bad for record in self.batches[number]]
        torch.save(records, file.with_suffix(".pth"))
        return file


def decide(update: BadUpdate, folder: Path, skipped: int, allowed: int) -> None:
    """Stop a training, or let it go on without an update; all processes do the same.

    Args:
        update: what this process computed; its losses may be finite, and those of another not.
        folder: of the run, where the images are saved.
        skipped: such updates so far, this one included.
        allowed: how many are left out before the training stops.

    Raises:
        TrainingError: it was one too many.
    """
    text = ""
    if update.bad:
        text = f"{update.describe()} (saved in {update.save(folder)})"
    told = [each for each in comm.all_gather(text) if each]
    line = (
        f"a loss is not finite at iteration {update.iteration}, learning rate "
        f"{update.learning_rate:g}: {'; '.join(told)}"
    )
    if skipped > allowed:
        raise TrainingError(
            f"{line}. Mostly the learning rate is too high for the batch (SOLVER.BASE_LR), the "
            "weights did not fit, or boxes of those images are broken. SOLVER.SKIP_BAD_UPDATES N "
            f"leaves out up to N such updates (it is {allowed})."
        )
    logger.warning("update left out (%d of at most %d): %s", skipped, allowed, line)


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of the model's input in tensors and numbers."""
    plain = {name: value for name, value in record.items() if isinstance(value, Tensor | str | int)}
    instances = record.get("instances")
    if isinstance(instances, Instances):
        plain["gt_boxes"] = instances.gt_boxes.tensor
        plain["gt_classes"] = instances.gt_classes
    return plain
