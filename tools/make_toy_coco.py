"""Write the toy data set: seeded images and annotations in COCO's layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det.data.registered import TOY_FOLDER, datasets_root
from resnext_det.data.toy import ToySpec, write_toy_coco
from resnext_det.errors import reported


def main() -> None:
    """Parse the arguments, write, print where it is."""
    usual = ToySpec()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=datasets_root() / TOY_FOLDER)
    parser.add_argument("--train-images", type=int, default=usual.train_images)
    parser.add_argument("--val-images", type=int, default=usual.val_images)
    parser.add_argument("--seed", type=int, default=usual.seed)
    arguments = parser.parse_args()
    spec = ToySpec(arguments.train_images, arguments.val_images, seed=arguments.seed)
    with reported():
        write_toy_coco(arguments.output, spec)
    print(f"Toy COCO: {arguments.output}")


if __name__ == "__main__":
    main()
