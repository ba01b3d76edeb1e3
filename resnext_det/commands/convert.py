"""`resnext-det convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from resnext_det.errors import ResNeXtError, WeightsError, named, reported
from resnext_det.weights.catalog import Entry, of_file
from resnext_det.weights.converting import (
    convert_detector,
    holds_backbone,
    read_backbone,
    write_detectron2,
)
from resnext_det.weights.verifying import Program, image_of, verify


def run(arguments: argparse.Namespace) -> None:
    """Convert, print what was converted, and prove it."""
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
    program: Program = arguments.program or "torchvision"
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
