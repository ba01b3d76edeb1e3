"""Run a trained detector on pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image

from resnext_det.backbones import build_detector
from resnext_det.checkpoint_file import read_run
from resnext_det.config import complete
from resnext_det.data.resizing import FastResizeTransform, channels_first
from resnext_det.engine.recorded_config import check_same_function
from resnext_det.errors import ConfigError, DatasetError, quoted
from resnext_det.images import as_array, check_pixel_format
from resnext_det.weights.loading import load_weights, weights_file

logger = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass(frozen=True)
class Detection:
    """A detected object.

    Attributes:
        box: x, y, width, height in pixels of the picture.
        name: of the class.
        score: 0 to 1.
        category_index: index of the class among the model's outputs.
        mask: (height, width) of the picture; None without a mask head.
        keypoints: (K, 3), x and y in pixels and a score; None without a keypoint head.
    """

    box: tuple[float, float, float, float]
    name: str
    score: float
    category_index: int
    mask: NDArray[np.bool_] | None = field(default=None, compare=False)
    keypoints: NDArray[np.float32] | None = field(default=None, compare=False)


class Predictor:
    """Runs a trained detector on pictures, with the results of Detectron2's `DefaultPredictor`.

    Attributes:
        model: the detector.
        report: which weights were loaded, to print.
        connections: pairs of keypoints that a line connects.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Build the detector and load MODEL.WEIGHTS.

        Class names come from the checkpoint, or from DATASETS.TEST if it records none.

        Raises:
            ConfigError: the network does not detect objects, does not take INPUT.FORMAT, or was
                trained with other settings.
            WeightsError: the weights do not fill the whole detector.
        """
        check_pixel_format(cfg.INPUT.FORMAT, len(cfg.MODEL.PIXEL_MEAN))
        self._architecture = cfg.MODEL.META_ARCHITECTURE
        if self._architecture in ("ProposalNetwork", "SemanticSegmentor"):
            raise self._no_detections()
        if cfg.MODEL.LOAD_PROPOSALS:
            raise ConfigError(
                "MODEL.LOAD_PROPOSALS is True: this detector classifies regions of a file, which "
                "holds those of a data set. Evaluate it, or use a detector with an RPN."
            )
        check_same_function(cfg)
        if cfg.TEST.AUG.ENABLED:
            logger.warning("TEST.AUG.ENABLED applies to evaluations only, not to predictions")
        self.model = build_detector(cfg).eval()
        self.report = load_weights(self.model, cfg, whole_detector=True)
        self.connections = keypoint_connections(cfg)
        self._names = _class_names(cfg)
        self._resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        self._format = cfg.INPUT.FORMAT
        self._is_fast = complete(cfg).DATALOADER.DECODER == "fast"

    def __call__(self, picture: Image.Image) -> list[Detection]:
        """Return the objects in a picture, best first.

        Args:
            picture: 8 bits per channel. Its EXIF orientation is ignored; use
                `resnext_det.images.read_picture` to read files as in an evaluation.

        Raises:
            DatasetError: the picture cannot be converted or resized.
        """
        return self.detect([self.record(picture)])[0]

    def record(self, picture: Image.Image) -> Record:
        """Return a Detectron2 record: the resized "image" as (C, H, W), and the original size.

        Raises:
            DatasetError: the picture cannot be converted or resized.
        """
        width, height = picture.size
        try:
            pixels = as_array(picture, self._format)
            resizing = self._resize.get_transform(pixels)
            if self._is_fast:
                resizing = FastResizeTransform.replacing(resizing)
            image = channels_first(resizing.apply_image(pixels))
        except (ValueError, RuntimeError) as error:  # for example a strip that would vanish
            raise DatasetError(
                f"a picture of {width} x {height} pixels cannot be converted to "
                f"{self._format} and resized: {quoted(error)}"
            ) from error
        return {"image": image, "height": height, "width": width}

    @torch.no_grad()
    def detect(self, records: Sequence[Record]) -> list[list[Detection]]:
        """Return the objects in each picture of a batch of `record`s, best first."""
        outputs = self.model(list(records))
        if not all("instances" in output for output in outputs):
            raise self._no_detections()
        return [self._detections(output["instances"].to("cpu")) for output in outputs]

    def _detections(self, found: Instances) -> list[Detection]:
        nothing: list[Any] = [None] * len(found)
        return [
            Detection((x0, y0, x1 - x0, y1 - y0), self._name(label), score, label, mask, keypoints)
            for (x0, y0, x1, y1), label, score, mask, keypoints in zip(
                found.pred_boxes.tensor.tolist(),
                found.pred_classes.tolist(),
                found.scores.tolist(),
                found.pred_masks.numpy() if found.has("pred_masks") else nothing,
                found.pred_keypoints.numpy() if found.has("pred_keypoints") else nothing,
            )
        ]

    def _name(self, label: int) -> str:
        return self._names[label] if label < len(self._names) else f"class {label}"

    def _no_detections(self) -> ConfigError:
        return ConfigError(
            f"MODEL.META_ARCHITECTURE {self._architecture} does not detect objects with a box and "
            "a class: use the config and weights of a detector, such as GeneralizedRCNN."
        )


def with_threshold(cfg: CfgNode, score: float) -> CfgNode:
    """Return a copy of a config with SCORE_THRESH_TEST of at most `score`."""
    changed: CfgNode = cfg.clone()
    changed.defrost()
    for part in (changed.MODEL.ROI_HEADS, changed.MODEL.RETINANET):
        part.SCORE_THRESH_TEST = min(part.SCORE_THRESH_TEST, score)
    changed.freeze()
    return changed


def keypoint_connections(cfg: CfgNode) -> list[tuple[int, int]]:
    """Return the pairs of keypoints that a line connects, from the metadata of DATASETS.TEST."""
    if not cfg.MODEL.KEYPOINT_ON or not cfg.DATASETS.TEST:
        return []
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    names = list(metadata.get("keypoint_names", []))
    return [
        (names.index(one), names.index(other))
        for one, other, _ in metadata.get("keypoint_connection_rules", [])
        if one in names and other in names
    ]


def _class_names(cfg: CfgNode) -> list[str]:
    run = read_run(weights_file(cfg))
    if run is not None and run.class_names:
        return list(run.class_names)
    tested = cfg.DATASETS.TEST
    return list(MetadataCatalog.get(tested[0]).get("thing_classes", [])) if tested else []
