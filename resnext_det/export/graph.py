"""A detector as a graph: from pixels to boxes, scores, labels and masks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torchvision
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling import GeneralizedRCNN, RetinaNet, poolers
from detectron2.modeling.meta_arch import dense_detector
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, ImageList, instances
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from resnext_det.errors import ConfigError, quoted


class Graph(nn.Module):
    """A detector between plain tensors, for one image.

    Normalization and padding are part of it; resizing is not.
    """

    def __init__(self, detector: nn.Module) -> None:
        """Wrap a detector.

        Raises:
            ConfigError: it is neither a GeneralizedRCNN with an RPN nor a RetinaNet, or it has
                outputs that are not exported.
        """
        super().__init__()
        detector_of = quoted(type(detector).__name__)
        if type(detector) not in (GeneralizedRCNN, RetinaNet):
            raise ConfigError(
                f"{detector_of} cannot be exported: only GeneralizedRCNN and RetinaNet can."
            )
        heads: Any = getattr(detector, "roi_heads", None)
        if getattr(heads, "keypoint_on", False):
            raise ConfigError(
                "keypoints are not exported. To export the boxes alone, set MODEL.KEYPOINT_ON "
                "False."
            )
        if isinstance(detector, GeneralizedRCNN) and detector.proposal_generator is None:
            raise ConfigError(
                "MODEL.LOAD_PROPOSALS is True: this detector classifies regions of a file, which "
                "an artifact does not have."
            )
        self.detector = detector.eval()
        self.has_masks = bool(getattr(heads, "mask_on", False))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Detect the objects of an image.

        Args:
            image: (height, width, 3) in uint8, in the order of INPUT.FORMAT.

        Returns:
            Boxes, (N, 4): x0, y0, x1, y1 in pixels; scores, (N,), best first; labels, (N,); and of
            a detector with a mask head, the probabilities of each object's mask in its box,
            (N, M, M).
        """
        detector: Any = self.detector
        record = {"image": image.permute(2, 0, 1)}
        if isinstance(detector, GeneralizedRCNN):
            found: Any = detector.inference([record], do_postprocess=False)[0]
        else:
            found = detector([record])[0]["instances"]
        outputs = found.pred_boxes.tensor, found.scores, found.pred_classes
        return (*outputs, found.pred_masks[:, 0]) if self.has_masks else outputs


@torch.no_grad()
def traced(graph: Graph, image: Tensor) -> torch.jit.ScriptModule:
    """Trace a graph with an image, in which it should find objects; sizes stay dynamic."""
    with (
        warnings.catch_warnings(),
        patch_builtin_len(),
        without_branches(),
        _regions_by_level(graph.detector),
    ):
        warnings.simplefilter("ignore")  # each of a tracer's assumptions holds for one image
        trace: Any = torch.jit.trace  # without types
        script: torch.jit.ScriptModule = trace(graph, (image,), check_trace=False)
    return script


@torch.no_grad()
def exported(graph: Graph, image: Tensor) -> torch.export.ExportedProgram:
    """Export a graph with torch.export; sizes stay dynamic.

    Raises:
        Exception: of many classes, if torch cannot export it.
    """
    counting = [proposal_utils.__name__, instances.__name__]
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_branches())
        stack.enter_context(patch_builtin_len(counting))
        for each in (proposal_utils, dense_detector):  # their sizes are symbols
            stack.enter_context(mock.patch.object(each, "min", torch.sym_min, create=True))
        stack.enter_context(mock.patch.object(ImageList, "from_tensors", _padded))
        stack.enter_context(
            mock.patch.object(poolers, "convert_boxes_to_pooler_format", _of_one_image)
        )
        stack.enter_context(_AsTraced())
        sides = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        program = torch.export.export(
            graph, (image,), dynamic_shapes={"image": sides}, strict=False
        )
    # torch takes every list of boxes for one of at least two, and would assert that.
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


class _AsTraced(TorchFunctionMode):
    """Answers Detectron2's questions about values as a trace does.

    They are whether all values are finite, and whether there is nothing to do: True, and False.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        answers = {Tensor.__bool__: True, Tensor.item: -1, Tensor.numel: 1}
        if function in answers:
            return answers[function]
        return function(*arguments, **(keywords or {}))


def _padded(images: list[Tensor], divisor: int = 0, **others: Any) -> ImageList:
    """Do what `ImageList.from_tensors` does for one image, without computing sizes in tensors."""
    if (others.get("padding_constraints") or {}).get("square_size"):
        raise ValueError("the backbone takes squares")
    (image,) = images
    height, width = image.shape[-2:]
    more = (0, -width % max(divisor, 1), 0, -height % max(divisor, 1))
    return ImageList(functional.pad(image, more)[None], [(height, width)])


def _of_one_image(boxes: list[Boxes]) -> Tensor:
    """Do what `convert_boxes_to_pooler_format` does for one image: its index is 0."""
    (only,) = boxes
    return functional.pad(only.tensor, (1, 0))


@contextlib.contextmanager
def without_branches() -> Iterator[None]:
    """Give Detectron2 an NMS by class that has no branch for an empty list of boxes.

    Tracing keeps torchvision's branch, whose result OpenVINO takes for one box of random bits. As
    Detectron2's own `patch_builtin_len`, this lasts for a trace.
    """
    with mock.patch.object(torchvision.ops.boxes, "batched_nms", _nms_by_class):
        yield


@contextlib.contextmanager
def _regions_by_level(detector: nn.Module) -> Iterator[None]:
    """Sort proposals by the level of the pyramid that they are pooled from.

    What is pooled is then concatenated. Detectron2 scatters it level by level into one tensor of
    50 MB, which costs onnxruntime 3 % of a pass.
    """
    heads: Any = getattr(detector, "roi_heads", None)
    if type(heads) is not StandardROIHeads or len(heads.box_pooler.level_poolers) == 1:
        yield
        return
    pooler = heads.box_pooler

    def members(boxes: list[Boxes]) -> list[Tensor]:
        levels = poolers.assign_boxes_to_levels(
            *(boxes, pooler.min_level, pooler.max_level),
            *(pooler.canonical_box_size, pooler.canonical_level),
        )
        return [(levels == n).nonzero()[:, 0] for n in range(len(pooler.level_poolers))]

    def by_level(_: nn.Module, __: Any, output: Any) -> Any:
        (proposals,), losses = output
        return [proposals[torch.cat(members([proposals.proposal_boxes]))]], losses

    def pooled(features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        regions = poolers.convert_boxes_to_pooler_format(boxes)
        parts = zip(pooler.level_poolers, features, members(boxes))
        return torch.cat([level(feature, regions[rows]) for level, feature, rows in parts])

    proposer: Any = detector.proposal_generator
    with (
        mock.patch.object(pooler, "forward", pooled),
        proposer.register_forward_hook(by_level),
    ):
        yield


def _nms_by_class(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Do what torchvision's `batched_nms` does: move the boxes of each class apart, for one NMS."""
    largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
    apart = boxes + (classes.to(boxes) * (largest + 1))[:, None]
    return torchvision.ops.nms(apart, scores, threshold)
