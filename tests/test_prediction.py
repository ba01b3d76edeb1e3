"""The result of a prediction, and what it is converted to."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from pycocotools.coco import COCO

import resnext_det
from resnext_det.errors import ConfigError
from resnext_det.prediction import Prediction


def prediction(category_ids: Sequence[int] = (3, 9), **changed: Any) -> Prediction:
    """Two objects in an image of 40 x 30 pixels."""
    masks = np.zeros((2, 30, 40), bool)
    masks[0, 10:20, 5:25] = True
    found = Prediction(
        boxes=np.array([[5, 10, 25, 20], [0.5, 1, 4, 8]], np.float32),
        scores=np.array([0.75, 0.25], np.float32),
        labels=np.array([1, 0]),
        class_names=("cat", "dog"),
        width=40,
        height=30,
        masks=masks,
        keypoints=np.arange(12, dtype=np.float32).reshape(2, 2, 3),
        category_ids=category_ids,
    )
    return dataclasses.replace(found, **changed)


def test_objects_can_be_selected_and_counted() -> None:
    found = prediction()
    assert (len(found), found.names, str(found)) == (
        2,
        ["dog", "cat"],
        "40 x 30 pixels: 1 dog, 1 cat",
    )
    best = found.above(0.75)
    assert (best.names, best.boxes.tolist()) == (["dog"], [[5, 10, 25, 20]])
    assert best.masks is not None and best.masks.sum(axis=(1, 2)).tolist() == [200]
    assert best.keypoints is not None and best.keypoints.shape == (1, 2, 3)
    assert str(found.above(0.9)) == "40 x 30 pixels: nothing found"


def test_coco_results_are_accepted_by_pycocotools(tmp_path: Path) -> None:
    truth = COCO()
    truth.dataset = {"images": [{"id": 7}], "annotations": []}
    truth.dataset["categories"] = [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}]
    truth.createIndex()
    rows = prediction().to_coco(7)
    (tmp_path / "results.json").write_text(json.dumps(rows))
    loaded = truth.loadRes(str(tmp_path / "results.json"))
    one, other = loaded.anns[1], loaded.anns[2]
    assert (one["bbox"], one["score"], one["category_id"]) == ([5, 10, 20, 10], 0.75, 9)
    assert (other["bbox"], other["category_id"]) == ([0.5, 1, 3.5, 7], 3)
    assert (mask_util.decode(one["segmentation"]) == prediction().masks[0]).all()  # type: ignore[index]
    assert one["keypoints"] == [0, 1, 2, 3, 4, 5]
    assert [row["category_id"] for row in prediction(()).to_coco(7, {"cat": 1, "dog": 2})] == [2, 1]


def test_unknown_category_ids_are_refused() -> None:
    for given in (None, [4], {"cat": 1}):
        with pytest.raises(ConfigError, match="category ids of the classes are unknown"):
            prediction(()).to_coco(7, given)


def test_drawing_leaves_the_image_alone_and_skips_low_scores(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 30), "gray")
    drawn = np.asarray(prediction(source=picture, keypoints=None).draw())
    assert (drawn[10:21, 5] != 128).any() and (drawn[:8, :4] == 128).all()
    assert (np.asarray(picture) == 128).all()
    picture.save(tmp_path / "a.png")
    assert (np.asarray(prediction(source=tmp_path / "a.png", keypoints=None).draw()) == drawn).all()
    assert (np.asarray(prediction().draw(0.1, picture))[:8, :4] != 128).any()
    with pytest.raises(ConfigError, match=r"no image to draw on: pass image="):
        prediction().draw()


def test_supervision_gets_boxes_masks_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ConfigError, match="pip install supervision"):
        prediction().to_supervision()
    monkeypatch.undo()
    supervision = pytest.importorskip("supervision")
    found = prediction()
    converted = found.to_supervision()
    assert isinstance(converted, supervision.Detections)
    assert (converted.xyxy == found.boxes).all() and (converted.mask == found.masks).all()
    assert converted.class_id.tolist() == [1, 0] and converted["class_name"].tolist() == [
        "dog",
        "cat",
    ]
    kept = converted[converted.confidence > 0.5]
    assert kept.area.tolist() == [200]
    assert len(prediction().above(1).to_supervision()) == 0


def test_the_module_imports_numpy_and_pillow_alone() -> None:
    """In a package without its __init__, as the runtime has it."""
    code = f"""
import sys, types
package = types.ModuleType("resnext_det")
package.__path__ = [{str(Path(resnext_det.__file__).parent)!r}]
sys.modules |= {{"resnext_det": package, "torch": None, "detectron2": None, "tqdm": None}}
import resnext_det.prediction
"""
    subprocess.run([sys.executable, "-c", code], check=True)
