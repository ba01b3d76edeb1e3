"""Run exported detectors with NumPy, Pillow and onnxruntime or OpenVINO; without Detectron2.

from resnext_det.runtime import load
found = load("detector.onnx")("photo.jpg")
found.boxes, found.scores, found.names
"""

from __future__ import annotations

from resnext_det.runtime.description import Description
from resnext_det.runtime.detector import Detector, load

__all__ = ["Description", "Detector", "load"]
