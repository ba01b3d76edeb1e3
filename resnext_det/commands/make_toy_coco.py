"""`resnext-det make-toy-coco`."""

from __future__ import annotations

import argparse
import dataclasses

from resnext_det.data.registered import TOY_FOLDER, datasets_root
from resnext_det.data.toy import ToySpec, write_toy_coco
from resnext_det.errors import reported


def run(arguments: argparse.Namespace) -> None:
    """Write the data set, print where it is."""
    given = {name: value for name, value in vars(arguments).items() if name != "output"}
    output = arguments.output or datasets_root() / TOY_FOLDER
    with reported():
        write_toy_coco(output, dataclasses.replace(ToySpec(), **given))
    print(f"Toy COCO: {output}")
