from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det.engine.pretraining import PretrainingPlan, cut_crops, pretrain
from resnext_det.errors import ConfigError, DatasetError

TINY = PretrainingPlan(updates=3, batch=8, crop=32, stem_channels=64, res2_channels=256)


def test_the_checkpoint_is_torchvisions(datasets: Path, tmp_path: Path) -> None:
    """torchvision's own network, of torchvision's own widths, loads it with nothing left over."""
    file = tmp_path / "toy.pth"
    pretrain(datasets / "toy_coco", file, TINY)
    network = ResNet(Bottleneck, [2, 2, 2, 2], num_classes=7, groups=8, width_per_group=4)
    state = torch.load(file, weights_only=True)
    assert network.load_state_dict(state) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["toy.pth"]


def test_the_same_seed_gives_the_same_weights(datasets: Path, tmp_path: Path) -> None:
    states = []
    for name in ("a.pth", "b.pth"):
        pretrain(datasets / "toy_coco", tmp_path / name, TINY)
        states.append(torch.load(tmp_path / name, weights_only=True))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_crops_hold_every_object_and_backgrounds(datasets: Path) -> None:
    import json

    root = datasets / "toy_coco"
    crops, labels = cut_crops(root, "train2017", 32, 0)
    document = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    objects = [entry for entry in document["annotations"] if not entry["iscrowd"]]
    assert (labels > 0).sum() == len(objects)
    assert 0 < (labels == 0).sum() <= len(document["images"])
    assert crops.shape == (len(labels), 32, 32, 3)


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="instances_train2017"):
        pretrain(tmp_path, tmp_path / "toy.pth", TINY)


@pytest.mark.parametrize(("name", "value"), [("updates", 0), ("updates", -3), ("seed", -1)])
def test_numbers_that_cannot_be_meant_are_refused(name: str, value: int, tmp_path: Path) -> None:
    plan = replace(TINY, **{name: value})
    with pytest.raises(ConfigError, match=f"--{name} is {value}: give a whole number"):
        pretrain(tmp_path, tmp_path / "toy.pth", plan)
