"""Convert a checkpoint of a ResNeXt into a .pkl that stock Detectron2 loads.

Usage: python tools/convert_weights.py SOURCE OUTPUT.pkl [--form grouped]

SOURCE is a backbone in any layout that the README names. With --form it may be a whole
detector as well; its blocks are given that form, and everything else stays as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det.errors import reported
from resnext_det.modeling.blocks import BLOCKS
from resnext_det.pretrained.convert import (
    convert_detector,
    holds_backbone,
    read_backbone,
    write_detectron2,
)


def main() -> None:
    """Parse the arguments, convert, print what was converted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the checkpoint to read")
    parser.add_argument("output", type=Path, help="the file to write, ending in .pkl")
    parser.add_argument("--form", choices=sorted(BLOCKS), help="of the blocks (default: grouped)")
    arguments = parser.parse_args()
    with reported():
        if arguments.form and not holds_backbone(arguments.source):
            count = convert_detector(arguments.source, arguments.output, arguments.form)
            print(f"{count} tensors, blocks in the form {arguments.form}: {arguments.output}")
            return
        weights = read_backbone(arguments.source)
        write_detectron2(weights, arguments.output, arguments.form or "grouped")
    left_out = ", ".join(weights.left_out) or "nothing"
    print(
        f"{weights} ({weights.layout} layout): {len(weights.tensors)} tensors converted, "
        f"left out: {left_out}. Wrote {arguments.output}\n"
        f"It takes images as {weights.pixels or 'the source did: the file does not say'}"
        f"{'; its batch norms are folded, for FrozenBN alone' if weights.fused else ''}."
    )


if __name__ == "__main__":
    main()
