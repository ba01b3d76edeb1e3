"""Write docs/model_zoo.md from the shipped configs and docs/zoo.yaml.

    python tools/model_zoo.py          write it
    python tools/model_zoo.py --check  exit with 1 if it is out of date

Builds every config's detector to count its parameters: about a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--check", action="store_true", help="write nothing, compare")
if __name__ == "__main__":
    arguments = parser.parse_args()  # answers --help before torch and Detectron2 are imported

import yaml  # noqa: E402
from tabulate import tabulate  # noqa: E402
from tqdm import tqdm  # noqa: E402

from resnext_det import model_zoo  # noqa: E402
from resnext_det.files import write_text  # noqa: E402
from resnext_det_cli.complexity import config_complexity  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs"
COCO_IMAGES = 118_287  # train2017
HEAD = """# Model zoo

`tools/model_zoo.py` writes this page from the shipped configs and `docs/zoo.yaml`. Nothing was
trained on COCO here: every AP on COCO below was published by somebody else.

Parameters exclude FrozenBN, which has none. Multiply-adds are those of convolutions and linear
layers for one image at test size, with the config's number of proposals. Epochs are passes over
the 118,287 images of train2017, or over the toy images.
"""


def config_rows(zoo: dict[str, Any]) -> Iterator[dict[str, object]]:
    """Yield a row for each shipped config, from its built detector."""
    for name in tqdm(
        model_zoo.names(), desc="counting", unit="config", delay=2, leave=False, disable=None
    ):
        cfg = model_zoo.get_config(name)
        solver, resnets = cfg.SOLVER, cfg.MODEL.RESNETS
        network = f"{resnets.DEPTH} {resnets.NUM_GROUPS}x{resnets.WIDTH_PER_GROUP}d"
        cost = config_complexity(cfg)
        rates = (f"{solver.BASE_LR * solver.GAMMA**n:g}" for n in range(1 + len(solver.STEPS)))
        drops = (f" at {step:,}" for step in ("", *solver.STEPS) if step)
        images = 1000 if "toy" in cfg.DATASETS.TRAIN[0] else COCO_IMAGES
        yield {
            "config": f"`{name}`",
            "network": network,
            "parameters": f"{cost.total.parameters:,}",
            "multiply-adds": f"{cost.total.multiply_adds / 1e9:.2f} G",
            "batch": solver.IMS_PER_BATCH,
            "learning rate": ", ".join(rate + drop for rate, drop in zip(rates, ("", *drops))),
            "iterations": f"{solver.MAX_ITER:,}",
            "epochs": f"{solver.MAX_ITER * solver.IMS_PER_BATCH / images:.1f}",
            "start from": zoo["start_from"].get(network, "weights of `make demo`"),
        }


def published_rows(zoo: dict[str, Any]) -> Iterator[dict[str, object]]:
    """Yield the published results, by network and then as listed."""
    notes = list(zoo["notes"])
    for row in sorted(zoo["published"], key=lambda row: (row["depth"], row["template"])):
        yield {
            "network": f"{row['depth']} {row['template']}",
            "published by": ", ".join(str(row[key]) for key in ("by", "id") if key in row),
            "neck": row["neck"],
            "schedule": row["schedule"],
            "AP": row["AP"],
            "AP50": row.get("AP50", ""),
            "from": row["weights"],
            "note": 1 + notes.index(row["note"]) if "note" in row else "",
        }


def page(zoo: dict[str, Any]) -> str:
    """Return the whole page."""

    def table(rows: Iterator[dict[str, object]] | list[dict[str, object]]) -> str:
        return tabulate(list(rows), headers="keys", tablefmt="pipe", disable_numparse=True)

    notes = (f"{number}. {note}" for number, note in enumerate(zoo["notes"].values(), start=1))
    parts = [
        *(HEAD, "## Shipped configs\n", table(config_rows(zoo))),
        *("\n## Published results on COCO minival\n", table(published_rows(zoo)), ""),
        *(*notes, "\n## Measured here\n", table(zoo["measured"])),
    ]
    return "\n".join(parts) + "\n"


def main(check: bool) -> None:
    """Write or compare the page."""
    text = page(yaml.safe_load((DOCS / "zoo.yaml").read_text(encoding="utf-8")))
    target = DOCS / "model_zoo.md"
    if not check:
        write_text(target, text)
        print(f"Wrote {target}")
    elif not target.is_file() or target.read_text(encoding="utf-8") != text:
        sys.exit(f"{target} is out of date: run python tools/model_zoo.py")


if __name__ == "__main__":
    main(arguments.check)
