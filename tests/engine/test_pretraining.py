from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det.engine.pretraining import cut_crops, pretrain
from resnext_det.errors import ConfigError, DatasetError

TINY: dict[str, Any] = {"updates": 2, "crop": 32, "stem_channels": 64, "res2_channels": 256}


def test_writes_a_reproducible_torchvision_checkpoint(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = []
    for name in ("a.pth", "b.pth"):
        pretrain(datasets / "toy_coco", tmp_path / name, **TINY)
        states.append(torch.load(tmp_path / name, weights_only=True))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert "pretraining" not in capsys.readouterr().err  # a line every 30 seconds
    network = ResNet(Bottleneck, [2, 2, 2, 2], num_classes=7, groups=8, width_per_group=4)
    network.load_state_dict(states[0])  # of torchvision's widths


def test_crops_cover_every_object_and_backgrounds(datasets: Path) -> None:
    root = datasets / "toy_coco"
    crops, labels = cut_crops(root, "train2017", 32, 0)
    document = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    objects = [entry for entry in document["annotations"] if not entry["iscrowd"]]
    assert (labels > 0).sum() == len(objects)
    assert 0 < (labels == 0).sum() <= len(document["images"])
    assert crops.shape == (len(labels), 32, 32, 3)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, DatasetError, "instances_train2017"),
        ({"updates": 0}, ConfigError, "--updates is 0"),
        ({"seed": -1}, ConfigError, "--seed is -1"),
    ],
)
def test_refuses_wrong_input(
    given: dict[str, int], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        pretrain(tmp_path, tmp_path / "toy.pth", **given)
