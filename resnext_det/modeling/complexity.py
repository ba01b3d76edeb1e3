"""Parameters, multiply-adds and activations of a built network, counted by fvcore."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.export.flatten import flatten_to_tuple
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from fvcore.nn import FlopCountAnalysis, jit_handles
from torch import Tensor, nn

from resnext_det.errors import ConfigError
from resnext_det.modeling.resnext import ResNeXt
from resnext_det.modeling.template import Template, check_size

logger = logging.getLogger(__name__)

_OPENED = ("backbone", "backbone.bottom_up", "proposal_generator", "roi_heads")
_UNCOUNTED = ("deform", "matmul", "einsum", "::mm", "::bmm", "addmm", "attention")
"""In names of operators that multiply, and that no detector here is made of."""


@dataclass(frozen=True)
class Part:
    """What a part of a network costs, for one image.

    Attributes:
        name: of the part, such as "res2" or "box head".
        parameters: learnable numbers, frozen ones too; a FrozenBN has none, only buffers.
        multiply_adds: each counted once, as in the paper (section 3.1); of convolutions and linear
            layers, without norms, pooling, additions and resizing.
        activations: numbers that those same layers put out (fvcore's definition, after Radosavovic
            et al., "Designing Network Design Spaces").
    """

    name: str
    parameters: int
    multiply_adds: int
    activations: int


@dataclass(frozen=True)
class Complexity:
    """What a network costs, part by part.

    Attributes:
        parts: in the order of the computation.
        height: of the image that it was counted for, in pixels, with padding.
        width: of the image that it was counted for, in pixels, with padding.
        regions: how many regions the heads of a detector were counted for.
    """

    parts: tuple[Part, ...]
    height: int
    width: int
    regions: int = 0

    @property
    def total(self) -> Part:
        """The parts summed up."""
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
    form: str = "grouped",
) -> Complexity:
    """Build a classifier of ImageNet as in Table 1 of the paper, and count it by stage.

    `Template.network` gives parameters and multiply-adds at once, for any size; this one looks at
    what was built.

    Args:
        depth: 26, 50, 101, 152 or 200 layers.
        template: such as "32x4d".
        height: of the image, in pixels.
        width: of the image, in pixels.
        num_classes: of the classifier.
        form: of the blocks; paths put out more than one grouped convolution does.

    Raises:
        ConfigError: depth, template or form is unknown or too large for the memory, or the size
            none of an image.
    """
    check_size(height, width)
    with torch.device("meta"):
        network = ResNeXt(depth, template, norm="BN", num_classes=num_classes, form=form)
    try:
        counts = _Counts(network.to_empty(device="cpu"))
    except RuntimeError as error:
        needed = sum(parameter.numel() for parameter in network.parameters())
        raise ConfigError(
            f"a network of template {template} and depth {depth} has {needed:,} parameters, more "
            "than there is memory for; Template.network counts it without building it."
        ) from error
    counts.add(lambda images: network(images), torch.zeros(0, 3, height, width))
    return Complexity(counts.parts(), height, width)


def detector_complexity(
    cfg: CfgNode, height: int | None = None, width: int | None = None
) -> Complexity:
    """Build the detector of a config, and count it by part.

    The heads are counted for as many regions as the config lets through to them
    (MODEL.RPN.POST_NMS_TOPK_TEST), and masks and keypoints for as many detections as it keeps
    (TEST.DETECTIONS_PER_IMAGE): the most that can happen, and independent of weights and image.

    Args:
        cfg: a Detectron2 config.
        height: of the resized image, in pixels; without, INPUT.MIN_SIZE_TEST.
        width: of the resized image, in pixels; without, INPUT.MAX_SIZE_TEST.

    Returns:
        The parts of the image as the network sees it, padded to its strides.

    Raises:
        ConfigError: the size is not that of an image, or the detector is of another kind than
            GeneralizedRCNN, ProposalNetwork, RetinaNet and FCOS.
    """
    height = cfg.INPUT.MIN_SIZE_TEST if height is None else height
    width = cfg.INPUT.MAX_SIZE_TEST if width is None else width
    check_size(height, width)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    # No detection gets past it, so none is counted but those that are handed over below.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 2.0
    detector = build_model(cfg).eval()
    if not hasattr(detector, "backbone") or not (
        hasattr(detector, "proposal_generator") or hasattr(detector, "head_in_features")
    ):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, which cannot be counted; "
            "GeneralizedRCNN, ProposalNetwork, RetinaNet and FCOS can."
        )
    divisor = max(detector.backbone.size_divisibility, 1)
    height, width = (-(-side // divisor) * divisor for side in (height, width))
    counts = _Counts(detector)
    images = torch.zeros(0, len(cfg.MODEL.PIXEL_MEAN), height, width)
    counts.add(lambda images: _once_for_the_image(detector, images), images)
    if not hasattr(detector, "roi_heads"):
        return Complexity(counts.parts(), height, width)
    regions = (
        cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
        if cfg.MODEL.LOAD_PROPOSALS
        else cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    )
    _count_heads(counts, detector, regions, cfg.TEST.DETECTIONS_PER_IMAGE)
    return Complexity(counts.parts(), height, width, regions)


class _Counts:
    """Sums of what several passes through the same network cost, by its modules."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._sums: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, way: Callable[..., Any], *inputs: Tensor, times: int = 1) -> None:
        """Take a way through the network, and add what it costs so many times.

        The trace needs only shapes. A batch of no images has all of them except the first
        number, and costs neither time nor memory: it is counted as one image.
        """
        analysis = FlopCountAnalysis(_Traced(self.network, way), inputs)
        # fvcore's own handles count norms too, and nothing in an empty batch. To set them to None
        # one by one would leave them in place.
        analysis.clear_op_handles()
        handle = functools.partial(_cost, not len(inputs[0]))
        analysis.set_op_handle("aten::_convolution", handle, "aten::linear", handle)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        with torch.no_grad():
            found = analysis.by_module_and_operator()
        others = [
            op for op in analysis.unsupported_ops() if any(n in op.lower() for n in _UNCOUNTED)
        ]
        if others:
            logger.warning("%s: not in the multiply-adds", ", ".join(others))
        for name, counted in found.items():
            for unit, number in counted.items():
                self._sums[name][unit] += times * number

    def parts(self) -> tuple[Part, ...]:
        """Return every part that costs anything; what is in none of them is called "other"."""
        parts = []
        left, parameters_left = self._sums[""].copy(), _parameters([self.network])
        modules = dict(self.network.named_modules())
        for label, names in _named_parts(self.network).items():
            sums = sum((self._sums[f"network.{name}"] for name in names), Counter[str]())
            parameters = _parameters(modules[name] for name in names)
            parts.append(Part(label, parameters, sums["multiply_adds"], sums["activations"]))
            left.subtract(sums)
            parameters_left -= parameters
        parts.append(Part("other", parameters_left, left["multiply_adds"], left["activations"]))
        return tuple(p for p in parts if p.parameters or p.multiply_adds or p.activations)


class _Traced(nn.Module):
    """A way through a network as fvcore traces it: tensors in, tensors out."""

    def __init__(self, network: nn.Module, way: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self._way = way
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        # Whatever is not handed back is dropped from the trace as useless.
        found, _ = flatten_to_tuple(self._way(*inputs))
        return tuple(each for each in found if isinstance(each, Tensor))


def _parameters(modules: Iterable[nn.Module]) -> int:
    """Return how many parameters modules have, each counted once."""
    return sum(each.numel() for each in {p for m in modules for p in m.parameters()})


def _cost(empty_is_one: bool, inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Return what a convolution or a linear layer costs, as fvcore wants it of a handle."""
    shapes = (jit_handles.get_shape(value) or [] for value in (*inputs[:2], outputs[0]))
    x, weights, out = shapes
    if empty_is_one:
        x, out = [max(x[0], 1), *x[1:]], [max(out[0], 1), *out[1:]]
    multiply_adds: Any = math.prod(out) * weights[1]
    if len(weights) > 2:
        multiply_adds = jit_handles.conv_flop_count(x, weights, out, inputs[6].toIValue())
    return Counter(multiply_adds=multiply_adds, activations=math.prod(out))


def _named_parts(network: nn.Module) -> dict[str, list[str]]:
    """Return the modules that make up each part, by the part's name, in the computation's order."""
    parts: dict[str, list[str]] = {}

    def visit(module: nn.Module, path: str) -> None:
        # A pyramid holds its own layers before the network below it.
        for child_name, child in sorted(module.named_children(), key=lambda c: c[0] != "bottom_up"):
            name = f"{path}.{child_name}" if path else child_name
            if name in _OPENED:
                visit(child, name)
            else:
                parts.setdefault(_label(path, child_name, module), []).append(name)

    visit(network, "")
    return parts


def _label(path: str, name: str, parent: nn.Module) -> str:
    if path == "backbone" and hasattr(parent, "bottom_up"):
        return "FPN"
    if path == "roi_heads" and name == "res5":
        return "res5 of the heads"
    return name.replace("_", " ").replace("rpn", "RPN")


def _once_for_the_image(detector: Any, images: Tensor) -> list[Any]:
    """Run what runs once for each of the images (N, C, H, W), and return all that it gives."""
    features = detector.backbone(images)
    found = [features]
    if hasattr(detector, "head_in_features"):
        found.append(detector.head([features[name] for name in detector.head_in_features]))
    generator: Any = getattr(detector, "proposal_generator", None)
    if hasattr(generator, "rpn_head"):
        found.append(generator.rpn_head([features[name] for name in generator.in_features]))
    if hasattr(detector, "sem_seg_head"):
        found.append(detector.sem_seg_head(features))
    return found


def _count_heads(counts: _Counts, detector: Any, regions: int, detections: int) -> None:
    """Count the heads on one region and one detection: each costs the same, on any map."""
    shapes: dict[str, ShapeSpec] = detector.backbone.output_shape()
    sides = [max(64 // (shape.stride or 64), 1) for shape in shapes.values()]
    maps = [torch.zeros(1, s.channels or 1, side, side) for s, side in zip(shapes.values(), sides)]

    def classify(*maps: Tensor) -> Any:
        box = Boxes(torch.tensor([[0.0, 0.0, 32.0, 32.0]]))
        region = Instances((64, 64), proposal_boxes=box, objectness_logits=torch.zeros(1))
        return detector.roi_heads(None, dict(zip(shapes, maps)), [region])

    def finish(*maps: Tensor) -> Any:
        box = Boxes(torch.tensor([[0.0, 0.0, 32.0, 32.0]]))
        found = Instances((64, 64), pred_boxes=box, pred_classes=torch.zeros(1, dtype=torch.long))
        return detector.roi_heads.forward_with_given_boxes(dict(zip(shapes, maps)), [found])

    counts.add(classify, *maps, times=regions)
    counts.add(finish, *maps, times=detections)
