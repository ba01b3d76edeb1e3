"""The contenders: one architecture, built by several libraries, behind Detectron2's interface."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import box_iou

from resnext_det.backbones import build_detector
from resnext_det.data.toy import ToySpec, draw_image
from resnext_det.environment import keep_freed_memory
from resnext_det.modeling.fast import Precision, accelerate
from resnext_det.runtime.engines import openvino_core
from resnext_det.weights.loading import load_weights

Inputs = list[dict[str, Any]]
"""Detectron2's: "image", "height", "width", and "instances" in training."""

_SEED = 0
_STOCK = {
    "build_resnext_backbone": "build_resnet_backbone",
    "build_resnext_fpn_backbone": "build_resnet_fpn_backbone",
    "build_retinanet_resnext_fpn_backbone": "build_retinanet_resnet_fpn_backbone",
    "ResNeXtRes5ROIHeads": "Res5ROIHeads",
}
BLOCKS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_STATISTICS = 320  # pixels of a side, for the statistics of random weights


@dataclass(frozen=True)
class Contender:
    """A library and a precision.

    Attributes:
        name: in the tables.
        build: returns the detector of a config.
        autocast: run under `torch.autocast` in bfloat16.
        as_commands: train and run as this package's commands do, with torch's fused SGD, and
            keeping freed memory in a process of its own.
    """

    name: str
    build: Callable[[CfgNode], nn.Module]
    autocast: bool = False
    as_commands: bool = False

    def alone(self, kind: str, cfg: CfgNode, inputs: Inputs) -> Callable[[], Any]:
        """Return what `inference` or `training` returns, in a process for this alone."""
        if self.as_commands:
            keep_freed_memory()
        run: Callable[[], Any] = getattr(self, kind)(cfg, inputs)
        return run

    def inference(self, cfg: CfgNode, inputs: Inputs) -> Callable[[], list[dict[str, Any]]]:
        """Return a function that detects the objects of `inputs`."""
        model = self.build(cfg).eval()

        @torch.no_grad()
        def run() -> list[dict[str, Any]]:
            with self._context(cfg):
                return cast(list[dict[str, Any]], model(inputs))

        return run

    def backbone(self, cfg: CfgNode, inputs: Inputs) -> Callable[[], dict[str, Tensor]]:
        """Return a function that computes the feature maps of one image."""
        model: Any = self.build(cfg).eval()
        batch = normalized(cfg, inputs).to(cfg.MODEL.DEVICE)

        @torch.no_grad()
        def run() -> dict[str, Tensor]:
            with self._context(cfg):
                return cast(dict[str, Tensor], model.backbone(batch))

        return run

    def training(self, cfg: CfgNode, inputs: Inputs) -> Callable[[], float]:
        """Return a function that takes one step of SGD and returns the loss before it."""
        model = self.build(cfg).train()
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # So slow that every step sees about the same network.
        settings: Any = {"fused": True} if self.as_commands else {}
        optimizer = torch.optim.SGD(learned, 1e-7, momentum=0.9, weight_decay=1e-4, **settings)

        def run() -> float:
            torch.manual_seed(_SEED)  # the same random samples of anchors and regions
            with EventStorage(), self._context(cfg):
                loss = torch.stack([each.float() for each in model(inputs).values()]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return run

    def _context(self, cfg: CfgNode) -> Any:
        device = torch.device(cfg.MODEL.DEVICE).type
        return torch.autocast(device, torch.bfloat16) if self.autocast else nullcontext()


def _stock(cfg: CfgNode) -> nn.Module:
    # Detectron2 has no ResNet-26: this package's, not accelerated, computes as Detectron2 does.
    if cfg.MODEL.RESNETS.DEPTH in (50, 101, 152):
        names = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.ROI_HEADS.NAME
        keys = ("MODEL.BACKBONE.NAME", "MODEL.ROI_HEADS.NAME")
        cfg = with_settings(cfg, {k: _STOCK.get(name, name) for k, name in zip(keys, names)})
    return _detector(cfg)


def _ours(precision: Precision, cfg: CfgNode) -> nn.Module:
    return accelerate(_detector(cfg), precision)


def _ours_checkpointed(precision: Precision, cfg: CfgNode) -> nn.Module:
    settings = {
        "MODEL.RESNEXT.CHECKPOINT_STAGES": ["res3", "res4", "res5"],
        "MODEL.RPN.HEAD_NAME": "CheckpointedRPNHead",
    }
    return _ours(precision, with_settings(cfg, settings))


def _detector(cfg: CfgNode) -> nn.Module:
    """Build a detector of Detectron2's speed, with the weights of every contender."""
    torch.manual_seed(_SEED)
    model = build_detector(with_settings(cfg, {"MODEL.RESNEXT.PRECISION": "stock"}))
    if cfg.MODEL.WEIGHTS:
        load_weights(model, cfg, whole_detector=True)
    else:
        spread(model, background=-1)
    return model


def with_settings(cfg: CfgNode, settings: Mapping[str, object]) -> CfgNode:
    """Return a changed copy of a config."""
    changed: CfgNode = cfg.clone()
    changed.defrost()
    words: list[Any] = [word for pair in settings.items() for word in pair]
    changed.merge_from_list(words)
    changed.freeze()
    return changed


class Torchvision(nn.Module):
    """torchvision's Faster R-CNN with the backbone, pyramid and limits of a config."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        torch.manual_seed(_SEED)
        resnets, rpn, heads = cfg.MODEL.RESNETS, cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
        network = ResNet(
            Bottleneck,
            list(BLOCKS[resnets.DEPTH]),
            groups=resnets.NUM_GROUPS,
            width_per_group=resnets.WIDTH_PER_GROUP,
            norm_layer=torchvision.ops.FrozenBatchNorm2d,
        )
        for name in ("conv1", "layer1", "layer2", "layer3", "layer4")[
            : cfg.MODEL.BACKBONE.FREEZE_AT
        ]:
            network.get_submodule(name).requires_grad_(False)
        self.network = FasterRCNN(
            BackboneWithFPN(
                network,
                {f"layer{n}": str(n) for n in (1, 2, 3, 4)},
                [256, 512, 1024, 2048],
                cfg.MODEL.FPN.OUT_CHANNELS,
            ),
            heads.NUM_CLASSES + 1,
            image_mean=cfg.MODEL.PIXEL_MEAN,
            image_std=cfg.MODEL.PIXEL_STD,
            rpn_anchor_generator=AnchorGenerator(
                tuple(map(tuple, cfg.MODEL.ANCHOR_GENERATOR.SIZES)),
                tuple(map(tuple, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS)) * 5,
            ),
            rpn_pre_nms_top_n_train=rpn.PRE_NMS_TOPK_TRAIN,
            rpn_pre_nms_top_n_test=rpn.PRE_NMS_TOPK_TEST,
            rpn_post_nms_top_n_train=rpn.POST_NMS_TOPK_TRAIN,
            rpn_post_nms_top_n_test=rpn.POST_NMS_TOPK_TEST,
            rpn_batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
            box_batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
            box_score_thresh=heads.SCORE_THRESH_TEST,
            box_detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        # Images come in the size to detect in.
        transform: Any = self.network.transform
        transform.resize = lambda image, target=None: (image, target)
        self.backbone = self.network.backbone
        self.to(cfg.MODEL.DEVICE)
        self.device = torch.device(cfg.MODEL.DEVICE)
        spread(self, background=0)

    @staticmethod
    def fits(cfg: CfgNode) -> bool:
        """Tell whether torchvision can build the network of a config."""
        resnets = cfg.MODEL.RESNETS
        wanted = (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME, resnets.NORM)
        return (
            wanted == ("GeneralizedRCNN", "StandardROIHeads", "FrozenBN")
            and not (cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON or resnets.STRIDE_IN_1X1)
            and resnets.DEPTH in BLOCKS
            and (resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS) == (64, 256)
        )

    def forward(self, inputs: Inputs) -> Any:
        """Return the losses or the instances, as a Detectron2 model."""
        images = [each["image"].to(self.device).float() for each in inputs]
        if self.training:
            truth = [each["instances"].to(self.device) for each in inputs]
            return self.network(
                images,
                [{"boxes": t.gt_boxes.tensor, "labels": t.gt_classes + 1} for t in truth],
            )
        outputs = []
        for each, found in zip(inputs, self.network(images), strict=True):
            instances = Instances((each["height"], each["width"]))
            instances.pred_boxes = Boxes(found["boxes"])
            instances.scores, instances.pred_classes = found["scores"], found["labels"] - 1
            outputs.append({"instances": instances})
        return outputs


STOCK = Contender("stock Detectron2", _stock)
AUTOCAST = Contender("stock Detectron2, autocast bf16", _stock, autocast=True)
TORCHVISION = Contender("torchvision", Torchvision)
FP32, BF16, FP16 = (
    Contender(f"ours {p}", partial(_ours, p), as_commands=True) for p in ("fp32", "bf16", "fp16")
)
FP32_CHECKPOINTED, BF16_CHECKPOINTED = (
    Contender(f"ours {p}, checkpointed", partial(_ours_checkpointed, p), as_commands=True)
    for p in ("fp32", "bf16")
)


def fitting(contenders: Sequence[Contender], cfg: CfgNode) -> list[Contender]:
    """Return the contenders that can build the network of a config."""
    return [each for each in contenders if each is not TORCHVISION or Torchvision.fits(cfg)]


# The deviation of a trained detector's outputs, by the end of the layer's name.
_SPREADS = {
    "objectness_logits": 2.0,
    "rpn.head.cls_logits": 2.0,
    "anchor_deltas": 0.1,
    "rpn.head.bbox_pred": 0.1,
    "box_predictor.bbox_pred": 0.5,
    "head.cls_score": 1.0,  # RetinaNet's
}
_BACKGROUND = 8.0  # above the other scores: a few hundred reach 0.05 among a thousand regions


@torch.no_grad()
def spread(model: nn.Module, background: int) -> None:
    """Make a random detector behave like a trained one, in place.

    Frozen norms get the statistics of what they see; objectness, scores and box deltas get the
    spread of a trained detector. Without this, activations grow with every block, and no score
    reaches 0.05.

    Args:
        model: a detector, as built.
        background: the index of the background among its scores.
    """
    handles: dict[str, Any] = {}

    def fit(norm: Any, inputs: tuple[Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)))

    def scale(layer: Any, inputs: tuple[Tensor], output: Tensor, name: str) -> Any:
        handles.pop(name).remove()  # the first level of a pyramid is enough
        factor = _SPREADS[name] / output.std()
        layer.weight.mul_(factor)
        return output * factor

    def scatter(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Any:
        factor = 2.0 / output.std(0).mean()
        layer.weight.mul_(factor)
        layer.bias.copy_(-factor * output.mean(0))
        layer.bias[background] += _BACKGROUND
        return output * factor + layer.bias

    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d | torchvision.ops.FrozenBatchNorm2d):
            handles[name] = module.register_forward_pre_hook(fit)
        elif name.endswith("box_predictor.cls_score"):
            handles[name] = module.register_forward_hook(scatter)
        for end in _SPREADS:
            if name.endswith(end):
                handles[end] = module.register_forward_hook(partial(scale, name=end))
    training = model.training
    model.eval()([example(_STATISTICS, _STATISTICS)])
    model.train(training)
    for handle in handles.values():
        handle.remove()


def example(height: int, width: int, seed: int = _SEED, objects: int = 8) -> dict[str, Any]:
    """Return a generated picture as Detectron2's mapper does, with random objects."""
    random = np.random.default_rng(seed)
    pixels = np.asarray(photograph(random, height, width))[:, :, ::-1]
    corners = random.uniform(0, 0.6, (objects, 2)) * [width, height]
    sides = random.uniform(0.05, 0.4, (objects, 2)) * [width, height]
    truth = Instances((height, width))
    truth.gt_boxes = Boxes(torch.tensor(np.hstack([corners, corners + sides]), dtype=torch.float32))
    truth.gt_classes = torch.tensor(random.integers(0, 6, objects))
    image = torch.tensor(pixels.transpose(2, 0, 1).copy())
    return {"image": image, "height": height, "width": width, "instances": truth}


def normalized(cfg: CfgNode, inputs: Inputs) -> Tensor:
    """Return the first image as a backbone takes it, (1, 3, height, width)."""
    mean, deviation = (torch.tensor(v) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    image: Tensor = inputs[0]["image"]
    return ((image - mean[:, None, None]) / deviation[:, None, None])[None]


def photograph(random: np.random.Generator, height: int, width: int) -> Image.Image:
    """Return a picture of the toy data set, scaled to a size."""
    side = ToySpec(shortest_side=640, longest_side=640)
    return draw_image(random, side)[0].resize((width, height), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Agreement:
    """How detections of one image differ from the baseline's, above a score of 0.05.

    Attributes:
        count: of the baseline's detections.
        matched: the share of them with a detection of the same class and an IoU of at least 0.5.
        pixels: the largest difference of their corners.
        score: the largest difference of their scores.
    """

    count: int
    matched: float
    pixels: float
    score: float

    @classmethod
    def of(cls, baseline: Any, other: Any) -> Agreement:
        """Match each detection (of `Instances`) of the baseline with the most overlapping one."""
        baseline, other = (each.to("cpu")[each.scores.cpu() > 0.05] for each in (baseline, other))
        if not len(baseline) or not len(other):
            return cls(len(baseline), 0.0, math.inf, math.inf)
        ious = box_iou(baseline.pred_boxes.tensor, other.pred_boxes.tensor)
        ious[baseline.pred_classes[:, None] != other.pred_classes] = 0
        best, index = ious.max(1)
        found = best >= 0.5
        pairs = baseline[found], other[index[found]]
        boxes, scores = ([getattr(p, n) for p in pairs] for n in ("pred_boxes", "scores"))
        pixels = (boxes[0].tensor - boxes[1].tensor).abs()
        if not len(pixels):
            return cls(len(baseline), 0.0, math.inf, math.inf)
        score = (scores[0] - scores[1]).abs()
        return cls(
            len(baseline), float(found.float().mean()), float(pixels.max()), float(score.max())
        )


def openvino_backbone(
    cfg: CfgNode, inputs: Inputs, precision: str
) -> Callable[[], dict[str, Tensor]]:
    """Return a function that computes the stock backbone by OpenVINO, in "f32" or "bf16"."""
    openvino: Any = importlib.import_module("openvino")  # without types, and optional
    model: Any = STOCK.build(cfg).eval()
    names = list(model.backbone.output_shape())

    class Listed(nn.Module):
        """The feature maps in a tuple, because a trace returns no dictionary."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = model.backbone

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            features = self.backbone(x)
            return tuple(features[name] for name in names)

    batch = normalized(cfg, inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(Listed(), example_input=batch, input=list(batch.shape))
    settings = {"INFERENCE_PRECISION_HINT": precision}
    compiled = openvino_core().compile_model(converted, "CPU", settings)

    def run() -> dict[str, Tensor]:
        outputs = compiled(batch.numpy())
        return {name: torch.from_numpy(outputs[n]) for n, name in enumerate(names)}

    return run
