"""Verify a conversion: run one image through the source's own network and through ours.

The source's tensors are loaded under their own names into a network of torchvision or timm, without
any code of the conversion. Ours come from the converted file, as for a detector, and the image is
normalised as that file's record says.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resnext_det.errors import ConfigError, WeightsError, quoted
from resnext_det.images import read_picture
from resnext_det.modeling.forms import form_of
from resnext_det.modeling.resnext import STAGES, ResNeXt
from resnext_det.modeling.template import BLOCKS_PER_STAGE
from resnext_det.weights.checks import is_preactivated
from resnext_det.weights.converting import BackboneWeights, backbone_of, naming
from resnext_det.weights.layouts import is_head, recognise
from resnext_det.weights.pixels import Pixels
from resnext_det.weights.reading import read_checkpoint

Program = Literal["torchvision", "timm"]
PROGRAMS: tuple[Program, ...] = get_args(Program)
Image = NDArray[np.uint8]

TOLERANCE = 1e-4
"""Relative to the largest value of a stage. Measured on random weights: float32 rounding is at most
1e-6 (50 to 200 layers, all three forms). Weights rounded to half precision give 3e-4, a mean half a
grey level off 4e-3, swapped tensors, RGB for BGR or a stride in the 1x1 at least 1e-2."""

_LONGEST = 1024  # pixels of the longer side; larger images take gigabytes
_LAYOUTS = ("torchvision", "mmpretrain", "mmdetection")  # torchvision's names, after "backbone."


@dataclass(frozen=True)
class Verification:
    """The result of a comparison.

    Attributes:
        network: of the source, such as "torchvision 0.29.1".
        size: of the image, (width, height) in pixels.
        stages: by name, "res2" to "res5", the largest absolute difference and the largest absolute
            value of the source's network.
    """

    network: str
    size: tuple[int, int]
    stages: Mapping[str, tuple[float, float]]

    @property
    def wrong(self) -> str | None:
        """The first stage that differs, or that holds only zeros or any NaN; None if all agree."""
        for stage, (difference, largest) in self.stages.items():
            if not (largest > 0 and difference <= TOLERANCE * largest):
                return stage
        return None


def network_of(
    weights: BackboneWeights,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    classes: int | None = None,
    out_features: Sequence[str] | None = None,
) -> ResNeXt:
    """Build the network that a file describes, and load all its weights into it.

    Args:
        weights: from `read_backbone`.
        tensors: to load instead of `weights.tensors`: in another form, or with a classifier's
            "linear.weight" (classes, channels) and "linear.bias" (classes,).
        classes: of the classifier; None for a network without one.
        out_features: stages to return; by default the last layer.

    Returns:
        The network in evaluation mode and float32, with FrozenBN, which equals BN there.

    Raises:
        WeightsError: it cannot be built from what the file says, or the tensors do not fit.
    """
    tensors = weights.tensors if tensors is None else tensors
    if weights.depth is None:
        raise WeightsError(f"{weights.source} holds a {weights}, which cannot be built.")
    if not any(name.endswith("running_mean") for name in weights.tensors):
        raise WeightsError(
            f"{weights.source} has norms without running statistics (GN, LN, or incomplete batch "
            "norms); only networks with batch norms can be run here."
        )
    if weights.stride_in_1x1 is None and weights.template.cardinality == 1:
        raise WeightsError(
            f"{weights.source} holds a ResNet, and does not say whether its stride is in the 1x1 "
            "or in the 3x3 convolutions. Use the file it was made from."
        )
    network = ResNeXt(
        weights.depth,
        weights.template,
        stem_out_channels=weights.tensors["stem.conv1.weight"].shape[0],
        # The first block of res2 has no shortcut of its own if the stem is as wide.
        res2_out_channels=weights.tensors["res3.0.shortcut.weight"].shape[1],
        # All published ResNeXts have it in the 3x3.
        stride_in_1x1=bool(weights.stride_in_1x1),
        num_classes=classes,
        out_features=out_features,
        form=form_of(tensors),
        pre_activation=is_preactivated(weights.tensors),
    )
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise WeightsError(f"{weights.source} does not fit a {weights}: {quoted(error)}") from error
    network.eval()
    return network


def verify(
    source: Path,
    converted: Path,
    image: Image | None = None,
    *,
    program: Program = "torchvision",
    pixels: Pixels | None = None,
) -> Verification:
    """Compare a source's own network with the converted file, on one image.

    Args:
        source: a checkpoint under torchvision's names, as timm, mmpretrain and mmdetection use.
        converted: what `write_detectron2` made of it, in any form.
        image: RGB from 0 to 255, (H, W, 3); by default `default_image()`.
        program: whose network to run the source in.
        pixels: the images that the source expects, if unusual for its layout.

    Raises:
        WeightsError: the program has no network for the source or is not installed, or a file
            cannot be read.
        ConfigError: there is no such program.
    """
    if program not in PROGRAMS:
        raise ConfigError(f"there is no network of {program!r}; choose {' or '.join(PROGRAMS)}.")
    image = default_image() if image is None else image
    checkpoint = read_checkpoint(source)
    with naming(source):
        found = recognise(checkpoint.tensors)
    seen = pixels or found.pixels
    if found.layout not in _LAYOUTS or seen is None:
        raise WeightsError(
            f"{source} is in {found.layout}'s layout, for which torchvision and timm have no "
            "network to compare with: use a file under torchvision's names."
        )
    prefix = "backbone." if "backbone.conv1.weight" in checkpoint.tensors else ""
    inner = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
    }
    state = {n: t for n, t in inner.items() if not is_head(n) and not n.startswith("fc.")}
    written = read_checkpoint(converted)
    weights = backbone_of(converted, written)
    if weights.pixels is None or weights.depth is None:
        raise WeightsError(
            f"{converted} does not say which pixels it expects: it was not converted here."
        )
    ours = network_of(weights, written.tensors, out_features=STAGES)
    try:
        with torch.device("meta"):  # nothing is allocated before the shapes are known to fit
            theirs, version = _network(program, state, weights.depth)
        theirs.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{source} is not a network that {program} has, and cannot be compared: "
            f"{quoted(error, 500)}"
        ) from error
    theirs.float().eval()
    truth: dict[str, Tensor] = {}
    for stage, name in zip(STAGES, ("layer1", "layer2", "layer3", "layer4")):
        theirs.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, stage=stage: truth.__setitem__(stage, output)
        )
    picture = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        theirs(seen.normalize(picture))
        got = ours(weights.pixels.normalize(picture))
    stages = {}
    for stage, expected in truth.items():
        same_shape = got[stage].shape == expected.shape
        difference = float((got[stage] - expected).abs().max()) if same_shape else float("inf")
        stages[stage] = (difference, float(expected.abs().max()))
    return Verification(version, (image.shape[1], image.shape[0]), stages)


def _network(program: Program, state: Mapping[str, Tensor], depth: int) -> tuple[nn.Module, str]:
    """Return a network of torchvision or timm without a classifier, and the program's version."""
    weight = state["layer1.0.conv2.weight"]
    if weight.dim() != 4 or not weight.shape[1]:
        raise ValueError(f"layer1.0.conv2.weight has the shape {tuple(weight.shape)}")
    width = weight.shape[1]
    groups, blocks = weight.shape[0] // width, list(BLOCKS_PER_STAGE[depth])
    try:
        package: Any = importlib.import_module(program)
        resnet: Any = importlib.import_module(f"{program}.models.resnet")
    except ImportError as error:
        raise WeightsError(
            f"{program} is not installed; install it, or compare with torchvision."
        ) from error
    words: dict[str, Any] = {"groups": groups, "width_per_group": width}
    if program == "timm":
        words = {"cardinality": groups, "base_width": width, "num_classes": 0}
    network: nn.Module = resnet.ResNet(resnet.Bottleneck, blocks, **words)
    network.fc = nn.Identity()
    return network, f"{program} {package.__version__}"


def default_image(height: int = 224, width: int = 256) -> Image:
    """Return noise on a different gradient for each colour, RGB from 0 to 255, (H, W, 3)."""
    down, right = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    gradients = 255 * np.stack([down, right, 1 - (down + right) / 2], axis=-1)
    noise = np.random.default_rng(0).uniform(-64, 64, gradients.shape)
    image: Image = (gradients + noise).clip(0, 255).astype(np.uint8)
    return image


def image_of(file: Path) -> Image:
    """Return an image file as RGB from 0 to 255, (H, W, 3), scaled down to 1024 pixels.

    Raises:
        DatasetError: it cannot be read.
    """
    picture = read_picture(file).convert("RGB")
    picture.thumbnail((_LONGEST, _LONGEST))
    return np.asarray(picture)
