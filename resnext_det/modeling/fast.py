"""A faster detector that computes the same: folded norms, channels-last memory, one precision.

`accelerate` changes the classes of a built model's layers, not their parameters: names, state
dicts and checkpoints stay the same files.

- A frozen batch norm is folded into the convolution before it, in training too: the scaled weight
  is part of the graph, and the norm's activations are never stored.
- Feature maps are channels-last from the first convolution to the regions.
- Convolutions and linear layers compute in one precision; scores and box deltas leave their layers
  in float32, so box arithmetic, losses and NMS never see less.
- On a CPU, RoIAlign is `resnext_det.modeling.roi_align`, and wide 3x3 convolutions in float32 are
  `resnext_det.modeling.winograd`.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchvision.ops import RoIPool

from resnext_det.modeling import winograd
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
        known = type(module)
        fast = known if known in _FAST.values() else _FAST.get(known)
        if fast is None:
            if module._parameters and not isinstance(module, NORMS):
                module.register_forward_pre_hook(_to_parameters)
            continue
        module.__class__ = fast
        if isinstance(module, _Computed):
            module.compute_dtype = dtype
            is_output = name.rpartition(".")[2] in OUTPUT_LAYERS
            module.output_dtype = cast(Any, module).weight.dtype if is_output else None
            module.suits_winograd = (
                dtype == torch.float32
                and isinstance(module, nn.Conv2d)
                and module.kernel_size == (3, 3)
                and module.stride == module.padding == module.dilation == (1, 1)
                and (module.groups, module.padding_mode) == (1, "zeros")
                and min(module.in_channels, module.out_channels) >= winograd.FEWEST_CHANNELS
            )
    return model


@dataclass(frozen=True)
class _Kept:
    """What a layer computes with in inference.

    Attributes:
        key: identifies the parameters that it was prepared from.
        weight: folded and cast.
        bias: likewise.
        matrices: the weight as `winograd.convolve` takes it.
    """

    key: tuple[Any, ...]
    weight: Tensor
    bias: Tensor | None
    matrices: Tensor | None


class _Computed:
    """A layer whose weight is folded with its norm, and cast, before it is used."""

    compute_dtype: torch.dtype
    output_dtype: torch.dtype | None
    suits_winograd: bool

    def parameters_to_fold(self) -> list[Tensor]:
        """Return the parameters and statistics that weight and bias depend on."""
        layer = cast(Any, self)
        tensors, norm = [layer.weight, layer.bias], cast(Any, getattr(layer, "norm", None))
        if _is_frozen(norm):
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        return [tensor for tensor in tensors if tensor is not None]

    def factor_and_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """Return by what a frozen norm multiplies each channel, and what it and the layer add."""
        layer = cast(Any, self)
        scale, bias, norm = None, layer.bias, cast(Any, getattr(layer, "norm", None))
        if _is_frozen(norm):
            scale = (norm.running_var + norm.eps).rsqrt()
            if norm.weight is not None:
                scale = norm.weight * scale
            shift = -norm.running_mean * scale
            if norm.bias is not None:
                shift = norm.bias + shift
            bias = shift if bias is None else bias * scale + shift
        return scale, None if bias is None else bias.to(self.compute_dtype)

    def folded(self, scale: Tensor | None) -> Tensor:
        """Return the weight, multiplied and cast."""
        weight = cast(Any, self).weight
        if scale is not None:
            weight = weight * scale[:, None, None, None]
        return cast(Tensor, weight.to(self.compute_dtype))

    def kept(self) -> _Kept:
        """Return what to compute with outside of training, prepared once."""
        given = self.parameters_to_fold()
        lasting = not (torch.compiler.is_compiling() or any(t.is_inference() for t in given))
        key: tuple[Any, ...] = ()
        if lasting:
            key = (self.compute_dtype, *((id(t), t.data_ptr(), t._version) for t in given))
            kept = self.__dict__.get("_kept")
            if kept is not None and kept.key == key:
                return cast(_Kept, kept)
        with torch.no_grad(), torch.inference_mode(False):
            scale, bias = self.factor_and_bias()
            weight = self.folded(scale)
            matrices = winograd.transform(weight) if self.suits_winograd and lasting else None
        new = _Kept(key, weight, bias, matrices)
        if lasting:
            self.__dict__["_kept"] = new
        return new

    def forget(self) -> None:
        """Drop what was kept: a fused optimizer changes parameters without a new version."""
        self.__dict__.pop("_kept", None)

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return the cast weight and bias, as part of the graph in training."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in self.parameters_to_fold()):
            self.forget()
            scale, bias = self.factor_and_bias()
            return self.folded(scale), bias
        kept = self.kept()
        return kept.weight, kept.bias

    def finished(self, x: Tensor) -> Tensor:
        """Cast an output that leaves the network; losses and decoders expect it channels-first."""
        return x if self.output_dtype is None else x.to(self.output_dtype).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


class _Convolving(_Computed):
    """A convolution in the model's precision, with its norm if that can be folded."""

    def convolved(self, x: Tensor) -> Tensor:
        """Convolve (N, C, H, W)."""
        layer = cast(Any, self)
        x = x.to(self.compute_dtype, memory_format=torch.channels_last)
        given = [x, *self.parameters_to_fold()]
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)):
            kept = self.kept()
            return self.computed(x, kept.weight, kept.bias, kept.matrices)
        self.forget()
        scale, bias = self.factor_and_bias()
        if _is_special() or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return cast(Tensor, layer._conv_forward(x, self.folded(scale), bias))
        return cast(Tensor, _Convolution.apply(self, x, layer.weight, scale, bias))

    def computed(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, matrices: Tensor | None = None
    ) -> Tensor:
        """Convolve with the folded weight, or with its `matrices`."""
        if self.uses_winograd(x):
            matrices = winograd.transform(weight) if matrices is None else matrices
            return winograd.convolve(x, matrices, bias)
        return cast(Tensor, cast(Any, self)._conv_forward(x, weight, bias))

    def uses_winograd(self, x: Tensor) -> bool:
        """Tell whether Winograd's algorithm is faster."""
        return (
            self.suits_winograd
            and x.device.type == "cpu"
            and x[:, 0].numel() >= winograd.FEWEST_PIXELS
            and not _is_special()
        )


class _Convolution(torch.autograd.Function):
    """A convolution that keeps its parameters for the backward pass, not the folded weight."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: _Convolving,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight, scale)
        return layer.computed(x, layer.folded(scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        layer, folded = ctx.layer, ctx.layer.folded(scale)
        gradient = gradient.to(x.dtype, memory_format=torch.channels_last)
        _, of_x, of_weight, of_scale, of_bias = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None, None, None]
        if layer.uses_winograd(x):
            if of_x:
                gradients[0] = winograd.input_gradient(gradient, folded)
            if of_weight or of_scale:
                gradients[1] = winograd.weight_gradient(x, gradient)
            if of_bias:
                gradients[2] = gradient.sum((0, 2, 3))
        else:
            gradients = torch.ops.aten.convolution_backward(
                gradient,
                x,
                folded,
                [len(folded)] if of_bias else None,
                layer.stride,
                layer.padding,
                layer.dilation,
                False,
                [0, 0],
                layer.groups,
                [of_x, of_weight or of_scale, of_bias],
            )
        to_x, to_weight, to_bias = gradients
        to_scale = None
        if to_weight is not None:
            to_weight = to_weight.to(weight.dtype)
            if of_scale:
                to_scale = (to_weight * weight).sum((1, 2, 3))
            if scale is not None:
                to_weight = to_weight * scale[:, None, None, None]
        return None, to_x, to_weight, to_scale, to_bias


class FastConv2d(_Convolving, Conv2d):
    """Detectron2's Conv2d with its frozen norm folded in."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the folded weight, or convolve and normalize."""
        x = self.convolved(x)
        if self.norm is not None and not _is_frozen(self.norm):
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return self.finished(x)


class FastPlainConv2d(_Convolving, nn.Conv2d):
    """torch's Conv2d in the precision of the model."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve in the model's precision."""
        return self.finished(self.convolved(x))


class FastLinear(_Computed, nn.Linear):
    """torch's Linear in the precision of the model."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the model's precision."""
        return self.finished(F.linear(x.to(self.compute_dtype), *self.weight_and_bias()))


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


class FastROIPool(RoIPool):
    """torchvision's RoIPool, which takes features and boxes of one type, for any precision."""

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """Pool `rois`, (K, 5) of image index and corners, in their own precision."""
        dtype = rois[0].dtype
        return super().forward(input.to(dtype), rois).to(input.dtype)


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
        weight, bias = self.weight_and_bias()
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


def _is_special() -> bool:
    """Tell whether torch must see plain operators: in a trace, a compilation or autocast."""
    return (
        torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
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
    RoIPool: FastROIPool,
    ROIPooler: FastROIPooler,
}
