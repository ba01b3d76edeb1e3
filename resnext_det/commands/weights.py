"""`resnext-det weights`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from typing import Any

from tabulate import tabulate

from resnext_det.errors import reported
from resnext_det.weights.catalog import ENTRIES, Entry, entry

HEADERS = ("name", "network", "top-1 %", "licence", "ImageNet-1K only", "batch norms")
UNTRIED = (
    "Facts are those of the publishers; no address was tried and no file opened for this list."
)


def row(known: Entry) -> tuple[str, ...]:
    """Return one line of the table."""
    return (
        known.name,
        f"{known.depth} {known.template}",
        f"{known.accuracy.top1:.2f}" if known.accuracy else "-",
        known.licence if known.commercial else f"{known.licence}, non-commercial",
        "yes" if known.imagenet_1k_only else "no",
        known.batch_norm,
    )


def everything(known: Entry) -> str:
    """Return all that is known of a checkpoint, a line for each fact."""
    facts = {"weights": f"resnext://{known.name}", "network": f"{known.depth} {known.template}"}
    for field in fields(known)[1:]:
        value = getattr(known, field.name)
        if field.name == "accuracy" and value is not None:
            value = (
                f"top-1 {value.top1:g} %, top-5 {value.top5 or '-'} %, {value.source} (resize "
                f"{value.resize or '-'}, crop {value.crop}, {value.interpolation or '-'})"
            )
        if isinstance(value, tuple):
            value = "\n".join(value)
        if isinstance(value, bool):
            value = "yes" if value else "no"
        facts[field.name.replace("_", " ")] = str(value or "-")
    return tabulate(
        facts.items(),
        tablefmt="plain",
        maxcolwidths=[None, 80],
        disable_numparse=True,
        break_long_words=False,  # addresses are there to be copied
        break_on_hyphens=False,
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the table, or everything about one entry."""
    with reported():
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
        documents = [document(known) for known in shown]
        print(json.dumps(documents[0] if arguments.name else documents, indent=2))
        return
    if arguments.name:
        print(everything(shown[0]))
    else:
        print(tabulate(map(row, shown), headers=HEADERS, disable_numparse=True))
    print(f"\n{UNTRIED}")


def document(known: Entry) -> dict[str, Any]:
    """Return all that is known of a checkpoint for a program."""
    return {
        **asdict(known),
        "weights": f"resnext://{known.name}",
        "depth": known.depth,
        "template": str(known.template),
        "note": UNTRIED,
    }
