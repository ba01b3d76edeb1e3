from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo as stock_zoo
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torchvision.models.resnet import Bottleneck, ResNet

import resnext_det.weights.catalog as catalog
from resnext_det.errors import WeightsError
from resnext_det.weights.catalog import Entry
from resnext_det.weights.converting import read_backbone, write_detectron2
from resnext_det.weights.loading import Needs, check_named_weights
from resnext_det.weights.pixels import IMAGENET, Pixels


def stock_config(weights: str, template: tuple[int, int] = (32, 4), depth: int = 50) -> CfgNode:
    """A config of a program that only imports the package, right for torchvision's weights."""
    cfg = stock_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", weights
    cfg.MODEL.BACKBONE.NAME = "build_resnext_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = template
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.PIXEL_STD = [57.375, 57.120, 58.395]
    return cfg


def test_a_stock_program_with_the_right_config_is_built() -> None:
    build_model(stock_config("resnext://resnext50_32x4d.tv_in1k"))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], r"MODEL.PIXEL_STD \[57.375"),  # Detectron2's default
        ("MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], r"MODEL.PIXEL_MEAN \[103.53"),
        ("INPUT.FORMAT", "RGB", "INPUT.FORMAT BGR"),
        ("MODEL.RESNETS.NUM_GROUPS", 64, "MODEL.RESNETS.NUM_GROUPS 32"),
        ("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.WIDTH_PER_GROUP 4"),
        ("MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.DEPTH 50"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True, "MODEL.RESNETS.STRIDE_IN_1X1 False"),
    ],
)
def test_a_stock_program_is_refused_before_it_fetches(key: str, value: object, said: str) -> None:
    """The model is not even built, so nothing is fetched: no server is there to answer."""
    cfg = stock_config("resnext://resnext50_32x4d.tv_in1k")
    cfg.merge_from_list([key, value])
    with pytest.raises(WeightsError, match=f"resnext://resnext50_32x4d.tv_in1k.*{said}"):
        build_model(cfg)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "GN"])
def test_fused_norms_are_for_frozen_ones_alone(norm: str) -> None:
    name = next(name for name, entry in catalog.ENTRIES.items() if entry.batch_norm == "fused")
    entry = catalog.ENTRIES[name]
    template = entry.template.cardinality, entry.template.width
    cfg = stock_config(f"resnext://{name}", template, entry.depth)
    cfg.MODEL.RESNETS.NORM = norm
    with pytest.raises(WeightsError, match=r"MODEL\.RESNETS\.NORM FrozenBN"):
        check_named_weights(cfg)
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    check_named_weights(cfg)


@pytest.mark.parametrize(
    "weights", ["", "model.pkl", "resnext://not_in_the_catalog", "catalog://x"]
)
def test_other_weights_are_not_this_checks_affair(weights: str) -> None:
    check_named_weights(stock_config(weights, (64, 4)))


@pytest.mark.parametrize(
    "pixels", [IMAGENET, Pixels("RGB", 1, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))], ids=["usual", "own"]
)
def test_an_entry_foretells_what_its_file_will_ask_for(pixels: Pixels, tmp_path: Path) -> None:
    file = tmp_path / "source.pth"
    torch.save(ResNet(Bottleneck, [2, 2, 2, 2], groups=2, width_per_group=4).state_dict(), file)
    entry = Entry(
        "resnext26_2x4d.test", "https://x/y.pth", None, "MIT", True, "torchvision", pixels
    )
    expected, found = Needs.of_entry(entry), Needs.of_weights(read_backbone(file, pixels))
    assert (expected.depth, expected.template) == (found.depth, found.template)
    assert (expected.pixels, expected.fused) == (found.pixels, found.fused)
    assert expected.stride_in_1x1 == found.stride_in_1x1


def test_a_converted_file_keeps_what_is_published_of_its_source(tmp_path: Path) -> None:
    source = tmp_path / "source.pth"
    network = ResNet(Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=4)
    torch.save(network.state_dict(), source)
    entry = catalog.entry("resnext50_32x4d.tv_in1k")
    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    write_detectron2(read_backbone(source), first, published=entry)
    write_detectron2(read_backbone(first), second)
    record = read_backbone(second).record
    assert record is not None and record == read_backbone(first).record
    assert (record.source, record.name) == ("source.pth", "resnext50_32x4d.tv_in1k")
    assert (record.licence, record.top1, record.top5) == ("BSD-3-Clause", 77.618, 93.698)
    assert (record.depth, record.template) == (50, "32x4d")
