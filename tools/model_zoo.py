"""Write docs/model_zoo.md from the shipped configs and docs/zoo.yaml.

    python tools/model_zoo.py          write it
    python tools/model_zoo.py --check  exit with 1 if it is out of date

Builds every detector to count its parameters: half a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
COCO_IMAGES = 118_287  # train2017
HEAD = """# Model zoo

`tools/model_zoo.py` writes this page from the shipped configs and `docs/zoo.yaml`. Nothing was
trained on COCO here: all AP on COCO below were published by others.

FrozenBN has no parameters. Multiply-adds are those of convolutions and linear layers for one image
at test size, with the config's number of proposals. Epochs are passes over the 118,287 images of
train2017 or over the toy images.
"""


def config_rows(zoo: dict[str, Any]) -> list[dict[str, object]]:
    """Return a row for each shipped config, from its built detector."""
    from tqdm import tqdm

    from resnext_det import model_zoo
    from resnext_det_cli.complexity import config_complexity

    rows: list[dict[str, object]] = []
    totals: dict[str, Any] = {}  # several configs have the same model
    for name in tqdm(model_zoo.names(), desc="counting", unit="config", leave=False, disable=None):
        cfg = model_zoo.get_config(name)
        solver, resnets, key = cfg.SOLVER, cfg.MODEL.RESNETS, cfg.MODEL.dump()
        if key not in totals:
            totals[key] = config_complexity(cfg).total
        network = f"{resnets.DEPTH} {resnets.NUM_GROUPS}x{resnets.WIDTH_PER_GROUP}d"
        rates = [f"{solver.BASE_LR:g}"]
        for number, step in enumerate(solver.STEPS, start=1):
            rates.append(f"{solver.BASE_LR * solver.GAMMA**number:g} at {step:,}")
        images = 1000 if "toy" in cfg.DATASETS.TRAIN[0] else COCO_IMAGES
        rows.append(
            {
                "config": f"`{name}`",
                "network": network,
                "parameters": f"{totals[key].parameters:,}",
                "multiply-adds": f"{totals[key].multiply_adds / 1e9:.2f} G",
                "batch": solver.IMS_PER_BATCH,
                "learning rate": ", ".join(rates),
                "iterations": f"{solver.MAX_ITER:,}",
                "epochs": f"{solver.MAX_ITER * solver.IMS_PER_BATCH / images:.1f}",
                "start from": zoo["start_from"].get(network, "weights of `make demo`"),
            }
        )
    return rows


def published_rows(zoo: dict[str, Any]) -> list[dict[str, object]]:
    """Return the published results, by network and then as listed."""
    notes = list(zoo["notes"])
    return [
        {
            "network": f"{row['depth']} {row['template']}",
            "published by": ", ".join(str(row[key]) for key in ("by", "id") if key in row),
            "neck": row["neck"],
            "schedule": row["schedule"],
            "AP": row["AP"],
            "AP50": row.get("AP50", ""),
            "from": row["weights"],
            "note": 1 + notes.index(row["note"]) if "note" in row else "",
        }
        for row in sorted(zoo["published"], key=lambda row: (row["depth"], row["template"]))
    ]


def page(zoo: dict[str, Any]) -> str:
    """Return the whole page."""
    from tabulate import tabulate

    def table(rows: Sequence[dict[str, object]]) -> str:
        return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)

    notes = (f"{number}. {note}" for number, note in enumerate(zoo["notes"].values(), start=1))
    parts = [
        *(HEAD, "## Shipped configs\n", table(config_rows(zoo))),
        *("\n## Published results on COCO minival\n", table(published_rows(zoo)), ""),
        *(*notes, "\n## Measured here\n", table(zoo["measured"])),
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write or compare the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check

    import yaml

    from resnext_det.errors import reported
    from resnext_det.files import write_text

    with reported():
        text = page(yaml.safe_load((DOCS / "zoo.yaml").read_text(encoding="utf-8")))
    target = DOCS / "model_zoo.md"
    if not check:
        write_text(target, text)
        print(f"Wrote {target}")
    elif not target.is_file() or target.read_text(encoding="utf-8") != text:
        sys.exit(f"{target} is out of date: run python tools/model_zoo.py")


if __name__ == "__main__":
    main()
