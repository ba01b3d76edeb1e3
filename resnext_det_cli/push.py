"""Publish an evaluated run on the Hugging Face Hub: weights, config and a model card.

    %(prog)s --run output/run --to hf:OWNER/NAME --dry-run
    %(prog)s --run output/run --to hf:OWNER/NAME --private

hf://OWNER/NAME then names the detector: in `Predictor(...)`, `eval --run` and `predict --run`, and
as MODEL.WEIGHTS. The card has the figures of RUN/inference, the training, and the licence of the
weights it started from. Logs, data and paths of this machine are not uploaded. Log in with `hf auth
login`, or set HF_TOKEN; needs huggingface_hub.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="FOLDER", help="OUTPUT_DIR of a training")
    add("--to", required=True, metavar="hf:OWNER/NAME", help="the repository, created if missing")
    add("--private", action="store_true", help="create a private repository")
    add(
        "--license",
        default="",
        metavar="ID",
        help="as the hub writes it, such as apache-2.0 (default: that of the weights the training "
        "started from)",
    )
    add("--dry-run", action="store_true", help="write the files to RUN/hub, and upload nothing")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not re.fullmatch(r"hf:(//)?[^@]*", arguments.to):
        parser.error(f"--to {arguments.to!r} must be hf:OWNER/NAME")
    if arguments.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", arguments.license):
        parser.error(f"--license {arguments.license!r} must be like apache-2.0 or cc-by-nc-4.0")


def run(arguments: argparse.Namespace) -> None:
    """Write the repository, and upload it."""
    from dataclasses import replace

    from resnext_det.errors import quoted
    from resnext_det.hub import Address, upload
    from resnext_det.report.model_card import repository

    address = Address.of(arguments.to)
    with repository(arguments.run, address, arguments.license) as files:
        for file in files:
            print(f"{file.name:18}{file.stat().st_size:17,} bytes")
        if arguments.dry_run:
            folder = arguments.run / "hub"
            folder.mkdir(exist_ok=True)
            for file in files:
                file.replace(folder / file.name)
            print(f"written to {quoted(folder)}, nothing uploaded")
            return
        commit = upload(files, address, private=arguments.private)
    print(f"uploaded to {replace(address, revision=commit)}")
