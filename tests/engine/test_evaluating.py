from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from resnext_det import load_config
from resnext_det.engine.checkpoints import Checkpointer
from resnext_det.engine.evaluating import check_classes
from resnext_det.errors import DatasetError

NAME = "evaluating_test"


@pytest.fixture
def tested() -> Iterator[None]:
    """A data set whose annotations have the classes cat, dog and owl."""
    MetadataCatalog.get(NAME).thing_classes = ["cat", "dog", "owl"]
    yield
    MetadataCatalog.remove(NAME)


def config(folder: Path, *learned: str) -> CfgNode:
    """A config with the weights of a training that learned some classes."""
    Checkpointer(nn.Linear(2, 2), folder, class_names=learned).save("model_final", iteration=1)
    words = ["MODEL.WEIGHTS", str(folder / "model_final.pth"), "DATASETS.TEST", f"('{NAME}',)"]
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
    with pytest.raises(DatasetError, match=r"'dog' is 'cat', 'cat' is 'dog'.*in another order"):
        check_classes(config(tmp_path, "dog", "cat", "owl"))


def test_other_names_are_warned_of(
    tested: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_classes(config(tmp_path, "cat", "hound", "owl"))
    assert "'hound' is 'dog'" in caplog.text


def test_weights_of_other_programs_tell_no_classes(tested: None, tmp_path: Path) -> None:
    cfg = config(tmp_path, "dog", "cat", "owl").clone()
    file = tmp_path / "stock.pth"
    torch.save({"model": {}}, file, _use_new_zipfile_serialization=False)
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(file)
    check_classes(cfg)
