"""Compute COCO's figures from detections in a file, without a model.

    %(prog)s --annotations instances_val2017.json --results detections.json
    %(prog)s ... --cross-check                      by pycocotools as well
    %(prog)s ... --baseline OTHER_RUN               is it better, and how surely?
    %(prog)s ... --images val2017 --output FOLDER   write figures and a report
    %(prog)s ... --json                             figures for a program

Annotations and results are in COCO's formats. By default this evaluates every one of boxes, masks
and keypoints that both files hold. --proposals computes the class-agnostic average recall of 100,
300 and 1000 boxes per image.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resnext_det_cli import flags

KINDS = ("bbox", "segm", "keypoints")
ENGINES = ("hotcoco", "pycocotools")
RESAMPLES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", type=Path, metavar="JSON")
    parser.add_argument("--results", type=Path, metavar="JSON")
    parser.add_argument("--run", type=Path, metavar="DIR", help="take both from an evaluated run")
    parser.add_argument("--iou-type", nargs="+", choices=KINDS, help="what to evaluate")
    parser.add_argument(
        "--oks-sigmas", nargs="+", type=float, default=[], help="of keypoints other than COCO's 17"
    )
    parser.add_argument("--engine", choices=ENGINES, default="hotcoco")
    flags.add_cross_check(parser)
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="a run or its metrics.json")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="draws for --baseline")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument("--proposals", action="store_true", help="class-agnostic recall only")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for the figures and a report")
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures for the report")
    flags.add_json(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not arguments.run and not (arguments.annotations and arguments.results):
        parser.error("name both --annotations and --results, or a --run")
    if arguments.run and arguments.results:
        parser.error("--run has its own detections: leave --results out")
    if arguments.proposals and (arguments.baseline or arguments.output):
        parser.error("--proposals has neither a baseline nor a report")
    if arguments.images and not arguments.output:
        parser.error("--images is for the report: name a folder for it, --output DIR")
    with_boxes = not arguments.iou_type or "bbox" in arguments.iou_type
    if not with_boxes and (arguments.baseline or arguments.output):
        parser.error("--baseline and --output need boxes: --iou-type bbox ...")
    if min(arguments.resamples, arguments.seed) < 0:
        parser.error("--resamples and --seed must be 0 or more")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, and print the figures as tables or as JSON."""
    import logging

    from resnext_det.console import json_alone
    from resnext_det.errors import InertMessages

    with json_alone(arguments.json) as print_json:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for handler in logging.getLogger().handlers:
            handler.addFilter(InertMessages())
        print_json(_evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate and print; write a report if --output asks for one."""
    import logging

    from resnext_det.errors import quoted
    from resnext_det.evaluation import compare
    from resnext_det.evaluation.annotations import read_ground_truth
    from resnext_det.evaluation.coco import Engine, Protocol, proposal_figures, proposal_table
    from resnext_det.evaluation.detections import read_detections, suspicions
    from resnext_det.evaluation.error_analysis import error_table, threshold_line
    from resnext_det.evaluation.evaluator import evaluate_detections, write_evaluated
    from resnext_det.evaluation.results_file import INFERENCE
    from resnext_det.files import check_writable, file_digest
    from resnext_det.report.page import write_report

    dataset, weights = _find_files(arguments)
    if arguments.output:
        check_writable(arguments.output, "--output")
    results = arguments.results
    truth = read_ground_truth(arguments.annotations)
    detections = read_detections(results, truth, with_classes=not arguments.proposals)
    print(f"{len(detections):,} detections: {quoted(results)}")
    print(f"{len(truth.image_ids):,} images: {quoted(truth.file)}")
    engine = Engine(arguments.engine, arguments.cross_check)
    if arguments.proposals:
        recall = proposal_figures(truth, detections, engine)
        print(f"\n{proposal_table(recall)}")
        return {"proposals": recall}
    for suspicion in suspicions(truth, detections):
        logging.getLogger(__name__).warning("%s: %s", quoted(results), suspicion)
    evaluated = {}
    for kind in _kinds(arguments, truth, detections):
        protocol = Protocol.of(kind, tuple(arguments.oks_sigmas))
        found = evaluate_detections(truth, detections, protocol, engine)
        print(f"\n{kind}\n{found.figures.table()}")
        print(f"\n{error_table(found.details)}\n\n{threshold_line(found.details)}")
        evaluated[kind] = found
    if arguments.cross_check:
        print("\nhotcoco and pycocotools agree.")
    document = {kind: each.document() for kind, each in evaluated.items()}
    if arguments.baseline:
        before = compare.read_baseline(arguments.baseline, truth)
        draws = arguments.resamples, arguments.seed
        differences = compare.compare(truth, before, detections, *draws)
        print(f"\nbbox, against {quoted(arguments.baseline)}")
        print(compare.difference_table(differences))
        document["baseline"] = compare.comparison_document(arguments.baseline, differences)
    if arguments.output:
        images = (arguments.images or arguments.annotations.parent).resolve()
        more: dict[str, Any] = {"images": str(images), "engine": vars(engine)}
        if arguments.baseline:
            more["baseline"] = document["baseline"]
        model = {
            "weights": weights or f"unknown; detections {results.name}",
            "detections_sha256": file_digest(results),
        }
        folder = arguments.output / INFERENCE
        write_evaluated(folder, dataset, model, truth, results, evaluated, more)
        print(f"\nReport: {write_report(arguments.output)}")
    return document


def _find_files(arguments: argparse.Namespace) -> tuple[str, str]:
    """Set annotations, results and images from --run; return the data set and the weights."""
    from resnext_det.errors import DatasetError, plain, quoted
    from resnext_det.evaluation.results_file import read_metrics

    if not arguments.run:
        return arguments.annotations.stem, ""
    metrics = read_metrics(arguments.run)
    if len(metrics.evaluations) != 1:
        names = ", ".join(plain(each.name) for each in metrics.evaluations)
        raise DatasetError(
            f"{quoted(arguments.run)} was evaluated on {names or 'no data set'}, and --run takes a "
            "run with one: name --annotations and --results instead."
        )
    (evaluation,) = metrics.evaluations
    arguments.results = evaluation.detections
    arguments.annotations = arguments.annotations or evaluation.annotations
    if arguments.output:
        arguments.images = arguments.images or evaluation.images
    return evaluation.name, metrics.weights


def _kinds(arguments: argparse.Namespace, truth: Any, detections: Any) -> tuple[str, ...]:
    """Return what to evaluate: --iou-type, or what both files hold."""
    from resnext_det.errors import DatasetError, quoted

    held = [kind for kind in detections.kinds if truth.holds(kind)]
    if not arguments.iou_type and (arguments.baseline or arguments.output) and "bbox" not in held:
        raise DatasetError(
            f"{quoted(arguments.results)} has no boxes, which --baseline and --output need: add "
            "bbox to the detections, or leave these out."
        )
    if not held or not set(arguments.iou_type or ()) <= set(held):
        raise DatasetError(
            f"--iou-type is {' '.join(arguments.iou_type or ['not set'])}; the detections hold "
            f"{' '.join(detections.kinds)}, and of these the annotations hold "
            f"{' '.join(held) or 'none'}. Name one of the latter, or other files."
        )
    return tuple(arguments.iou_type or held)
