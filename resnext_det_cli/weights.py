"""List the ImageNet weights that MODEL.WEIGHTS resnext://NAME downloads.

    %(prog)s
    %(prog)s --commercial --imagenet-1k-only
    %(prog)s resnext50_32x4d.tv_in1k     all that is known about one of them
    %(prog)s --json                      the same for all, for a program

This downloads nothing.
"""

from __future__ import annotations

import argparse
from typing import Any

from resnext_det_cli import flags

HEADERS = ("name", "network", "top-1 %", "licence", "ImageNet-1K only", "batch norms")
UNTRIED = "These are the publishers' facts; no file was downloaded to check them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="of one checkpoint")
    parser.add_argument(
        "--commercial", action="store_true", help="only those whose licence allows commercial use"
    )
    parser.add_argument(
        "--imagenet-1k-only", action="store_true", help="only those trained on no other images"
    )
    flags.add_json(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.name and (arguments.commercial or arguments.imagenet_1k_only):
        parser.error("NAME shows one checkpoint, and the filters are for the list")


def run(arguments: argparse.Namespace) -> None:
    """Print the table, or all about one entry."""
    import json
    from dataclasses import asdict

    from tabulate import tabulate

    from resnext_det.weights.catalog import ENTRIES, entry

    if arguments.name:
        shown = [entry(arguments.name.removeprefix("resnext://"))]
    else:
        shown = [
            known
            for known in ENTRIES.values()
            if (known.commercial or not arguments.commercial)
            and (known.imagenet_1k_only or not arguments.imagenet_1k_only)
        ]
    if arguments.json:
        documents = [
            {
                **asdict(known),
                "weights": f"resnext://{known.name}",
                "depth": known.depth,
                "template": str(known.template),
                "note": UNTRIED,
            }
            for known in shown
        ]
        print(json.dumps(documents[0] if arguments.name else documents, indent=2))
        return
    if arguments.name:
        layout: dict[str, Any] = {"tablefmt": "plain", "maxcolwidths": [None, 80]}
        layout |= {"break_long_words": False, "break_on_hyphens": False}  # of addresses to copy
        print(tabulate(_facts(shown[0]).items(), disable_numparse=True, **layout))
    else:
        print(tabulate(map(_row, shown), headers=HEADERS, disable_numparse=True))
    print(f"\n{UNTRIED}")


def _row(known: Any) -> tuple[str, ...]:
    return (
        known.name,
        f"{known.depth} {known.template}",
        f"{known.accuracy.top1:.2f}" if known.accuracy else "-",
        known.licence if known.commercial else f"{known.licence}, non-commercial",
        "yes" if known.imagenet_1k_only else "no",
        known.batch_norm,
    )


def _facts(known: Any) -> dict[str, str]:
    """Return all that is known about a checkpoint, as text."""
    facts = {"weights": f"resnext://{known.name}", "network": f"{known.depth} {known.template}"}
    for name, value in vars(known).items():
        if name == "name":
            continue
        if name == "accuracy" and value is not None:
            value = (
                f"top-1 {value.top1:g} %, top-5 {value.top5 or '-'} %, {value.source} (resize "
                f"{value.resize or '-'}, crop {value.crop}, {value.interpolation or '-'})"
            )
        elif isinstance(value, tuple):
            value = "\n".join(value)
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        facts[name.replace("_", " ")] = str(value or "-")
    return facts
