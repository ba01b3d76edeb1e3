"""The paper's template, cardinality and width written as 32x4d, and its cost."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from resnext_det.errors import ConfigError, quoted

BLOCKS_PER_STAGE: dict[int, tuple[int, int, int, int]] = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
"""Blocks in res2 to res5 by depth. 50 and 101: the paper, Table 1 and section 5.1; 152 and 200: He
et al., "Deep Residual Learning" and "Identity Mappings"; 26: half a ResNet-50, as in timm."""

_STEM_CHANNELS, _RES2_CHANNELS = 64, 256  # Table 1; doubled in each stage after res2
_LARGEST_SIDE = 65_536
_NOTATION = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})d")
_LARGEST = 9999


@dataclass(frozen=True)
class Cost:
    """The cost of a block or a network.

    Attributes:
        parameters: learnable numbers.
        multiply_adds: of one image, each counted once ("FLOPs" in the paper, section 3.1); of
            convolutions and the classifier, without norms, pooling and additions.
    """

    parameters: int
    multiply_adds: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.multiply_adds + other.multiply_adds)


@dataclass(frozen=True)
class Template:
    """Cardinality C and bottleneck width d, in the paper's notation CxDd (section 3.1, Table 1).

    "1x64d" is ResNet, "32x4d" the paper's ResNeXt.

    Attributes:
        notation: such as "32x4d".
        cardinality: C, the number of paths: the groups of the 3x3 convolution.
        width: d, the channels of a path in res2, doubled in each later stage.

    Raises:
        ConfigError: the notation is not CxDd.
    """

    notation: str
    cardinality: int = field(init=False, compare=False, repr=False)
    width: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        match = _NOTATION.fullmatch(str(self.notation))
        if match is None:
            numbers = re.findall("[1-9][0-9]{0,3}", str(self.notation)[:100])
            example = "{}x{}d".format(*numbers) if len(numbers) == 2 else "32x4d"
            raise ConfigError(
                f"template {quoted(self.notation)} is not of the form CxDd, cardinality and width "
                f"from 1 to {_LARGEST}; write it like {example}."
            )
        object.__setattr__(self, "cardinality", int(match[1]))
        object.__setattr__(self, "width", int(match[2]))

    def __str__(self) -> str:
        return self.notation

    @classmethod
    def of(cls, cardinality: int, width: int) -> Template:
        """Return the template of a cardinality C and a path width d in res2.

        Raises:
            ConfigError: either is not a whole number from 1 to 9999.
        """
        for key, value in (("NUM_GROUPS", cardinality), ("WIDTH_PER_GROUP", width)):
            if type(value) is not int or not 1 <= value <= _LARGEST:
                raise ConfigError(
                    f"MODEL.RESNETS.{key} is {quoted(value)}; it must be a whole number from 1 to "
                    f"{_LARGEST}."
                )
        return cls(f"{cardinality}x{width}d")

    @classmethod
    def matching(cls, cardinality: int, like: Template | str) -> Template:
        """Return the template of a cardinality whose block costs most nearly what another's does.

        This is how the paper preserves complexity (section 3.4): like 1x64d, the cardinalities 1,
        2, 4, 8 and 32 give the widths 64, 40, 24, 14 and 4 of Table 2.

        Raises:
            ConfigError: even paths of width 1 cost more.
        """
        like = cls(like) if isinstance(like, str) else like
        budget = like.block().parameters
        narrowest = cls.of(cardinality, 1).block().parameters
        if narrowest > budget:
            raise ConfigError(
                f"no template of cardinality {cardinality} costs as little as {like}: a block of "
                f"{cardinality}x1d has {narrowest:,} parameters, one of {like} {budget:,}. The "
                f"largest cardinality that fits is {budget // cls.of(1, 1).block().parameters}."
            )
        # The real width that solves 9dd + 512d = budget / C; the best whole one is next to it.
        exact = (math.sqrt(_RES2_CHANNELS**2 + 9 * budget / cardinality) - _RES2_CHANNELS) / 9
        return min(
            (cls.of(cardinality, width) for width in (max(int(exact), 1), int(exact) + 1)),
            key=lambda template: abs(template.block().parameters - budget),
        )

    def block(self, height: int = 224, width: int = 224) -> Cost:
        """Return the cost of one block of res2 for an image of this size (Table 2).

        Eq. 4 (section 3.4): C * (256d + 3*3*d*d + 256d) parameters, without norms and shortcut:
        70,144 for 32x4d, 69,632 for 1x64d. The block works on a map of a quarter of the size.
        """
        check_size(height, width)
        d = self.width
        parameters = self.cardinality * (2 * _RES2_CHANNELS * d + 9 * d * d)
        return Cost(parameters, parameters * _halved(_halved(height)) * _halved(_halved(width)))

    def network(
        self, depth: int, height: int = 224, width: int = 224, num_classes: int = 1000
    ) -> Cost:
        """Return the cost of the whole classifier of Table 1, without building it.

        Convolutions have no bias and a batch norm with two parameters a channel; each stage begins
        with a projection and, after res2, a stride in the 3x3 convolution (section 4).

        Raises:
            ConfigError: an unknown depth or an impossible image size.
        """
        check_size(height, width)
        rows, columns = _halved(height), _halved(width)
        total = _convolution(3, _STEM_CHANNELS, 7, rows * columns)
        rows, columns = _halved(rows), _halved(columns)
        inputs, outputs = _STEM_CHANNELS, _RES2_CHANNELS
        for stage, count in enumerate(blocks_per_stage(depth), start=2):
            middle, before = self.bottleneck_channels(stage), rows * columns
            if stage > 2:
                rows, columns = _halved(rows), _halved(columns)
            places = rows * columns
            total += _convolution(inputs, outputs, 1, places)  # the projection
            for _ in range(count):
                total += _convolution(inputs, middle, 1, before)
                total += _convolution(middle, middle, 3, places, self.cardinality)
                total += _convolution(middle, outputs, 1, places)
                inputs, before = outputs, places
            outputs = 2 * outputs
        return total + Cost((inputs + 1) * num_classes, inputs * num_classes)

    def bottleneck_channels(self, stage: int) -> int:
        """Return the channels of the 3x3 convolution in stage 2 to 5 (res2 to res5).

        C * d in res2, doubled in each later stage (section 3.1, rule ii).
        """
        return self.cardinality * self.width << (stage - 2)


def blocks_per_stage(depth: int) -> tuple[int, int, int, int]:
    """Return the number of blocks in res2 to res5.

    Raises:
        ConfigError: the depth is not one of 26, 50, 101, 152, 200.
    """
    if depth in BLOCKS_PER_STAGE:
        return BLOCKS_PER_STAGE[depth]
    hint = ""
    if depth in (18, 34):
        hint = (
            " ResNet-18 and ResNet-34 have blocks of two layers, where grouping gains nothing "
            "(paper, section 3.3): use Detectron2's build_resnet_backbone for them."
        )
    raise ConfigError(
        f"MODEL.RESNETS.DEPTH is {quoted(depth)}; it must be one of "
        f"{', '.join(map(str, BLOCKS_PER_STAGE))}.{hint}"
    )


def check_size(height: int, width: int) -> None:
    """Refuse image sizes, in pixels, that no network can take.

    Raises:
        ConfigError: a side is shorter than 32, the stride of res5, or longer than 65,536.
    """
    if not (32 <= height <= _LARGEST_SIDE and 32 <= width <= _LARGEST_SIDE):
        raise ConfigError(
            f"an image of {height} x {width} pixels is refused: each side must have 32 (the stride "
            f"of res5) to {_LARGEST_SIDE:,} pixels."
        )


def _halved(side: int) -> int:
    """Return a side after a stride of 2; every strided layer is padded, so it rounds up."""
    return (side + 1) // 2


def _convolution(inputs: int, outputs: int, kernel: int, places: int, groups: int = 1) -> Cost:
    """Return the cost of a convolution and its norm on a map of `places` pixels."""
    weights = kernel * kernel * (inputs // groups) * outputs
    return Cost(weights + 2 * outputs, weights * places)
