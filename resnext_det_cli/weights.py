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
        documents = list(map(_document, shown))
        print(json.dumps(documents[0] if arguments.name else documents, indent=2))
        return
    if arguments.name:
        facts = [(name.replace("_", " "), _text(v)) for name, v in _document(shown[0]).items()]
        # Long words are addresses to copy.
        layout: dict[str, Any] = {"tablefmt": "plain", "maxcolwidths": [None, 80]}
        layout |= {"break_long_words": False, "break_on_hyphens": False}
        print(tabulate(facts, disable_numparse=True, **layout))
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


def _document(known: Any) -> dict[str, Any]:
    from dataclasses import asdict

    computed = {"depth": known.depth, "template": str(known.template), "note": UNTRIED}
    return {"weights": f"resnext://{known.name}", **asdict(known), **computed}


def _text(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_text(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_text, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None or value == "" else str(value)
