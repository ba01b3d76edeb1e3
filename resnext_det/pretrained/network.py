"""Weights of a file into a bare ResNeXt, and images into what that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from resnext_det.errors import WeightsError
from resnext_det.modeling.forms import form_of
from resnext_det.modeling.resnext import ResNeXt
from resnext_det.pretrained.convert import BackboneWeights
from resnext_det.pretrained.pixels import Pixels


def network_of(
    weights: BackboneWeights,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    classes: int | None = None,
    out_features: Sequence[str] | None = None,
) -> ResNeXt:
    """Build the network that a file describes, and load its weights into it, all of them.

    Args:
        weights: what `read_backbone` gave.
        tensors: to load instead of `weights.tensors`: those of a form as the file has them, or with
            a classifier's "linear.weight" (classes, channels) and "linear.bias" (classes,).
        classes: of the classifier, None for a network without one.
        out_features: what it returns; by default the last layer.

    Returns:
        The network in evaluation mode, in float32 whatever the file has, with FrozenBN, which
        computes what BN does there.

    Raises:
        WeightsError: it cannot be built from what the file says, or the tensors do not fit.
    """
    tensors = weights.tensors if tensors is None else tensors
    if weights.depth is None:
        raise WeightsError(f"{weights.source} holds a {weights}, which cannot be built.")
    if not any(name.endswith("running_mean") for name in weights.tensors):
        raise WeightsError(
            f"{weights.source} has norms without running statistics (GN, LN, or batch norms that "
            "lost theirs); only networks with batch norms are run here."
        )
    if weights.stride_in_1x1 is None and weights.template.cardinality == 1:
        raise WeightsError(
            f"{weights.source} holds a ResNet, and does not say whether its stride is in the 1x1 "
            "or in the 3x3 convolutions. Take the file that it was made from."
        )
    network = ResNeXt(
        weights.depth,
        weights.template,
        stem_out_channels=weights.tensors["stem.conv1.weight"].shape[0],
        res2_out_channels=weights.tensors["res2.0.shortcut.weight"].shape[0],
        # Where a ResNeXt's file does not say, it is as in all that were published: in the 3x3.
        stride_in_1x1=bool(weights.stride_in_1x1),
        num_classes=classes,
        out_features=out_features,
        form=form_of(tensors),
    )
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{weights.source} does not fit a {weights}: {reason}") from error
    network.eval()
    return network


def network_input(images: Tensor, pixels: Pixels) -> Tensor:
    """Give images the convention that a network takes.

    Args:
        images: (N, 3, H, W), RGB of 0 to 255, of any type.
        pixels: the convention.

    Returns:
        (N, 3, H, W) in float32, on the device of `images`: (v * range / 255 - mean) / std.
    """
    ordered = images.flip(1) if pixels.order == "BGR" else images
    mean, std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1)
        for values in (pixels.mean, pixels.std)
    )
    return (ordered.float() * (pixels.range / 255) - mean) / std
