"""Parameters, multiply-adds and activations of a built network, and the paper's figures."""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.modeling.backbone.resnet import ResNet
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from resnext_det.errors import ConfigError
from resnext_det.modeling import cifar
from resnext_det.modeling.resnext import ResNeXt
from resnext_det.modeling.template import Template, check_size

Counts = Counter[tuple[str, str]]
"""Numbers by name of a module, below `_Root`, and unit."""

_OPENED = ("", "backbone", "backbone.bottom_up", "proposal_generator", "roi_heads")
"""Modules of a network whose children are its parts."""


@dataclass(frozen=True)
class Part:
    """The cost of a part of a network for one image.

    Attributes:
        name: such as "res2" or "box head".
        parameters: learnable numbers, including frozen ones; a FrozenBN has only buffers.
        multiply_adds: each counted once, as in the paper (section 3.1); of convolutions and matrix
            products, without norms, pooling, additions and resizing.
        activations: numbers that these operations put out (Radosavovic et al., "Designing Network
            Design Spaces").
    """

    name: str
    parameters: int
    multiply_adds: int
    activations: int


@dataclass(frozen=True)
class Complexity:
    """The cost of a network, part by part.

    Attributes:
        parts: in the order of computation.
        height: of the image, in pixels, with padding.
        width: of the image, in pixels, with padding.
        regions: for how many regions the heads of a detector were counted.
    """

    parts: tuple[Part, ...]
    height: int
    width: int
    regions: int = 0

    @property
    def total(self) -> Part:
        """The sum of the parts."""
        return Part(
            "total",
            sum(part.parameters for part in self.parts),
            sum(part.multiply_adds for part in self.parts),
            sum(part.activations for part in self.parts),
        )


def network_complexity(
    depth: int,
    template: Template | str,
    height: int = 224,
    width: int = 224,
    num_classes: int = 1000,
    **others: Any,
) -> Complexity:
    """Count the stages of a built classifier (Table 1 of the paper).

    `Template.network` computes parameters and multiply-adds without building anything.

    Args:
        depth: in layers; 29 is the network for CIFAR.
        template: cardinality and width.
        height: of the image, in pixels.
        width: of the image, in pixels.
        num_classes: of the classifier.
        others: arguments of `ResNeXt` or `CifarResNeXt`, such as pre_activation.

    Raises:
        ConfigError: an unknown depth or template, or an impossible image size.
    """
    if depth != cifar.DEPTH:
        check_size(height, width)
    with torch.device("meta"):
        network: ResNet
        if depth == cifar.DEPTH:
            network = cifar.CifarResNeXt(template, num_classes, **others)
        else:
            network = ResNeXt(depth, template, norm="BN", num_classes=num_classes, **others)
        network.eval()
        image = torch.zeros(1, 3, height, width)
    counts = _count(network, lambda: network(image))
    return Complexity(_parts(network, counts), height, width)


def detector_complexity(
    detector: nn.Module, height: int, width: int, regions: int = 0, detections: int = 0
) -> Complexity:
    """Count the parts of a detector, independently of its weights and of what an image shows.

    Args:
        detector: a GeneralizedRCNN, ProposalNetwork, RetinaNet or FCOS; it is not changed.
        height: of the resized image, in pixels.
        width: of the resized image, in pixels.
        regions: how many regions the heads classify.
        detections: how many detections get a mask or keypoints.

    Raises:
        ConfigError: an impossible image size, or a detector of another kind.
    """
    check_size(height, width)
    if not hasattr(detector, "backbone") or not (
        hasattr(detector, "proposal_generator") or hasattr(detector, "head_in_features")
    ):
        raise ConfigError(
            f"a {type(detector).__name__} cannot be counted; GeneralizedRCNN, ProposalNetwork, "
            "RetinaNet and FCOS can."
        )
    counts: Counts = Counter()
    if hasattr(detector, "roi_heads"):
        counts += _count_heads(copy.deepcopy(detector).cpu().eval(), regions, detections)
    # The meta device computes only shapes, so an image costs neither time nor memory.
    once: Any = copy.deepcopy(detector).to("meta").eval()
    divisor = max(once.backbone.size_divisibility, 1)
    height, width = (math.ceil(side / divisor) * divisor for side in (height, width))
    image = torch.zeros(1, len(once.pixel_mean), height, width, device="meta")

    def forward() -> None:
        features = once.backbone(image)
        if hasattr(once, "head_in_features"):
            once.head([features[name] for name in once.head_in_features])
        elif hasattr(once.proposal_generator, "rpn_head"):
            generator = once.proposal_generator
            generator.rpn_head([features[name] for name in generator.in_features])
        if hasattr(once, "sem_seg_head"):
            once.sem_seg_head(features)

    counts += _count(once, forward)
    return Complexity(_parts(once, counts), height, width, regions)


def _count_heads(detector: Any, regions: int, detections: int) -> Counts:
    """Count the heads on one region and one detection; the size of the map does not matter."""
    for module in detector.roi_heads.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = 2.0  # nothing is detected but what `finish` provides
    features = {
        name: torch.zeros(1, shape.channels, 64 // shape.stride, 64 // shape.stride)
        for name, shape in detector.backbone.output_shape().items()
    }
    box = Boxes(torch.tensor([[0.0, 0.0, 32.0, 32.0]]))

    def classify() -> None:
        region = Instances((64, 64), proposal_boxes=box, objectness_logits=torch.zeros(1))
        detector.roi_heads(None, features, [region])

    def finish() -> None:
        found = Instances((64, 64), pred_boxes=box, pred_classes=torch.zeros(1, dtype=torch.long))
        detector.roi_heads.forward_with_given_boxes(features, [found])

    return _count(detector, classify, regions) + _count(detector, finish, detections)


def _count(network: nn.Module, run: Callable[[], Any], times: int = 1) -> Counts:
    """Count the operations of one run by module, `times` over."""
    flops = FlopCounterMode(display=False)
    outputs = FlopCounterMode(
        display=False, custom_mapping=dict.fromkeys(flop_registry, _output_size)
    )
    with torch.no_grad(), flops, outputs:
        _Root(network)(run)
    counts: Counts = Counter()
    for unit, counter, divisor in (("multiply_adds", flops, 2), ("activations", outputs, 1)):
        for name, found in counter.get_flop_counts().items():
            counts[name, unit] = times * sum(found.values()) // divisor
    return counts


class _Root(nn.Module):
    """The module that `FlopCounterMode` names all others by, whichever of them run."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, run: Callable[[], Any]) -> None:
        run()


def _output_size(*_: Any, out_shape: torch.Size, **__: Any) -> int:
    return math.prod(out_shape)


def _parts(network: nn.Module, counts: Counts) -> tuple[Part, ...]:
    """Return the parts that cost anything; "other" has the rest."""
    names = [
        name
        for name, _ in network.named_modules()
        if name not in _OPENED and name.rpartition(".")[0] in _OPENED
    ]
    parts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    other = Counter({unit: counts["_Root", unit] for unit in ("multiply_adds", "activations")})
    other["parameters"] = sum(each.numel() for each in network.parameters())
    # A pyramid registers its own layers before the network below it.
    for name in sorted(names, key=lambda name: "bottom_up" not in name):
        module = network.get_submodule(name)
        cost = _below(module, f"_Root.network.{name}", counts)
        cost["parameters"] = sum(each.numel() for each in module.parameters())
        parts[_label(name)] += cost
        other -= cost
    parts["other"] = other
    return tuple(
        Part(label, cost["parameters"], cost["multiply_adds"], cost["activations"])
        for label, cost in parts.items()
        if any(cost.values())
    )


def _below(module: nn.Module, name: str, counts: Counts) -> Counter[str]:
    """Return the counts of a module or, if only its children were called, of these."""
    if counts[name, "activations"]:
        return Counter({unit: counts[name, unit] for unit in ("multiply_adds", "activations")})
    children = (_below(child, f"{name}.{n}", counts) for n, child in module.named_children())
    return sum(children, Counter())


def _label(name: str) -> str:
    if name == "roi_heads.res5":
        return "res5 of the head"
    label = name.rpartition(".")[2]
    if name.startswith("backbone.") and label.startswith(("fpn_", "top_block")):
        return "FPN"
    return label.replace("_", " ").replace("rpn", "RPN")


class Published(NamedTuple):
    """The printed cost of a block or a network in the paper (arXiv 1611.05431v2).

    Attributes:
        table: the table's number.
        depth: of the network, or None for a block of res2.
        template: such as "32x4d".
        parameters: as printed, or None.
        multiply_adds: as printed ("FLOPs"), for 224 x 224 pixels.
    """

    table: int
    depth: int | None
    template: str
    parameters: float | None
    multiply_adds: float


_TABLE_2 = ("1x64d", "2x40d", "4x24d", "8x14d", "32x4d")

PUBLISHED = (
    Published(1, 50, "1x64d", 25.5e6, 4.1e9),
    Published(1, 50, "32x4d", 25.0e6, 4.2e9),
    *(Published(2, None, template, 70e3, 0.22e9) for template in _TABLE_2),
    *(Published(3, 50, template, None, 4.1e9) for template in _TABLE_2),
    *(Published(3, 101, template, None, 7.8e9) for template in _TABLE_2),
    Published(4, 200, "1x64d", None, 15e9),
    Published(4, 101, "1x100d", None, 15e9),
    Published(4, 101, "2x64d", None, 15e9),
    Published(4, 101, "64x4d", None, 15e9),
)
"""Tables 1 to 4 as printed, without the paper's "~"."""

DIFFERENCES = """\
Table 1 truncates 25.56 million parameters of 1x64d to 25.5 million.
Table 3 has one rough figure for all five templates, whose blocks in res2 cost the same (Table 2)
but not their networks: where a stage begins, the 1x1 before the strided 3x3 works on the larger
map, and is wider the higher the cardinality. 8x14d costs most: 13.7 would preserve the complexity.
Table 4 has the pre-activation ResNet-200; counted here is one with the activations after the norms.
"""
"""Why counts differ from the paper by more than the last printed digit."""
