"""Pretraining in miniature: teach a small ResNeXt to classify crops of the toy shapes."""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det.data.registered import TOY_FOLDER, datasets_root
from resnext_det.engine.pretraining import PretrainingPlan, pretrain
from resnext_det.errors import reported


def main() -> None:
    """Parse the arguments, train, print how many crops are classified right."""
    usual = PretrainingPlan()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the checkpoint to write, .pth")
    parser.add_argument("--data", type=Path, default=datasets_root() / TOY_FOLDER)
    parser.add_argument("--updates", type=int, default=usual.updates)
    parser.add_argument("--seed", type=int, default=usual.seed)
    arguments = parser.parse_args()
    plan = PretrainingPlan(updates=arguments.updates, seed=arguments.seed)
    with reported():
        right = pretrain(arguments.data, arguments.output, plan)
    print(f"{right:.1%} of the crops never trained on are classified right: {arguments.output}")


if __name__ == "__main__":
    main()
