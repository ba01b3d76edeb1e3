"""List the ImageNet weights that MODEL.WEIGHTS resnext://NAME fetches.

python tools/list_weights.py [--commercial] [--imagenet-1k-only]
python tools/list_weights.py NAME     everything that is known of one of them
"""

from __future__ import annotations

import argparse
from dataclasses import fields

from tabulate import tabulate

from resnext_det.errors import reported
from resnext_det.pretrained.catalog import ENTRIES, Entry, entry

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


def main() -> None:
    """Parse the arguments, print the table or one entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of one checkpoint")
    parser.add_argument("--commercial", action="store_true", help="only those that allow it")
    parser.add_argument(
        "--imagenet-1k-only", action="store_true", help="only those that saw no other images"
    )
    arguments = parser.parse_args()
    if arguments.name and (arguments.commercial or arguments.imagenet_1k_only):
        parser.error("NAME shows one checkpoint, and the filters are for the list of all")
    with reported():
        if arguments.name:
            print(everything(entry(arguments.name.removeprefix("resnext://"))))
        else:
            shown = [
                row(known)
                for known in ENTRIES.values()
                if (known.commercial or not arguments.commercial)
                and (known.imagenet_1k_only or not arguments.imagenet_1k_only)
            ]
            print(tabulate(shown, headers=HEADERS, disable_numparse=True))
    print(f"\n{UNTRIED}")


if __name__ == "__main__":
    main()
