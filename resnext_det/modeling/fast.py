"""A faster detector that computes the same: folded norms, channels-last memory, one precision.

`accelerate` changes the classes of a built model's layers, not their parameters: names, state
dicts and checkpoints stay the same files.

- A frozen batch norm is folded into the convolution before it, in training too: the scaled weight
  is part of the graph, and the norm's activations are never stored.
- Feature maps are channels-last from the first convolution to the regions.
- Convolutions and linear layers compute in one precision; scores and box deltas leave their layers
  in float32, so box arithmetic, losses and NMS never see less.
- On a CPU, RoIAlign is `resnext_det.modeling.roi_align`.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ROIAlign
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F

from resnext_det.modeling.roi_align import Level, pool_levels, roi_align

Precision = Literal["fp32", "bf16", "fp16", "fp64"]

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}

# The layers of Detectron2's heads whose outputs are scores, box deltas, masks or keypoints.
OUTPUT_LAYERS = {
    "objectness_logits",
    "anchor_deltas",
    "cls_score",
    "bbox_pred",
    "ctrness",
    "predictor",
    "score_lowres",
}


# Norms take any precision, and compute in float32.
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, LayerNorm)


def accelerate(model: nn.Module, precision: Precision = "fp32") -> nn.Module:
    """Make a Detectron2 model faster, in place.

    Args:
        model: any Detectron2 model; what this does not know is left alone.
        precision: of convolutions and linear layers: fp32, bf16 or fp16, or fp64 for a model of
            doubles. Parameters, scores, boxes and losses stay float32. fp16 needs a gradient
            scaler in training.

    Returns:
        The model.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(DTYPES)}")
    dtype = DTYPES[precision]
    for name, module in model.named_modules():
        fast = _FAST.get(type(module))
        if fast is None:
            if module._parameters and not isinstance(module, NORMS):
                module.register_forward_pre_hook(_to_parameters)
            continue
        module.__class__ = fast
        if isinstance(module, _Computed):
            module.compute_dtype = dtype
            is_output = name.rpartition(".")[2] in OUTPUT_LAYERS
            module.output_dtype = cast(Any, module).weight.dtype if is_output else None
    return model


class _Computed:
    """A layer whose weight is cast, and folded with its norm, before it is used."""

    compute_dtype: torch.dtype
    output_dtype: torch.dtype | None

    def prepared(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias to compute with."""
        layer = cast(Any, self)
        norm = getattr(layer, "norm", None)
        tensors = [layer.weight, layer.bias]
        if norm is not None:
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        given = [tensor for tensor in tensors if tensor is not None]
        graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        if graph or torch.compiler.is_compiling() or any(t.is_inference() for t in given):
            return self._prepare(norm)
        key = (self.compute_dtype, *((id(t), t.data_ptr(), t._version) for t in given))
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != key:
            with torch.no_grad(), torch.inference_mode(False):
                kept = (key, self._prepare(norm))
            self.__dict__["_kept"] = kept
        return cast(tuple[Tensor, Tensor | None], kept[1])

    def _prepare(self, norm: Any) -> tuple[Tensor, Tensor | None]:
        layer = cast(Any, self)
        weight, bias = layer.weight, layer.bias
        if norm is not None:
            scale = (norm.running_var + norm.eps).rsqrt()
            if norm.weight is not None:
                scale = norm.weight * scale
            shift = -norm.running_mean * scale
            if norm.bias is not None:
                shift = norm.bias + shift
            weight = weight * scale[:, None, None, None]
            bias = shift if bias is None else bias * scale + shift
        weight = weight.to(self.compute_dtype)
        return weight, None if bias is None else bias.to(self.compute_dtype)

    def finished(self, x: Tensor) -> Tensor:
        """Cast an output that leaves the network; losses and decoders expect it channels-first."""
        return x if self.output_dtype is None else x.to(self.output_dtype).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


class FastConv2d(_Computed, Conv2d):
    """Detectron2's Conv2d with its frozen norm folded in."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the folded weight, or convolve and normalize."""
        norm = self.norm
        foldable = _is_frozen(norm)
        x = x.to(self.compute_dtype, memory_format=torch.channels_last)
        if foldable or norm is None:
            weight, bias = self.prepared()
        else:
            weight = self.weight.to(self.compute_dtype)
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        if norm is not None and not foldable:
            x = norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return self.finished(x)


class FastPlainConv2d(_Computed, nn.Conv2d):
    """torch's Conv2d in the precision of the model."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve in the model's precision."""
        x = x.to(self.compute_dtype, memory_format=torch.channels_last)
        weight, bias = self.prepared()
        return self.finished(self._conv_forward(x, weight, bias))


class FastLinear(_Computed, nn.Linear):
    """torch's Linear in the precision of the model."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the model's precision."""
        return self.finished(F.linear(x.to(self.compute_dtype), *self.prepared()))


class FastROIAlign(ROIAlign):
    """Detectron2's ROIAlign on `roi_align`."""

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool `rois`, (K, 5) of image index and corners."""
        return roi_align(
            input,
            rois,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )


class FastROIPooler(ROIPooler):
    """Detectron2's ROIPooler, which pools all levels into one channels-last result."""

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pool each box from its level: (K, C, P, P), channels-last on a CPU."""
        poolers = list[Any](self.level_poolers)
        if len(poolers) > 1 and all(type(pooler) is FastROIAlign for pooler in poolers):
            assigned = assign_boxes_to_levels(
                box_lists,
                self.min_level,
                self.max_level,
                self.canonical_box_size,
                self.canonical_level,
            )
            pooled = pool_levels(
                [Level(f, pooler.spatial_scale) for f, pooler in zip(x, poolers, strict=True)],
                convert_boxes_to_pooler_format(box_lists),
                assigned,
                self.output_size,
                poolers[0].sampling_ratio,
                poolers[0].aligned,
            )
            if pooled is not None:
                return pooled
        return cast(Tensor, super().forward(x, box_lists))


class FastConvTranspose2d(_Computed, nn.ConvTranspose2d):
    """torch's ConvTranspose2d in the precision of the model."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve in the model's precision."""
        if output_size is not None:
            return self.finished(super().forward(x.to(self.weight.dtype), output_size))
        weight, bias = self.prepared()
        x = F.conv_transpose2d(
            x.to(self.compute_dtype, memory_format=torch.channels_last),
            weight,
            bias,
            cast(Any, self.stride),
            cast(Any, self.padding),
            cast(Any, self.output_padding),
            self.groups,
            cast(Any, self.dilation),
        )
        return self.finished(x)


def _to_parameters(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give an unknown layer inputs of its parameters' precision."""
    dtype = next(module.parameters(recurse=False)).dtype
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )


def _is_frozen(norm: nn.Module | None) -> bool:
    """Tell whether a norm multiplies and adds constants: a frozen one, or one in evaluation."""
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        return not norm.training and norm.running_mean is not None
    return False


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    Conv2d: FastConv2d,
    nn.Conv2d: FastPlainConv2d,
    nn.ConvTranspose2d: FastConvTranspose2d,
    nn.Linear: FastLinear,
    ROIAlign: FastROIAlign,
    ROIPooler: FastROIPooler,
}
