"""`resnext-det pretrain-toy`."""

from __future__ import annotations

import argparse
import dataclasses

from resnext_det.data.registered import TOY_FOLDER, datasets_root
from resnext_det.engine.pretraining import PretrainingPlan, pretrain
from resnext_det.errors import reported


def run(arguments: argparse.Namespace) -> None:
    """Train, print how many crops are classified right."""
    given = {name: vars(arguments)[name] for name in ("updates", "seed") if name in arguments}
    data = arguments.data or datasets_root() / TOY_FOLDER
    with reported():
        right = pretrain(data, arguments.output, dataclasses.replace(PretrainingPlan(), **given))
    print(f"{right:.1%} of the crops never trained on are classified right: {arguments.output}")
