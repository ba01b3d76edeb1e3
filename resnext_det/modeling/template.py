"""The paper's template: a cardinality and a width, written 32x4d."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from resnext_det.errors import ConfigError

BLOCKS_PER_STAGE: dict[int, tuple[int, int, int, int]] = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
"""Blocks in res2 to res5 by depth. 50 and 101: paper, Table 1 and section 5.1; 152 and 200: He et
al., "Deep Residual Learning" and "Identity Mappings"; 26: half of a ResNet-50, as timm has it."""

_NOTATION = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)d")
_WIDEST = 4096


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
                f"template {self.notation!r} cannot be read. A template is written CxDd, "
                'cardinality C and width d of a path, such as "32x4d", "64x4d" or "1x64d".'
            )
        longest = max(len(match[1]), len(match[2]))
        # int() itself refuses thousands of digits, with an error of its own.
        if longest > 4 or max(int(match[1]), int(match[2])) > _WIDEST:
            raise ConfigError(
                f"template {self.notation!r} is wider than anything that can be built: cardinality "
                f"and width may be at most {_WIDEST}."
            )
        object.__setattr__(self, "cardinality", int(match[1]))
        object.__setattr__(self, "width", int(match[2]))

    def __str__(self) -> str:
        return self.notation

    @classmethod
    def of(cls, cardinality: int, width: int) -> Template:
        """Return the template with this cardinality C and this width d of a path in res2."""
        return cls(f"{cardinality}x{width}d")

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
    nearest = min(BLOCKS_PER_STAGE, key=lambda each: abs(each - depth))
    reason = ""
    if depth in (18, 34):
        reason = (
            " ResNet-18 and ResNet-34 are made of blocks of two layers, where grouping gains "
            "nothing (paper, section 3.3); use Detectron2's build_resnet_backbone for them."
        )
    raise ConfigError(
        f"MODEL.RESNETS.DEPTH is {depth}; a ResNeXt has depth {known} (nearest: {nearest}).{reason}"
    )
