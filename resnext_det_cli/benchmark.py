"""Measure this package beside stock Detectron2, torchvision and OpenVINO.

    %(prog)s --output output/speed                       everything, some 20 minutes
    %(prog)s inference training --output output/speed    two sections
    %(prog)s --output output/speed --page page.md        no run: write the page of the last one

Sections: inference, training, roi_align, loader, classification, evaluation, artifacts, roofline,
growth. Contenders take turns, and peak memory is measured in fresh processes. Results go to
OUTPUT/benchmark.json; sections that an earlier run with the same settings measured stay there.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

SECTIONS = (
    *("inference", "training", "roi_align", "loader", "classification"),
    *("evaluation", "artifacts", "roofline", "growth"),
)
CONFIG = "faster_rcnn_X_50_32x4d_FPN_paper"
QUICK_CONFIG = "faster_rcnn_X_26_8x4d_FPN_toy"
# As wide as torchvision builds it.
QUICK_OVERRIDES = (
    "MODEL.RESNETS.STEM_OUT_CHANNELS",
    "64",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "256",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "opts", nargs="*", metavar="SECTION or KEY VALUE", help="sections, then config overrides"
    )
    parser.add_argument(
        "--config-file", metavar="FILE", help=f"or the name of a shipped config (default: {CONFIG})"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the JSON")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed (default: 7)")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="of JPEG files for the loader"
    )
    parser.add_argument("--quick", action="store_true", help="try it out on tiny inputs")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="write the page, run nothing")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    words = arguments.opts
    count = next((n for n, word in enumerate(words) if word not in SECTIONS), len(words))
    arguments.sections = list(dict.fromkeys(words[:count])) or list(SECTIONS)
    arguments.opts = words[count:]
    if arguments.opts and "." not in arguments.opts[0] and arguments.opts[0].islower():
        parser.error(f"no section {arguments.opts[0]!r}: choose from {', '.join(SECTIONS)}")
    if arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if arguments.page and words:
        parser.error(f"--page runs nothing, and takes no {words[0]!r}")


def run(arguments: argparse.Namespace) -> None:
    """Measure the sections and print their tables, or write the page."""
    from resnext_det.benchmark.measure import QUICK, Setup, Sizes
    from resnext_det.benchmark.page import growth_figure, text, write_page
    from resnext_det.benchmark.results import FILE, Results, machine
    from resnext_det.benchmark.sections import SECTIONS as FUNCTIONS
    from resnext_det.config import load_config
    from resnext_det.environment import keep_freed_memory
    from resnext_det.files import check_writable, write_bytes

    file = arguments.output / FILE
    if arguments.page:
        write_page(Results.read(file), arguments.page)
        print(f"Page: {arguments.page}")
        return
    check_writable(arguments.output, "--output")
    quick = arguments.quick
    config = arguments.config_file or (QUICK_CONFIG if quick else CONFIG)
    overrides = [*(QUICK_OVERRIDES if quick and not arguments.config_file else ()), *arguments.opts]
    cfg = load_config(config, overrides)
    words = ["resnext-det", "benchmark", "--config-file", config, "--rounds", arguments.rounds]
    settings = {
        "command": shlex.join([*map(str, words), *["--quick"] * quick, *overrides]),
        "config": Path(config).stem,
        "weights": Path(cfg.MODEL.WEIGHTS).name,
        "images": arguments.images.name if arguments.images else "generated",
        "rounds": arguments.rounds,
        "quick": quick,
    }
    results = Results(machine(), settings, {}, {})
    if file.exists():
        earlier = Results.read(file)
        if (earlier.machine, earlier.settings) == (results.machine, settings):
            results = earlier
        else:
            print(f"{file} is of another machine or other settings, and is replaced.")
    keep_freed_memory()  # for all contenders of the sections that run in this process
    setup = Setup(cfg, arguments.rounds, QUICK if quick else Sizes(), arguments.images)
    for name in arguments.sections:
        tables = FUNCTIONS[name](setup)
        results = results.adding(name, tables)
        results.write(file)
        for table in tables:
            print(f"\n{table.title}\n\n{text(table)}")
    if picture := growth_figure(results):
        write_bytes(arguments.output / "growth.png", picture)
    print(f"\nResults: {file}")
