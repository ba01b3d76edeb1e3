"""Convert a checkpoint of a ResNeXt into a .pkl that stock Detectron2 loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det.errors import reported
from resnext_det.pretrained.convert import read_backbone, write_detectron2


def main() -> None:
    """Parse the arguments, convert, print what was converted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a checkpoint in torchvision's layout")
    parser.add_argument("output", type=Path, help="the file to write, ending in .pkl")
    arguments = parser.parse_args()
    with reported():
        weights = read_backbone(arguments.source)
        write_detectron2(weights, arguments.output)
    left_out = ", ".join(weights.left_out) or "nothing"
    print(
        f"{weights} ({weights.layout} layout): {len(weights.tensors)} tensors converted, "
        f"left out: {left_out}. Wrote {arguments.output}"
    )


if __name__ == "__main__":
    main()
