"""The proof of a conversion: one image through the source's own network and through ours.

On the source's side nothing of the conversion is used: the tensors are those of the file, under the
names it has, in a network of torchvision or timm, which sees the image as the source does. On ours
is what a detector will get: the converted file, read from the disk, and the image as that file's
record says. What the image excites is compared; a unit that it leaves at 0 everywhere is not.
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

from resnext_det.errors import ConfigError, WeightsError
from resnext_det.modeling.forms import form_of
from resnext_det.modeling.resnext import STAGES, ResNeXt
from resnext_det.weights.converting import BackboneWeights, backbone_of
from resnext_det.weights.imagenet_images import open_image
from resnext_det.weights.layouts import is_head, recognise
from resnext_det.weights.pixels import Pixels
from resnext_det.weights.reading import read_checkpoint


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


Program = Literal["torchvision", "timm"]
PROGRAMS: tuple[Program, ...] = get_args(Program)
Image = NDArray[np.uint8]

TOLERANCE = 1e-4
"""Of the largest value of a stage. In float32 the rounding of two programs comes to 1e-6 at most
(50 to 200 layers, all three forms). Above 1e-4 are weights rounded to half precision (3e-4), a mean
that is half a grey level off (4e-3), and whatever is in the wrong place: two tensors, RGB for BGR,
a stride in the 1x1 (1e-2 and more). All measured, on random weights."""

_LONGEST = 1024
"""Pixels of an image's longer side; more would take gigabytes and prove nothing more."""

_LAYOUTS = ("torchvision", "mmpretrain", "mmdetection")
"""Those with torchvision's names, perhaps behind "backbone."."""


@dataclass(frozen=True)
class StageDifference:
    """How far two networks are apart after a stage.

    Attributes:
        stage: "res2" to "res5".
        difference: the largest absolute one.
        largest: the largest absolute value of the source's network.
    """

    stage: str
    difference: float
    largest: float

    @property
    def relative(self) -> float:
        """The difference as a part of the largest value; NaN where there is nothing but 0."""
        return self.difference / self.largest if self.largest else float("nan")


@dataclass(frozen=True)
class Verification:
    """What one image showed.

    Attributes:
        source: the file that was converted.
        converted: what it was converted to.
        network: the source's own, such as "torchvision 0.29.1".
        height: of the image, in pixels.
        width: of the image, in pixels.
        stages: each of the four.
        tolerance: of the largest value of a stage.
    """

    source: Path
    converted: Path
    network: str
    height: int
    width: int
    stages: tuple[StageDifference, ...]
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether all four stages do; NaN never does."""
        return all(stage.relative <= self.tolerance for stage in self.stages)

    def check(self) -> None:
        """Refuse a difference.

        Raises:
            WeightsError: a stage is further apart than the tolerance.
        """
        if self.agrees:
            return
        wrong = next(stage for stage in self.stages if not stage.relative <= self.tolerance)
        raise WeightsError(
            f"{self.converted} does not compute what {self.source} does in {self.network}: after "
            f"{wrong.stage} the largest difference is {wrong.difference:.3g} where the largest "
            f"value is {wrong.largest:.3g}, and {self.tolerance:g} of that is allowed."
        )


def verify(
    source: Path,
    converted: Path,
    image: Image | None = None,
    *,
    program: Program = "torchvision",
    pixels: Pixels | None = None,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Compare a source's own network with what the converted file gives, on one image.

    Args:
        source: a checkpoint under torchvision's names, as timm, mmpretrain and mmdetection have
            them too.
        converted: what `write_detectron2` made of it, in any form.
        image: RGB of 0 to 255, (H, W, 3); by default `default_image()`.
        program: whose network to run the source in.
        pixels: what the source takes for an image, where it is not what its layout usually does.
        tolerance: of the largest value of a stage.

    Returns:
        The differences; whether they are within the tolerance is for `check` to say.

    Raises:
        WeightsError: the source is in a layout without such a network or does not fit it, a file
            cannot be read, or timm is asked for and not installed.
        ConfigError: there is no such program.
    """
    if program not in PROGRAMS:
        raise ConfigError(f"there is no network of {program!r}; there are {', '.join(PROGRAMS)}.")
    image = default_image() if image is None else image
    checkpoint = read_checkpoint(source)
    try:
        found = recognise(checkpoint.tensors)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error
    seen = pixels or found.pixels
    if found.layout not in _LAYOUTS or seen is None:
        raise WeightsError(
            f"{source} is in {found.layout}'s layout, for which torchvision and timm have no "
            "network to compare with: a proof needs a file under torchvision's names."
        )
    prefix = "backbone." if "backbone.conv1.weight" in checkpoint.tensors else ""
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix) and not is_head(name.removeprefix(prefix))
    }
    written = read_checkpoint(converted)
    weights = backbone_of(converted, written)
    if weights.pixels is None:
        raise WeightsError(
            f"{converted} does not say what it takes for an image, as what is converted here does."
        )
    own, version = _own_network(source, state, program)
    ours = network_of(weights, written.tensors, out_features=STAGES)
    picture = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        truth = _stages(own, network_input(picture, seen))
        got = ours(network_input(picture, weights.pixels))
    differences = tuple(_difference(name, got[name], truth[name]) for name in STAGES)
    height, width, _ = image.shape
    return Verification(source, converted, version, height, width, differences, tolerance)


def default_image(height: int = 224, width: int = 256, seed: int = 0) -> Image:
    """Return noise on gradients, another one in each colour; RGB of 0 to 255, (H, W, 3).

    It is not square, no two colours are alike, and all four sides differ.
    """
    down, right = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    gradients = 255 * np.stack([down, right, 1 - (down + right) / 2], axis=-1)
    noise = np.random.default_rng(seed).uniform(-64, 64, gradients.shape)
    image: Image = (gradients + noise).clip(0, 255).astype(np.uint8)
    return image


def image_of(file: Path) -> Image:
    """Return an image file as RGB of 0 to 255, (H, W, 3); made smaller above 1024 pixels.

    Raises:
        DatasetError: it cannot be read.
    """
    picture = open_image(file)
    picture.thumbnail((_LONGEST, _LONGEST))
    return np.asarray(picture)


def _own_network(
    source: Path, tensors: Mapping[str, Tensor], program: Program
) -> tuple[nn.Module, str]:
    """Return the network of another program with the tensors of the file, and its version."""
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    try:
        # Nothing is allocated before the shapes are known to fit.
        with torch.device("meta"):
            network, version = _build(program, *_shape(state))
        network.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise WeightsError(
            f"{source} is no network that {program} has, so there is none to compare with: {reason}"
        ) from error
    return network.float().eval(), version


def _shape(state: Mapping[str, Tensor]) -> tuple[list[int], int, int]:
    """Return the blocks of each stage, cardinality and width, from torchvision's names."""
    blocks = [
        len({name.split(".")[1] for name in state if name.startswith(f"layer{number}.")})
        for number in (1, 2, 3, 4)
    ]
    weight = state["layer1.0.conv2.weight"]
    if weight.dim() != 4 or not weight.shape[1]:
        raise ValueError(f"layer1.0.conv2.weight has the shape {tuple(weight.shape)}")
    width = weight.shape[1]
    return blocks, weight.shape[0] // width, width


def _build(
    program: Program, blocks: list[int], cardinality: int, width: int
) -> tuple[nn.Module, str]:
    """Return a network without a classifier, and the program's name with its version."""
    try:
        package: Any = importlib.import_module(program)
        resnet: Any = importlib.import_module(f"{program}.models.resnet")
    except ImportError as error:
        raise WeightsError(
            f"{program} is not installed, so there is no network of it to compare with; install "
            "it, or compare with torchvision's."
        ) from error
    network: nn.Module
    if program == "timm":
        network = resnet.ResNet(
            resnet.Bottleneck, blocks, num_classes=0, cardinality=cardinality, base_width=width
        )
    else:
        network = resnet.ResNet(
            resnet.Bottleneck, blocks, groups=cardinality, width_per_group=width
        )
        network.fc = nn.Identity()
    return network, f"{program} {package.__version__}"


def _stages(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Run a network of torchvision or timm as it runs itself, and keep what its stages give."""
    kept: dict[str, Tensor] = {}

    def keep(stage: str) -> Any:
        return lambda module, inputs, output: kept.__setitem__(stage, output)

    handles = [
        network.get_submodule(f"layer{number}").register_forward_hook(keep(stage))
        for number, stage in enumerate(STAGES, start=1)
    ]
    network(images)
    for handle in handles:
        handle.remove()
    return kept


def _difference(stage: str, got: Tensor, truth: Tensor) -> StageDifference:
    if got.shape != truth.shape:
        return StageDifference(stage, float("inf"), float(truth.abs().max()))
    return StageDifference(stage, float((got - truth).abs().max()), float(truth.abs().max()))
