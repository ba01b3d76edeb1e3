"""`resnext-det evaluate`: figures of a file of detections."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import resnext_det  # isort: skip  # noqa: F401  # before Detectron2: it imports that quietly
from detectron2.data import DatasetCatalog, MetadataCatalog

from resnext_det.console import json_alone
from resnext_det.errors import DatasetError, InertMessages, quoted, reported
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.coco import Protocol
from resnext_det.evaluation.compare import compare_with, comparison_document, difference_table
from resnext_det.evaluation.detections import Detections, check_detections, read_detections
from resnext_det.evaluation.error_analysis import error_table
from resnext_det.evaluation.evaluator import Engine, evaluate_detections, write_evaluated
from resnext_det.evaluation.figures import proposal_figures, proposal_table
from resnext_det.evaluation.results_file import (
    INFERENCE,
    find_stock_run,
    metrics_file,
    read_metrics,
)
from resnext_det.files import check_writable, file_digest
from resnext_det.report.page import write_report


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, print, and write where that is asked for."""
    arguments.weights = ""
    if arguments.run:
        complete_from_run(arguments)
    else:
        arguments.dataset = arguments.annotations.stem
    if arguments.output:
        check_writable(arguments.output, "--output")
    truth = read_ground_truth(arguments.annotations)
    detections = read_detections(
        arguments.results, classes=not arguments.proposals, numbers=truth.text_numbers
    )
    print(f"{len(detections):,} detections: {arguments.results}")
    print(f"{len(truth.image_ids):,} images: {truth.file}")
    if arguments.proposals:
        check_detections(detections, truth, str(arguments.results), classes=False)
        settings = {"engine": arguments.engine, "cross_check": arguments.cross_check}
        recall = proposal_figures(truth, detections, **settings)
        print(f"\n{proposal_table(recall)}")
        return {"proposals": recall}
    engine = Engine(arguments.engine, arguments.cross_check)
    evaluated = {}
    for kind in kinds_of(arguments, truth, detections):
        evaluated[kind] = evaluate_detections(
            truth,
            detections,
            engine,
            str(arguments.results),
            Protocol.of(kind, tuple(arguments.oks_sigmas)),
        )
        print(f"\n{kind}\n{evaluated[kind].figures.table()}")
        print(f"\n{error_table(evaluated[kind].details)}")
    if arguments.cross_check:
        print("\nhotcoco and pycocotools agree.")
    document = {kind: each.figures.document() for kind, each in evaluated.items()}
    if arguments.baseline:
        differences = compare_with(
            arguments.baseline, truth, detections, arguments.resamples, arguments.seed
        )
        print(f"\nbbox, against {arguments.baseline}\n{difference_table(differences)}")
        document["baseline"] = comparison_document(arguments.baseline, differences)
    if arguments.output:
        more: dict[str, Any] = {
            "images": str((arguments.images or arguments.annotations.parent).resolve())
        }
        if arguments.baseline:
            more["baseline"] = document["baseline"]
        write_evaluated(
            arguments.output / INFERENCE,
            arguments.dataset,
            {
                "weights": arguments.weights or f"unknown; detections {arguments.results.name}",
                "detections_sha256": file_digest(arguments.results),
            },
            truth,
            arguments.results,
            evaluated,
            {**more, "engine": vars(engine)},
        )
        print(f"\nReport: {write_report(arguments.output)}")
    return document


def complete_from_run(arguments: argparse.Namespace) -> None:
    """Fill in what the run's folder tells: detections, annotations and images."""
    if metrics_file(arguments.run):
        complete_from_metrics(arguments)
        return
    stock = find_stock_run(arguments.run)
    arguments.results = stock.results
    arguments.dataset = stock.dataset
    arguments.oks_sigmas = arguments.oks_sigmas or list(stock.sigmas)
    if (arguments.run / "model_final.pth").is_file():
        arguments.weights = str(arguments.run / "model_final.pth")
    if arguments.annotations:
        return
    metadata = MetadataCatalog.get(stock.dataset)
    if stock.dataset not in DatasetCatalog or "json_file" not in metadata.as_dict():
        raise DatasetError(
            f"the run was tested on {quoted(stock.dataset)}, which is registered here without an "
            "annotation file, or not at all: name the file, --annotations JSON."
        )
    arguments.annotations = Path(metadata.json_file)
    if not arguments.images and arguments.output and metadata.get("image_root"):
        arguments.images = Path(metadata.image_root)


def complete_from_metrics(arguments: argparse.Namespace) -> None:
    """Fill in what an earlier evaluation by this package wrote."""
    metrics = read_metrics(arguments.run)
    if len(metrics.evaluations) != 1:
        names = ", ".join(quoted(each.name) for each in metrics.evaluations)
        raise DatasetError(
            f"{quoted(arguments.run)} holds detections on {names or 'no data set'}, and one is "
            "evaluated at a time: name both --annotations and --results instead of --run."
        )
    (evaluation,) = metrics.evaluations
    arguments.results, arguments.dataset = evaluation.detections, evaluation.name
    arguments.weights = metrics.weights
    arguments.annotations = arguments.annotations or evaluation.annotations
    if arguments.output:
        arguments.images = arguments.images or evaluation.images


def kinds_of(
    arguments: argparse.Namespace, truth: GroundTruth, detections: Detections
) -> tuple[str, ...]:
    """Return what is evaluated: what was asked for, or what both files hold."""
    held = [kind for kind in detections.kinds if truth.holds(kind)]
    if not arguments.iou_type and (arguments.baseline or arguments.output) and "bbox" not in held:
        raise DatasetError(
            f"{arguments.results} has no boxes, which --baseline and --output need: add bbox to "
            "the detections, or leave these out."
        )
    missing = [kind for kind in arguments.iou_type or () if kind not in held]
    if missing or not held:
        raise DatasetError(
            f"--iou-type {' '.join(missing)}: the detections hold {' '.join(detections.kinds)}, "
            f"and both files hold {' '.join(held) or 'nothing in common'}: name one of these, or "
            "files that have more."
        )
    return tuple(arguments.iou_type or held)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, and print the figures as tables or as JSON."""
    with json_alone(arguments.json) as print_json:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for handler in logging.getLogger().handlers:
            handler.addFilter(InertMessages())
        with reported():
            figures = evaluate(arguments)
        print_json(figures)
