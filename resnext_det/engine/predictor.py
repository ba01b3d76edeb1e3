"""Pictures -> boxes, classes and scores, with masks and keypoints if the detector has them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from PIL import Image

from resnext_det.backbones import build_detector
from resnext_det.checkpoint_file import read_run
from resnext_det.engine.recorded_config import check_same_function
from resnext_det.errors import ConfigError, DatasetError, quoted
from resnext_det.images import as_array, check_pixel_format
from resnext_det.weights.loading import load_weights

logger = logging.getLogger(__name__)

Record = dict[str, Any]

_WITHOUT_CLASSES = {
    "ProposalNetwork": "proposals without classes",
    "SemanticSegmentor": "a class for each pixel, and no boxes",
}
_THRESHOLDS = ("ROI_HEADS", "RETINANET")


@dataclass(frozen=True)
class Detection:
    """One found object.

    Attributes:
        box: x, y, width, height in pixels of the picture.
        name: of the class.
        score: 0 to 1.
        category_index: of the class among the model's outputs, from 0.
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
    """Runs a trained detector on single pictures.

    Attributes:
        model: the detector.
        report: what was loaded, in words.
        connections: pairs of keypoints that a line connects.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Build the detector and load MODEL.WEIGHTS.

        Args:
            cfg: the config it was trained with; class names come from the checkpoint, or from
                DATASETS.TEST where it holds none.

        Raises:
            ConfigError: the network is none that gives boxes and classes, or INPUT.FORMAT is one
                that it does not take, or the detector was trained with other settings.
            WeightsError: the weights do not fill the whole detector.
        """
        check_pixel_format(cfg.INPUT.FORMAT, len(cfg.MODEL.PIXEL_MEAN))
        architecture = cfg.MODEL.META_ARCHITECTURE
        if architecture in _WITHOUT_CLASSES:
            raise _no_boxes(architecture, _WITHOUT_CLASSES[architecture])
        self._architecture = architecture
        if cfg.MODEL.WEIGHTS:
            check_same_function(cfg)
        if cfg.TEST.AUG.ENABLED:
            logger.warning("TEST.AUG.ENABLED is for evaluations: pictures are not augmented here.")
        self.model = build_detector(cfg).eval()
        self.report = load_weights(self.model, cfg, whole_detector=True)
        self._names = _class_names(cfg)
        self.connections = keypoint_connections(cfg)
        self._resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        self._format = cfg.INPUT.FORMAT

    def __call__(self, picture: Image.Image) -> list[Detection]:
        """Find the objects of a picture.

        Args:
            picture: of 8 bits a channel, taken as its pixels lie; its EXIF orientation is ignored.
                `resnext_det.images.read_picture` reads any file as an evaluation does.

        Returns:
            The detections, best first.

        Raises:
            DatasetError: the picture has more than 8 bits a channel, or nothing is left of it
                once it is resized.
        """
        return self.detect([self.record(picture)])[0]

    def record(self, picture: Image.Image) -> Record:
        """Resize a picture to the size that the network takes.

        Args:
            picture: as for a call.

        Returns:
            A record of Detectron2: "image" of shape (channels, height, width), and the picture's
            size.

        Raises:
            DatasetError: the picture has more than 8 bits a channel, or nothing is left of it
                once it is resized.
        """
        width, height = picture.size
        try:
            pixels = as_array(picture, self._format)
            resized = self._resize.get_transform(pixels).apply_image(pixels)
        except (ValueError, RuntimeError) as error:  # such as a strip of which nothing is left
            raise DatasetError(
                f"a picture of {width} x {height} pixels cannot be converted to "
                f"{self._format} and resized: {quoted(error)}"
            ) from error
        image = torch.as_tensor(np.array(resized.transpose(2, 0, 1), order="C"))
        return {"image": image, "height": height, "width": width}

    @torch.no_grad()
    def detect(self, records: Sequence[Record]) -> list[list[Detection]]:
        """Run the network on a batch.

        Args:
            records: of `record`, one per picture.

        Returns:
            The detections of each picture, best first.

        Raises:
            ConfigError: the network is none that gives boxes and classes.
        """
        outputs = self.model(list(records))
        for output in outputs:
            if "instances" not in output:
                raise _no_boxes(self._architecture, ", ".join(output) or "nothing")
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


def with_threshold(cfg: CfgNode, score: float) -> CfgNode:
    """Return a config whose detector gives all that has a score, below SCORE_THRESH_TEST too.

    Args:
        cfg: it is not changed.
        score: the lowest, 0 to 1; what is higher than the config's changes nothing.
    """
    changed: CfgNode = cfg.clone()
    changed.defrost()
    for name in _THRESHOLDS:
        part = changed.MODEL[name]
        part.SCORE_THRESH_TEST = min(part.SCORE_THRESH_TEST, score)
    changed.freeze()
    return changed


def keypoint_connections(cfg: CfgNode) -> list[tuple[int, int]]:
    """Return the pairs of keypoints that a line connects, as the metadata of DATASETS.TEST say.

    Args:
        cfg: the config.
    """
    if not cfg.MODEL.KEYPOINT_ON or not cfg.DATASETS.TEST:
        return []
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    names = list(metadata.get("keypoint_names", []))
    rules = metadata.get("keypoint_connection_rules", [])
    return [
        (names.index(one), names.index(other))
        for one, other, _ in rules
        if one in names and other in names
    ]


def _no_boxes(architecture: str, given: str) -> ConfigError:
    return ConfigError(
        f"MODEL.META_ARCHITECTURE {architecture} gives {given}; detections have a box and a class. "
        "Name the config and the weights of a detector, such as GeneralizedRCNN."
    )


def _class_names(cfg: CfgNode) -> list[str]:
    run = read_run(Path(PathManager.get_local_path(cfg.MODEL.WEIGHTS)))
    if run is not None and run.class_names:
        return list(run.class_names)
    tested = cfg.DATASETS.TEST
    return list(MetadataCatalog.get(tested[0]).get("thing_classes", [])) if tested else []
