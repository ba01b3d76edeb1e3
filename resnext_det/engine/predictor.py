"""One image -> boxes, classes and scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from PIL import Image

from resnext_det.engine.checkpoint_run import read_run
from resnext_det.pretrained.loading import load_weights


@dataclass(frozen=True)
class Detection:
    """One found object.

    Attributes:
        box: x, y, width, height in pixels of the picture.
        name: of the class.
        score: 0 to 1.
    """

    box: tuple[float, float, float, float]
    name: str
    score: float


class Predictor:
    """Runs a trained detector on single pictures."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build the detector and load MODEL.WEIGHTS.

        Args:
            cfg: the config it was trained with; class names come from the checkpoint, or from
                DATASETS.TEST where it holds none.

        Raises:
            WeightsError: the weights do not fill the whole detector.
        """
        self.model = build_model(cfg).eval()
        self.report = load_weights(self.model, cfg, whole_detector=True)
        self._names = _class_names(cfg)
        self._resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        self._bgr = cfg.INPUT.FORMAT == "BGR"

    @torch.no_grad()
    def __call__(self, picture: Image.Image) -> list[Detection]:
        """Find the objects of a picture.

        Args:
            picture: of any mode and size.

        Returns:
            The detections, best first.
        """
        pixels: NDArray[np.uint8] = np.asarray(picture.convert("RGB"))
        height, width = pixels.shape[:2]
        ordered = pixels[:, :, ::-1] if self._bgr else pixels
        resized = self._resize.get_transform(ordered).apply_image(ordered)
        image = torch.as_tensor(resized.astype(np.float32).transpose(2, 0, 1))
        record = {"image": image, "height": height, "width": width}
        found = self.model([record])[0]["instances"].to("cpu")
        return [
            Detection((x0, y0, x1 - x0, y1 - y0), self._name(label), score)
            for (x0, y0, x1, y1), label, score in zip(
                found.pred_boxes.tensor.tolist(), found.pred_classes.tolist(), found.scores.tolist()
            )
        ]

    def _name(self, label: int) -> str:
        return self._names[label] if label < len(self._names) else f"class {label}"


def _class_names(cfg: CfgNode) -> list[str]:
    run = read_run(Path(PathManager.get_local_path(cfg.MODEL.WEIGHTS)))
    if run is not None and run.class_names:
        return list(run.class_names)
    tested = cfg.DATASETS.TEST
    return list(MetadataCatalog.get(tested[0]).get("thing_classes", [])) if tested else []
