"""Evaluating an artifact as its detector is evaluated."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn

from resnext_det.engine.trainer import Trainer
from resnext_det.files import file_digest
from resnext_det.runtime import Description, Detector, load

logger = logging.getLogger(__name__)


class Artifact(nn.Module):
    """An artifact behind the interface of a Detectron2 model, for one image after another.

    Attributes:
        class_names: compared with those of the data.
        precision: recorded with the figures.
    """

    def __init__(self, file: Path) -> None:
        """Load an artifact.

        Raises:
            ArtifactError: see `resnext_det.runtime.load`.
            ConfigError: likewise.
        """
        super().__init__()
        self._detector: Detector = load(file, threads=torch.get_num_threads())
        self.class_names = self._detector.description.class_names
        self.precision = self._detector.description.precision
        # Predictions that a killed evaluation kept are those of this file alone.
        digest = torch.frombuffer(bytearray(bytes.fromhex(file_digest(file))), dtype=torch.uint8)
        self.register_buffer("sha256", digest)

    def forward(self, records: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Return the objects in images of the artifact's size, in pixels of the originals."""
        return [{"instances": self._found(record)} for record in records]

    def _found(self, record: dict[str, Any]) -> Instances:
        found = self._detector.detect(record["image"].permute(1, 2, 0).numpy())
        instances = Instances(tuple(record["image"].shape[1:]))
        instances.pred_boxes = Boxes(torch.tensor(found["boxes"]))
        instances.scores = torch.tensor(found["scores"])
        instances.pred_classes = torch.tensor(found["labels"])
        if "masks" in found:
            instances.pred_masks = torch.tensor(found["masks"])[:, None]
        scaled: Instances = detector_postprocess(instances, record["height"], record["width"])
        return scaled


def evaluate_artifact(cfg: CfgNode, file: Path) -> dict[str, Any]:
    """Evaluate an artifact on every data set of DATASETS.TEST.

    Args:
        cfg: with the overrides of `settings`.
        file: the artifact.

    Returns:
        As `resnext_det.engine.evaluate.evaluate`.

    Raises:
        ArtifactError: it cannot be read.
        DatasetError: the data has other classes.
    """
    model = Artifact(file)
    logger.info("evaluating %s", file)
    if cfg.TEST.AUG.ENABLED:
        logger.warning("TEST.AUG is ignored: an artifact detects in one size")
    return Trainer.test(cfg, model)


def settings(description: Description, file: Path) -> list[str]:
    """Return config overrides: images as the artifact takes them, and its name in the results."""
    values = {
        "MODEL.WEIGHTS": file,
        "MODEL.DEVICE": "cpu",
        "INPUT.FORMAT": description.pixel_format,
        "INPUT.MIN_SIZE_TEST": description.shortest_side,
        "INPUT.MAX_SIZE_TEST": description.longest_side,
        "DATALOADER.DECODER": "fast" if description.enlarge == "opencv" else "pillow",
        "OUTPUT_DIR": file.with_name(f"{file.stem}_evaluation"),
    }
    return [str(word) for pair in values.items() for word in pair]
