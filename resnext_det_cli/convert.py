"""Convert a ResNeXt checkpoint into a .pth that stock Detectron2 loads.

    %(prog)s resnext50_32x4d.pth resnext50_d2.pth --verify
    %(prog)s resnext50_32x4d.pth resnext50_d2.pth --form concatenated
    %(prog)s model_final.pth detector.pth --form grouped

SOURCE is a backbone in any layout that docs/weights.md lists. With --form it may also be a whole
detector: its blocks are rewritten in that form, everything else is kept.

--verify then runs one image through OUTPUT and through the source's own network, of torchvision or
timm, and compares all stages. If they differ, it removes OUTPUT and fails. It also fails if the
library has no such network.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FORMS = ("aggregated", "concatenated", "grouped")
PROGRAMS = ("torchvision", "timm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help="the checkpoint to read")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the .pth file to write")
    parser.add_argument("--form", choices=FORMS, help="of the blocks (default: grouped)")
    parser.add_argument("--verify", action="store_true", help="compare with the source's network")
    parser.add_argument(
        "--with",
        dest="program",
        choices=PROGRAMS,
        help="library that builds the source's network (default: torchvision)",
    )
    parser.add_argument("--image", type=Path, help="to compare on (default: a generated one)")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if (arguments.program or arguments.image) and not arguments.verify:
        parser.error("--with and --image are for --verify")


def run(arguments: argparse.Namespace) -> None:
    """Convert, print what was converted, and verify it."""
    from resnext_det.errors import WeightsError, named
    from resnext_det.weights import catalog, converting

    source, output, form = arguments.source, arguments.output, arguments.form
    if form and not converting.holds_backbone(source):
        count = converting.convert_detector(source, output, form)
        print(f"{count} tensors, blocks in the form {form}: {output}", flush=True)
        if arguments.verify:
            raise WeightsError(f"{output} was written but not verified: {source} is a detector.")
        return
    known = catalog.of_file(source)
    weights = converting.read_backbone(source, known.pixels if known else None)
    converting.write_detectron2(weights, output, form or "grouped", known)
    left_out = named(weights.left_out, 8) or "nothing"
    print(
        f"{weights} ({weights.layout} layout): {len(weights.tensors)} tensors converted, "
        f"left out: {left_out}. Wrote {output}\n"
        f"It expects images as {weights.pixels or 'the source did: the file does not say'}"
        f"{'; its batch norms are folded, so use FrozenBN' if weights.fused else ''}.",
        flush=True,
    )
    if known is not None:
        print(f"It was made from {known.name} of the catalog.")
    if arguments.verify:
        _verify(arguments, known)


def _verify(arguments: argparse.Namespace, known: Any) -> None:
    """Compare the converted file with its source and print the differences."""
    from tabulate import tabulate

    from resnext_det.errors import ResNeXtError, WeightsError
    from resnext_det.weights.verifying import TOLERANCE, image_of, verify

    source, output = arguments.source, arguments.output
    pixels = known.pixels if known else None
    program: Any = arguments.program or PROGRAMS[0]
    try:
        image = None if arguments.image is None else image_of(arguments.image)
        found = verify(source, output, image, program=program, pixels=pixels)
    except ResNeXtError as error:
        raise WeightsError(f"{output} was written but not verified: {error}") from error
    rows = [
        (stage, f"{difference:.3g}", f"{largest:.4g}", f"{difference / (largest or 1):.1e}")
        for stage, (difference, largest) in found.stages.items()
    ]
    picture = arguments.image or "a generated image"
    size = f"{found.size[0]} x {found.size[1]}"
    print(f"\n{picture} ({size}) in {found.network} and in {output}:")
    print(tabulate(rows, headers=("stage", "largest difference", "largest value", "ratio")))
    if found.wrong is not None:
        output.unlink()
        raise WeightsError(
            f"{output} does not compute what {source} does in {found.network}: after {found.wrong} "
            f"they differ by more than {TOLERANCE:g} of the largest value. It was removed."
        )
    print(f"Verified: no stage differs by more than {TOLERANCE:g} of its largest value.")
