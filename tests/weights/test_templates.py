"""Every template of every source: the same features as the source, and ResNeXt's names and shapes.

Features at 26 layers, where all but the widest are cheap; names and shapes at the true depth, of
all that is in the catalog, without numbers (on the device meta).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det.modeling.template import BLOCKS_PER_STAGE, Template
from resnext_det.weights.catalog import ENTRIES
from resnext_det.weights.checks import describe
from resnext_det.weights.layouts import is_backbone, recognise
from resnext_det.weights.other_networks import reason
from resnext_det.weights.pixels import CAFFE2, IMAGENET, OURS, Pixels
from tests.helpers.written_sources import (
    WRITERS,
    assert_same,
    cadene,
    caffe2,
    caffe2_blobs,
    mmpretrain,
    network,
    resnext,
    save,
    unlike_fresh,
)

# What each source publishes: facebookresearch/ResNeXt, Detectron, Detectron2, torchvision, timm,
# mmpretrain's and Cadene's lists.
NARROW = {
    "torchvision": ["1x64d", "32x4d", "32x8d", "64x4d"],
    "timm": ["32x4d", "32x8d", "64x4d"],
    "mmpretrain": ["32x4d", "32x8d"],
    "cadene": ["32x4d", "64x4d"],
    "caffe2": ["32x8d"],
    "caffe2, fused": ["64x4d", "32x8d"],
}
WIDE = ["32x16d", "32x32d", "32x48d"]


@functools.cache
def built(source: str, template: str) -> Any:
    """Return torchvision's network, or timm's own."""
    groups, width = Template(template).cardinality, Template(template).width
    if source != "timm":
        return network((2, 2, 2, 2), groups, width)
    torch.manual_seed(7)
    words = {"cardinality": groups, "base_width": width, "num_classes": 10}
    return unlike_fresh(TimmResNet(TimmBottleneck, [2, 2, 2, 2], **words))


@pytest.mark.parametrize(
    ("source", "template"), [(source, each) for source in NARROW for each in NARROW[source]]
)
def test_features_are_those_of_the_source(source: str, template: str, tmp_path: Path) -> None:
    model = built("timm" if source == "timm" else "torchvision", template)
    pixels: Pixels = IMAGENET
    if source.startswith("caffe2"):
        fused = source == "caffe2, fused"
        pixels = CAFFE2 if fused else OURS
        name, layout, content = "a.pkl", "Caffe2", caffe2(model, fused)
    else:
        name, layout, write = WRITERS[{"timm": "safetensors"}.get(source, source)]
        content = write(model)
    assert_same(save(tmp_path / name, content), model, pixels, layout)


@pytest.mark.slow
@pytest.mark.parametrize("template", WIDE)
def test_features_of_wide_templates(template: str, tmp_path: Path) -> None:
    """At 26 layers these have 54, 131 and 233 million parameters."""
    groups, width = Template(template).cardinality, Template(template).width
    source = network((2, 2, 2, 2), groups, width)
    assert_same(save(tmp_path / "a.pth", source.state_dict()), source, IMAGENET, "torchvision")


# --- the catalog, at its true depth ---


@functools.cache
def truth(depth: int, template: str) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in resnext(depth, template).state_dict().items()}


def published(layout: str, depth: int, template: str, fused: bool) -> dict[str, Tensor]:
    """Return what the source's own network has, where there is one to build, without numbers."""
    groups, width = Template(template).cardinality, Template(template).width
    name = f"resnet{depth}" if template == "1x64d" else f"resnext{depth}_{template}"
    with torch.device("meta"):
        if layout == "torchvision" and name in timm.list_models():
            return timm.create_model(name, pretrained=False).state_dict()
        blocks = list(BLOCKS_PER_STAGE[depth])
        source = ResNet(Bottleneck, blocks, groups=groups, width_per_group=width)
    writers: dict[str, Callable[[ResNet], dict[str, Tensor]]] = {
        "torchvision": lambda net: net.state_dict(),
        "mmpretrain": lambda net: mmpretrain(net.state_dict())["state_dict"],
        "Cadene": cadene,
        "Caffe2": lambda net: caffe2_blobs(net, fused),
    }
    return writers[layout](source)


PUBLISHED = sorted(
    {(e.layout, e.depth, str(e.template), e.batch_norm == "fused") for e in ENTRIES.values()}
)


@pytest.mark.parametrize(("layout", "depth", "template", "fused"), PUBLISHED)
def test_names_and_shapes_of_all_in_the_catalog(
    layout: str, depth: int, template: str, fused: bool
) -> None:
    raw = published(layout, depth, template, fused)
    assert reason(raw) is None
    assert is_backbone(raw)
    found = recognise(raw)
    kept = {
        name: tensor.shape
        for name, tensor in found.tensors.items()
        if not name.startswith("linear.") and not name.endswith("num_batches_tracked")
    }
    assert kept == truth(depth, template)
    assert describe(found.tensors) == (depth, Template(template))
    assert found.fused == fused
