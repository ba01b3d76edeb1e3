"""The paper's template: a cardinality and a width, written 32x4d, and what it costs."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field

from detectron2.config import CfgNode

from resnext_det.errors import ConfigError, quoted

BLOCKS_PER_STAGE: dict[int, tuple[int, int, int, int]] = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
"""Blocks in res2 to res5 by depth. 50 and 101: paper, Table 1 and section 5.1; 152 and 200: He et
al., "Deep Residual Learning" and "Identity Mappings"; 26: half of a ResNet-50, as timm has it."""

_STEM_CHANNELS, _RES2_CHANNELS = 64, 256  # Table 1; doubled with each stage after res2
_SIDES = (32, 65536)  # the stride of res5, and more than any image has

_NOTATION = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)d")
_LIKELY = re.compile(r"(?<![0-9.])([0-9]+)\s*[xX\u00d7*]\s*([0-9]+)(?![0-9.])")
_WIDEST = 4096
_KNOWN = ("32x4d", "64x4d", "1x64d", "32x8d", "2x40d", "4x24d", "8x14d", "2x64d", "1x100d")
"""Those of the paper's Tables 2 and 4, and 32x8d, Detectron2's own; the usual ones first."""


@dataclass(frozen=True)
class Cost:
    """What a block or a network costs.

    Attributes:
        parameters: learnable numbers.
        multiply_adds: those of one image, each counted once ("FLOPs" in the paper, section 3.1);
            of convolutions and the classifier, without norms, pooling and additions.
    """

    parameters: int
    multiply_adds: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.multiply_adds + other.multiply_adds)


@dataclass(frozen=True)
class Template:
    """Cardinality C and bottleneck width d of the blocks, in the paper's notation "CxDd".

    C is the number of paths (groups of the 3x3 convolution), d the channels of each path in res2.
    "1x64d" is ResNet, "32x4d" the paper's ResNeXt (paper, section 3.1 and Table 1).

    Attributes:
        notation: for example "32x4d".
        cardinality: C, the number of paths.
        width: d, the channels of a path in res2; it doubles with every later stage.

    Raises:
        ConfigError: the notation cannot be read.
    """

    notation: str
    cardinality: int = field(init=False, compare=False, repr=False)
    width: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        match = _NOTATION.fullmatch(self.notation)
        if match is None:
            raise ConfigError(
                f"template {self.notation!r} cannot be read; {_suggestion(self.notation)} A "
                "template is written CxDd: cardinality C, the number of paths, and width d of each."
            )
        cardinality, width = (_within_limits(digits) for digits in match.groups())
        if (str(cardinality), str(width)) != match.groups():
            raise ConfigError(
                f"template {self.notation!r} is wider than anything that can be built: cardinality "
                f"and width may be at most {_WIDEST} (nearest: {cardinality}x{width}d)."
            )
        object.__setattr__(self, "cardinality", cardinality)
        object.__setattr__(self, "width", width)

    def __str__(self) -> str:
        return self.notation

    @classmethod
    def of(cls, cardinality: int, width: int) -> Template:
        """Return the template with this cardinality C and this width d of a path in res2."""
        return cls(f"{cardinality}x{width}d")

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> Template:
        """Return the template that a Detectron2 config describes.

        Args:
            cfg: any Detectron2 config; MODEL.RESNETS.NUM_GROUPS and WIDTH_PER_GROUP are read.

        Raises:
            ConfigError: either is not a positive number.
        """
        groups, width = cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP
        for key, value in (("NUM_GROUPS", groups), ("WIDTH_PER_GROUP", width)):
            if type(value) is not int or value < 1:
                raise ConfigError(
                    f"MODEL.RESNETS.{key} is {quoted(value)}; it must be a whole number of 1 or "
                    "more."
                )
        try:
            return cls.of(groups, width)
        except ConfigError as error:
            raise ConfigError(
                f"MODEL.RESNETS.NUM_GROUPS is {groups} and WIDTH_PER_GROUP is {width}: {error}"
            ) from error

    @classmethod
    def from_channels(cls, cardinality: int, channels: int) -> Template:
        """Return the template whose 3x3 convolution in res2 has these channels in all.

        Args:
            cardinality: C, the groups of the convolution.
            channels: C * d, such as 128 for 32x4d (Table 2, "width of group conv.").

        Raises:
            ConfigError: the groups do not divide the channels; the message names the nearest
                channels that they do.
        """
        _check_cardinality(cardinality)
        width, left_over = divmod(channels, cardinality)
        if channels >= cardinality and not left_over:
            return cls.of(cardinality, width)
        nearest = " or ".join(
            f"{cardinality * each} = {cardinality}x{each}d"
            for each in sorted({max(width, 1), max(width + 1, 1)})
        )
        raise ConfigError(
            f"{channels} channels cannot be divided into {cardinality} groups of one width "
            f"(nearest: {nearest})."
        )

    @classmethod
    def matching(cls, cardinality: int, like: Template | str) -> Template:
        """Return the template of this cardinality whose block costs as much as another's.

        The width is the one whose block has the number of parameters (so of multiply-adds) nearest
        to that of `like`, which is how the paper preserves complexity (section 3.4): like 1x64d,
        cardinality 1, 2, 4, 8 and 32 give the widths 64, 40, 24, 14 and 4 of Table 2.

        Args:
            cardinality: C, the number of paths.
            like: the template to match.

        Raises:
            ConfigError: paths of width 1 already cost more; the message names the largest
                cardinality that fits.
        """
        _check_cardinality(cardinality)
        like = cls(like) if isinstance(like, str) else like
        budget = like.block().parameters
        narrowest = cardinality * _path_parameters(1)
        if narrowest > budget:
            raise ConfigError(
                f"no template of cardinality {cardinality} costs as little as {like}: a block of "
                f"{cardinality}x1d has {narrowest:,} parameters, one of {like} {budget:,} "
                f"(largest cardinality that fits: {budget // _path_parameters(1)})."
            )
        # The real width at which 9dd + 512d = budget / C, rounded down, and the next.
        exact = math.sqrt(_RES2_CHANNELS**2 + 9 * budget / cardinality) - _RES2_CHANNELS
        below = max(int(exact / 9), 1)
        differences = {
            width: abs(cardinality * _path_parameters(width) - budget)
            for width in (below, below + 1)
        }
        return cls.of(cardinality, min(differences, key=lambda width: differences[width]))

    def block(self, height: int = 224, width: int = 224) -> Cost:
        """Return the cost of one block of res2, as Table 2 gives it.

        Eq. 4 (section 3.4): C * (256d + 3*3*d*d + 256d) parameters, without norms and shortcut:
        70,144 for 32x4d, 69,632 for 1x64d. Each works at every place of the map, 56 x 56 for
        Table 2's image.

        Args:
            height: of the image, in pixels.
            width: of the image, in pixels.

        Raises:
            ConfigError: the size is not that of an image.
        """
        check_size(height, width)
        parameters = self.cardinality * _path_parameters(self.width)
        return Cost(parameters, parameters * _halved(_halved(height)) * _halved(_halved(width)))

    def network(
        self, depth: int, height: int = 224, width: int = 224, num_classes: int = 1000
    ) -> Cost:
        """Return the cost of the whole classifier of Table 1, without building it.

        Convolutions without bias, each with a batch norm of two parameters a channel; projections
        where a stage begins; its stride in the 3x3 convolution (section 4).

        Args:
            depth: 26, 50, 101, 152 or 200 layers.
            height: of the image, in pixels.
            width: of the image, in pixels.
            num_classes: of the classifier.

        Raises:
            ConfigError: the depth is unknown, or the size none of an image.
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
        """Return the channels of the 3x3 convolution in a stage.

        Args:
            stage: 2 to 5, for res2 to res5.

        Returns:
            C * d in res2, doubled with each later stage (paper, section 3.1, rule ii).

        Raises:
            ConfigError: the stage is not 2 to 5.
        """
        if stage not in (2, 3, 4, 5):
            raise ConfigError(f"there is no stage {stage}: a ResNeXt has stages 2, 3, 4 and 5.")
        return self.cardinality * self.width << (stage - 2)


def blocks_per_stage(depth: int) -> tuple[int, int, int, int]:
    """Return how many blocks res2 to res5 have at a depth.

    Raises:
        ConfigError: the depth is not one of 26, 50, 101, 152, 200.
    """
    if depth in BLOCKS_PER_STAGE:
        return BLOCKS_PER_STAGE[depth]
    known = ", ".join(str(each) for each in BLOCKS_PER_STAGE)
    below = [each for each in BLOCKS_PER_STAGE if each < depth]
    above = [each for each in BLOCKS_PER_STAGE if each > depth]
    nearest = " or ".join(str(each) for each in (*below[-1:], *above[:1]))
    reason = ""
    if depth in (18, 34):
        reason = (
            " ResNet-18 and ResNet-34 are made of blocks of two layers, where grouping gains "
            "nothing (paper, section 3.3); use Detectron2's build_resnet_backbone for them."
        )
    raise ConfigError(
        f"MODEL.RESNETS.DEPTH is {depth}; a ResNeXt has depth {known} (nearest: {nearest}).{reason}"
    )


def check_size(height: int, width: int) -> None:
    """Refuse the size of an image, in pixels, that no network of this kind takes.

    Raises:
        ConfigError: a side is shorter than 32, the stride of res5, or longer than 65,536 pixels.
    """
    nearest = [min(max(side, _SIDES[0]), _SIDES[1]) for side in (height, width)]
    if [height, width] != nearest:
        raise ConfigError(
            f"an image of {height} x {width} pixels is refused: each side must have {_SIDES[0]}, "
            f"the stride of res5, to {_SIDES[1]} pixels (nearest: {nearest[0]} x {nearest[1]})."
        )


def _path_parameters(width: int) -> int:
    """Return the parameters of one path of width d (Eq. 4)."""
    return 2 * _RES2_CHANNELS * width + 9 * width * width


def _halved(side: int) -> int:
    """Return the side after a stride of 2; every strided layer is padded so that it rounds up."""
    return (side + 1) // 2


def _convolution(inputs: int, outputs: int, kernel: int, places: int, groups: int = 1) -> Cost:
    """Return the cost of a convolution and its norm that works at so many places of a map."""
    weights = kernel * kernel * (inputs // groups) * outputs
    return Cost(weights + 2 * outputs, weights * places)


def _check_cardinality(cardinality: int) -> None:
    if not 1 <= cardinality <= _WIDEST:
        nearest = min(max(cardinality, 1), _WIDEST)
        raise ConfigError(
            f"the cardinality is {cardinality}; it must be 1 to {_WIDEST} (nearest: {nearest})."
        )


def _within_limits(digits: str) -> int:
    """Return the number, brought to 1 to 4096."""
    # int() itself refuses thousands of digits, with an error of its own.
    digits = digits.lstrip("0")[:8]
    return min(max(int(digits or 0), 1), _WIDEST)


def _suggestion(notation: str) -> str:
    """Return what was probably meant by a notation that cannot be read, as a sentence."""
    notation = notation[:80]
    if likely := _LIKELY.search(notation):
        cardinality, width = (_within_limits(digits) for digits in likely.groups())
        return f"did you mean {cardinality}x{width}d?"
    numbers = re.findall("[1-9][0-9]*d?", notation)
    # A number alone is a cardinality, "4d" alone a width.
    alone = rf"(^|x){numbers[0]}(x|$)" if len(numbers) == 1 else r"\Z\A."
    close = [each for each in _KNOWN if re.search(alone, each)][:2]
    close = close or difflib.get_close_matches(notation.lower(), _KNOWN, n=1, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are, for example, {', '.join(_KNOWN[:3])}."
