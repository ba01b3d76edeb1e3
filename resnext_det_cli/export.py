"""Export a detector to ONNX, OpenVINO or torch, and check that it detects the same.

    %(prog)s --run output/run --format openvino --output detector.xml
    %(prog)s --run output/run --format onnx --output detector.onnx --images photographs
    %(prog)s --run output/run --output detector.xml --int8 --lose-at-most 0.5

Compares the artifact with the detector on some images of the run's test set, or on those of
--images: unless every detection matches, no file is written. `resnext_det.runtime` runs it, ONNX
and OpenVINO without torch and Detectron2; `resnext-det eval --artifact` evaluates it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det_cli import flags

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2", "torchscript": ".ts"}
LOSE_AT_MOST = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_config(parser, run=True)
    listed = ", ".join(f"{suffix} for {name}" for name, suffix in FORMATS.items())
    parser.add_argument("--format", choices=FORMATS, help="(default: by the suffix of --output)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=listed)
    images = "to compare on (default: 20 of the test set)"
    parser.add_argument("--images", type=Path, metavar="FOLDER", help=images)
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX (default: 17)")
    parser.add_argument(
        "--int8",
        action="store_true",
        help="quantize openvino or onnx, calibrated on DATASETS.TRAIN, judged on DATASETS.TEST",
    )
    parser.add_argument(
        "--lose-at-most", type=float, metavar="AP", help="points of AP that --int8 may cost (0.5)"
    )
    flags.add_overrides(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    by_suffix = {suffix: name for name, suffix in FORMATS.items()}
    named = by_suffix.get(arguments.output.suffix)
    wanted = arguments.format or named
    if wanted is None:
        parser.error(f"--output {arguments.output}: end it in {', '.join(by_suffix)}")
    if named != wanted:
        parser.error(f"--output {arguments.output}: a file of {wanted} ends in {FORMATS[wanted]}")
    if arguments.opset is not None and wanted not in ("onnx", "openvino"):
        parser.error(f"--opset is of ONNX, and {wanted} files have none")
    if arguments.lose_at_most is not None and not arguments.int8:
        parser.error("--lose-at-most is for --int8")
    if arguments.int8:
        if arguments.lose_at_most is None:
            arguments.lose_at_most = LOSE_AT_MOST
        if not 0 <= arguments.lose_at_most <= 100:
            parser.error(f"--lose-at-most {arguments.lose_at_most}: 0 to 100 points of AP")


def run(arguments: argparse.Namespace) -> None:
    """Export, and say how close the artifact is."""
    import logging

    from resnext_det.config import load_config
    from resnext_det.engine.evaluate import of_run
    from resnext_det.engine.predictor import images_in
    from resnext_det.errors import InertMessages, quoted
    from resnext_det.export.exporting import export
    from resnext_det.export.formats import OPSET
    from resnext_det.files import size_text

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(InertMessages())
    overrides, source = list(arguments.opts), ""
    if arguments.run:
        arguments.config_file, weights = of_run(arguments.run)
        source = str(arguments.run.resolve() if isinstance(arguments.run, Path) else weights)
        overrides = ["MODEL.WEIGHTS", str(weights), *overrides]
    images = images_in(arguments.images) if arguments.images else ()
    description = export(
        load_config(arguments.config_file, overrides),
        arguments.output,
        images=images,
        run=source,
        opset=arguments.opset or OPSET,
        lose_at_most=arguments.lose_at_most,
    )
    suffixes = [arguments.output.suffix, *description.parts_sha256]
    files = [arguments.output.with_suffix(suffix) for suffix in suffixes]
    print(f"{quoted(arguments.output)}: {size_text(sum(each.stat().st_size for each in files))}")
