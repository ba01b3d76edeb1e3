"""A tiny detector with random weights, and videos whose frames show their index."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from numpy.typing import NDArray

from resnext_det import load_config
from resnext_det.engine.checkpoints import Checkpointer
from resnext_det.engine.predictor import Predictor

CLASSES = ("circle", "square", "triangle", "star", "cross", "crescent")


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    """The config of an untrained toy detector with saved weights."""
    folder = tmp_path_factory.mktemp("detector")
    words = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5"]
    words += ["INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"]
    words += ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", words)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.roi_heads.box_predictor.cls_score.weight.data *= 200  # or all have the same class
    Checkpointer(model, folder, config=cfg, class_names=CLASSES).save("model_final", iteration=0)
    return cfg


@pytest.fixture(scope="session")
def predictor(detector: CfgNode) -> Predictor:
    return Predictor(detector)


def frame_colour(index: int) -> NDArray[np.uint8]:
    """Return the colour of the left half of a frame; the right half is black."""
    return np.array([40 + 20 * (index % 10), 120, 250 - 20 * (index % 10)], np.uint8)


def write_frames(
    target: Path,
    times: Sequence[float],
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
) -> Path:
    """Write a video with PyAV alone; a white mark is in the upper left of each frame."""
    width, height = size
    options = {"movflags": "faststart"} if target.suffix == ".mp4" else {}
    with av.open(str(target), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, seconds in enumerate(times):
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[:, : width // 2] = frame_colour(index)
            pixels[: height // 4, : width // 4] = 255
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target
