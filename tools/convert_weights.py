"""Convert a checkpoint of a ResNeXt into a .pth that stock Detectron2 loads.

Usage: python tools/convert_weights.py SOURCE OUTPUT.pth [--form grouped] [--verify]

SOURCE is a backbone in any layout that the README names. With --form it may be a whole
detector as well; its blocks are given that form, and everything else stays as it is.

--verify then runs one image through the source's own network, of torchvision or timm, and
through the one that OUTPUT.pth describes, and compares all four stages. OUTPUT.pth is removed
where they differ, and stays where there is no such network to compare with: both are errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from resnext_det.errors import ResNeXtError, WeightsError, named, reported
from resnext_det.modeling.blocks import BLOCKS
from resnext_det.pretrained.catalog import Entry, of_file
from resnext_det.pretrained.converting import (
    convert_detector,
    holds_backbone,
    read_backbone,
    write_detectron2,
)
from resnext_det.pretrained.verifying import PROGRAMS, image_of, verify


def main() -> None:
    """Parse the arguments, convert, print what was converted, and prove it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the checkpoint to read")
    parser.add_argument("output", type=Path, help="the file to write, ending in .pth")
    parser.add_argument("--form", choices=sorted(BLOCKS), help="of the blocks (default: grouped)")
    parser.add_argument("--verify", action="store_true", help="compare with the source's network")
    parser.add_argument(
        "--with",
        dest="program",
        choices=PROGRAMS,
        help="whose network the source is run in (default: torchvision)",
    )
    parser.add_argument("--image", type=Path, help="to compare on (default: a generated one)")
    arguments = parser.parse_args()
    if (arguments.program or arguments.image) and not arguments.verify:
        parser.error("--with and --image are for --verify")
    source, output, form = arguments.source, arguments.output, arguments.form
    with reported():
        if form and not holds_backbone(source):
            count = convert_detector(source, output, form)
            print(f"{count} tensors, blocks in the form {form}: {output}", flush=True)
            if arguments.verify:
                raise unproven(output, f"{source} is a whole detector, not a backbone.")
            return
        known = of_file(source)
        convert(source, output, form, known)
        if arguments.verify:
            prove(arguments, known)


def convert(source: Path, output: Path, form: str | None, known: Entry | None) -> None:
    """Convert a backbone, print what was converted."""
    weights = read_backbone(source, known.pixels if known else None)
    write_detectron2(weights, output, form or "grouped", known)
    left_out = named(weights.left_out, 8) or "nothing"
    print(
        f"{weights} ({weights.layout} layout): {len(weights.tensors)} tensors converted, "
        f"left out: {left_out}. Wrote {output}\n"
        f"It takes images as {weights.pixels or 'the source did: the file does not say'}"
        f"{'; its batch norms are folded, for FrozenBN alone' if weights.fused else ''}.",
        flush=True,
    )
    if known is not None:
        print(f"It was made from {known.name} of the catalog.")


def prove(arguments: argparse.Namespace, known: Entry | None) -> None:
    """Compare the converted file with its source, print how far apart they are."""
    source, output = arguments.source, arguments.output
    program = arguments.program or "torchvision"
    pixels = known.pixels if known else None
    try:
        image = None if arguments.image is None else image_of(arguments.image)
        found = verify(source, output, image, program=program, pixels=pixels)
    except ResNeXtError as error:
        raise unproven(output, str(error)) from error
    rows = [
        (each.stage, f"{each.difference:.3g}", f"{each.largest:.4g}", f"{each.relative:.1e}")
        for each in found.stages
    ]
    picture = arguments.image or "a generated image"
    print(f"\n{picture} ({found.width} x {found.height}) in {found.network} and in {output}:")
    print(tabulate(rows, headers=("stage", "largest difference", "largest value", "ratio")))
    try:
        found.check()
    except WeightsError as error:
        output.unlink()
        raise WeightsError(f"{error} It was removed.") from error
    print(f"Verified: no stage differs by more than {found.tolerance:g} of its largest value.")


def unproven(output: Path, reason: str) -> WeightsError:
    """Return the error for a file that was written and not compared."""
    return WeightsError(f"{output} was written, but nothing is proven: {reason}")


if __name__ == "__main__":
    main()
