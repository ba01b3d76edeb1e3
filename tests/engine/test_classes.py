from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from torch import nn

from resnext_det import load_config
from resnext_det.data.checks import check_datasets
from resnext_det.engine.checkpoints import Checkpointer
from resnext_det.engine.classes import check_classes
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import DatasetError

NAME = "evaluating_test"


@pytest.fixture
def tested() -> Iterator[None]:
    """A data set whose annotations have the classes cat, dog and owl."""
    DatasetCatalog.register(NAME, list)
    MetadataCatalog.get(NAME).thing_classes = ["cat", "dog", "owl"]
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def config(folder: Path, *learned: str) -> CfgNode:
    """A config with the weights of a training that learned some classes."""
    Checkpointer(nn.Linear(2, 2), folder, class_names=learned).save("model_final", iteration=1)
    words = ["MODEL.WEIGHTS", str(folder / "model_final.pth"), "DATASETS.TEST", f"('{NAME}',)"]
    words += ["DATASETS.TRAIN", "()"]
    return load_config("faster_rcnn_X_26_8x4d_FPN_toy", words)


@pytest.mark.parametrize("learned", [("cat", "dog", "owl"), ()])
def test_the_same_classes_or_unknown_ones(
    learned: tuple[str, ...], tested: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_classes(config(tmp_path, *learned))
    assert not caplog.text


def test_another_order_is_refused(tested: None, tmp_path: Path) -> None:
    """AP would be near 0, and nothing would say why."""
    with pytest.raises(DatasetError, match="in another order: class 0 is 'dog' and 'cat'"):
        check_classes(config(tmp_path, "dog", "cat", "owl"))


def test_other_names_are_refused(tested: None, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="class 1 is 'hound' and 'dog'"):
        check_classes(config(tmp_path, "cat", "hound", "owl"))
    with pytest.raises(DatasetError, match=r"differ: only in data set .*: 'owl'"):
        check_classes(config(tmp_path, "cat", "dog"))


def test_weights_of_other_programs_tell_no_classes(tested: None, tmp_path: Path) -> None:
    cfg = config(tmp_path, "dog", "cat", "owl").clone()
    file = tmp_path / "stock.pth"
    torch.save({"model": {}}, file, _use_new_zipfile_serialization=False)
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(file)
    check_classes(cfg)


@pytest.fixture
def swapped(datasets: Path, tmp_path: Path) -> Iterator[CfgNode]:
    """A config whose test set has the training's classes, two of them with exchanged ids."""
    toy = datasets / "toy_coco"
    document = json.loads((toy / "annotations" / "instances_val2017.json").read_text())
    one, other = document["categories"][:2]
    one["name"], other["name"] = other["name"], one["name"]
    file = tmp_path / "swapped.json"
    file.write_text(json.dumps(document))
    trained = toy / "annotations" / "instances_train2017.json"
    register_coco_instances("classes_train", {}, str(trained), str(toy / "train2017"))
    register_coco_instances("classes_test", {}, str(file), str(toy / "val2017"))
    words = ["DATASETS.TRAIN", "('classes_train',)", "DATASETS.TEST", "('classes_test',)"]
    words += ["OUTPUT_DIR", str(tmp_path / "run"), "MODEL.DEVICE", "cpu"]
    yield load_config("faster_rcnn_X_26_8x4d_FPN_toy", words)
    for name in ("classes_train", "classes_test"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_every_road_to_a_figure_compares_the_classes(swapped: CfgNode) -> None:
    """A program's own data sets: the number of classes is right, and AP would be near 0."""
    said = "in another order: class 0 is 'circle' and 'square'"
    with pytest.raises(DatasetError, match=said):
        check_datasets(swapped, ["classes_train", "classes_test"])
    with pytest.raises(DatasetError, match=said):
        Trainer(swapped)
    with pytest.raises(DatasetError, match=said):
        Trainer.test(swapped, nn.Linear(2, 2))
    swapped = swapped.clone()
    swapped.defrost()
    swapped.DATASETS.TEST = ("classes_train", "classes_test")
    swapped.DATASETS.TRAIN = ()
    with pytest.raises(DatasetError, match=said):
        Trainer.test(swapped, nn.Linear(2, 2))


def test_a_trained_model_has_the_classes_of_its_training(swapped: CfgNode) -> None:
    """And not those of the weights that it began with."""
    model = nn.Linear(2, 2)
    model.class_names = ["square", "circle", "triangle", "star", "cross", "crescent"]  # type: ignore[assignment]
    with pytest.raises(DatasetError, match="data set classes_train"):
        check_classes(
            load_config("faster_rcnn_X_26_8x4d_FPN_toy", ["DATASETS.TEST", "('classes_train',)"]),
            learned=model.class_names,
        )
    check_classes(swapped, learned=model.class_names)
