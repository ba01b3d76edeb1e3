"""The paper's figures of complexity (arXiv 1611.05431v2), and why a count differs from them."""

from __future__ import annotations

from dataclasses import dataclass

_CUT_OFF = "the paper's 25.5 million parameters are 25.56 million cut off, not rounded"
_ONE_FIGURE = (
    "Table 3 gives one rough figure for all five templates. Equal blocks in res2 (Table 2) are not "
    "equal networks: where a stage begins, the 1x1 before the 3x3 with the stride works on the "
    "larger map, and it is wider the higher the cardinality. This costs multiply-adds, and no "
    "parameters"
)
_ROUNDED_UP = (
    "8x14d costs most of the five: a width of 13.7 would preserve the block's complexity, and 14 "
    "has 2.6% more"
)
_PRE_ACTIVATION = (
    "the paper's ResNet-200 is the pre-activation one (He et al., 2016); this package builds, and "
    "counts here, the same blocks with the activation behind"
)
_NOT_IN_THE_PAPER = "32x8d is no template of the paper; it is Detectron2's X-101"


@dataclass(frozen=True)
class Published:
    """What the paper says that a block or a network costs.

    Attributes:
        table: the paper's table, or None for a template that is not in the paper.
        depth: of the network, or None for a block of res2.
        template: such as "32x4d".
        parameters: as printed, or None where the table has none.
        multiply_adds: as printed ("FLOPs"), at 224 x 224, or None where the table has none.
        differences: why a count differs from the figure by more than its last digit, or is no
            count of the same thing.
    """

    table: int | None
    depth: int | None
    template: str
    parameters: float | None
    multiply_adds: float | None
    differences: tuple[str, ...] = ()


PUBLISHED = (
    # Table 1, last row: "# params" and "FLOPs".
    Published(1, 50, "1x64d", 25.5e6, 4.1e9, (_CUT_OFF,)),
    Published(1, 50, "32x4d", 25.0e6, 4.2e9),
    # Table 2, caption: ~70k parameters and ~0.22 billion FLOPs for the template of conv2.
    Published(2, None, "1x64d", 70e3, 0.22e9),
    Published(2, None, "2x40d", 70e3, 0.22e9),
    Published(2, None, "4x24d", 70e3, 0.22e9),
    Published(2, None, "8x14d", 70e3, 0.22e9, (_ROUNDED_UP,)),
    Published(2, None, "32x4d", 70e3, 0.22e9),
    # Table 3, caption: ~4.1 billion FLOPs at 50 layers, ~7.8 billion at 101.
    Published(3, 50, "1x64d", None, 4.1e9),
    Published(3, 50, "2x40d", None, 4.1e9),
    Published(3, 50, "4x24d", None, 4.1e9, (_ONE_FIGURE,)),
    Published(3, 50, "8x14d", None, 4.1e9, (_ONE_FIGURE, _ROUNDED_UP)),
    Published(3, 50, "32x4d", None, 4.1e9, (_ONE_FIGURE,)),
    Published(3, 101, "1x64d", None, 7.8e9),
    Published(3, 101, "2x40d", None, 7.8e9),
    Published(3, 101, "4x24d", None, 7.8e9, (_ONE_FIGURE,)),
    Published(3, 101, "8x14d", None, 7.8e9, (_ONE_FIGURE, _ROUNDED_UP)),
    Published(3, 101, "32x4d", None, 7.8e9, (_ONE_FIGURE,)),
    # Table 4, its lower half, and section 5.1: ~15 billion FLOPs.
    Published(4, 200, "1x64d", None, 15e9, (_PRE_ACTIVATION,)),
    Published(4, 101, "1x100d", None, 15e9),
    Published(4, 101, "2x64d", None, 15e9),
    Published(4, 101, "64x4d", None, 15e9),
    Published(None, 101, "32x8d", None, None, (_NOT_IN_THE_PAPER,)),
)
"""Tables 1 to 4 as printed; those of Tables 2, 3 and 4 with the paper's "~" left out."""
