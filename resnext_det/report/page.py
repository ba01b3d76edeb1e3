"""One self-contained HTML page about a run: figures, curves, classes and images."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resnext_det.errors import ConfigError, DatasetError, ResNeXtError, quoted
from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.classified import results_file
from resnext_det.evaluation.coco import ClassFigures, Figures
from resnext_det.evaluation.compare import (
    Difference,
    compare,
    comparison_document,
    read_baseline,
)
from resnext_det.evaluation.detections import read_detections
from resnext_det.evaluation.results_file import (
    INFERENCE,
    INVALID,
    DatasetMetrics,
    Metrics,
    metrics_file,
    read_metrics,
    read_training,
)
from resnext_det.files import written_beside
from resnext_det.report.classifier import render_classifier
from resnext_det.report.details import Details, growth_chart, read_details
from resnext_det.report.facts import (
    config_facts,
    dataset_title,
    model_name,
    run_config,
    schedule_facts,
    training_objects,
    weights_facts,
)
from resnext_det.report.gallery import (
    CORRECT,
    FOUND,
    IGNORED,
    MATCHED_FROM,
    SHOWN_FROM,
    WRONG,
    Gallery,
    make_gallery,
)
from resnext_det.report.templates import rendered_page
from resnext_det.visualize.curves import run_curves

logger = logging.getLogger(__name__)

MOST_PICTURES = 24


@dataclass(frozen=True)
class Section:
    """What the page shows of one data set.

    Attributes:
        evaluation: the figures.
        details: the detector's errors; None if unknown.
        differences: from the baseline; empty without one.
        gallery: the images.
        augmented: whether the tests were augmented (TEST.AUG).
    """

    evaluation: DatasetMetrics
    details: Details | None
    differences: list[Difference]
    gallery: Gallery
    augmented: bool = False

    @property
    def title(self) -> str:
        """Return the data set's name for headings."""
        name = dataset_title(self.evaluation.name)
        return f"{name}, with test-time augmentation" if self.augmented else name

    @property
    def kinds(self) -> dict[str, Figures]:
        """Figures by heading, with classes by descending AP, those without AP last."""
        headings = {"bbox": "Boxes", "segm": "Masks", "keypoints": "Keypoints"}

        def rank(row: ClassFigures) -> float:
            return math.inf if row.AP is None else -row.AP

        return {
            headings[kind]: Figures(found.figures, tuple(sorted(found.per_class, key=rank)))
            for kind, found in self.evaluation.kinds.items()
        }

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Date, speed and command of the evaluation, as far as they are known."""
        found = self.evaluation
        seconds = found.seconds_per_image
        facts = {
            "Evaluated": found.date.replace("T", " "),
            "Figures by": found.engine,
            "Speed": f"{1000 * seconds:.3g} ms per image (median, model only)" if seconds else "",
            "Parameters": f"{found.parameters:,}" if found.parameters else "",
            "Command": found.command,
        }
        return [(name, value) for name, value in facts.items() if value]


def write_report(run: Path, output: Path | None = None, baseline: Path | None = None) -> Path:
    """Write one self-contained page about an evaluated run, whole or not at all.

    Args:
        run: the folder of a classifier's training, or one with inference/metrics.json, the
            detections that it names and, after a training, metrics.jsonl and config.yaml.
        output: the page; report.html in the run's folder by default.
        baseline: another evaluated run to compare with.

    Returns:
        The page that was written.

    Raises:
        DatasetError: metrics.json, annotations or detections are missing or malformed, or the
            baseline was evaluated with other annotations.
        ConfigError: there is a baseline, but the run is of a classifier.
        ResNeXtError: the page cannot be written.
    """
    is_classifier = results_file(run).is_file()
    if is_classifier and baseline is not None:
        raise ConfigError(f"--baseline is for detectors, and {quoted(run)} is of a classifier.")
    page = render_classifier(run) if is_classifier else _render(run, baseline)
    target = run / "report.html" if output is None else output
    try:
        with written_beside(target) as beside:
            # JSON may contain lone surrogates, which UTF-8 cannot encode.
            beside.write_text(page, encoding="utf-8", errors="replace")
    except ResNeXtError as error:
        raise ResNeXtError(f"{error} Choose another file with --output.") from error
    logger.info("wrote %s, %.1f MB", target, len(page) / 1e6)
    return target


def _render(run: Path, baseline: Path | None) -> str:
    metrics = read_metrics(run)
    if baseline is not None:
        metrics = replace(
            metrics, evaluations=[_against(each, baseline) for each in metrics.evaluations]
        )
    training = read_training(run)
    config = run_config(run)
    trained = training_objects(run, config)
    augmented = _augmented(run, metrics)
    evaluations = [*metrics.evaluations, *augmented]
    share = max(3, MOST_PICTURES // max(1, len(evaluations)))
    return rendered_page(
        "page.html.j2",
        title=model_name(config),
        metrics=metrics,
        sections=[
            Section(
                each,
                read_details(each.details, trained),
                _differences(each.baseline),
                make_gallery(each, share),
                each in augmented,
            )
            for each in evaluations
        ],
        curves=run_curves(training) | growth_chart(run),
        weights=weights_facts(run, metrics.weights, config, trained=bool(training)),
        schedule=schedule_facts(config, training),
        config=config_facts(config),
        colours={
            "object found": FOUND,
            "correct prediction": CORRECT,
            "missed or false": WRONG,
            "crowd, not counted": IGNORED,
        },
        shown_from=SHOWN_FROM,
        matched_from=MATCHED_FROM,
    )


def _against(evaluation: DatasetMetrics, baseline: Path) -> DatasetMetrics:
    """Compare an evaluation with that of another run."""
    truth = read_ground_truth(evaluation.annotations)
    now = read_detections(evaluation.detections, truth)
    differences = compare(truth, read_baseline(baseline, truth), now)
    return replace(evaluation, baseline=comparison_document(baseline, differences))


def _augmented(run: Path, metrics: Metrics) -> list[DatasetMetrics]:
    """Return the figures of test-time augmentation that the same command computed."""
    folder = run / f"{INFERENCE}_TTA"
    if metrics_file(folder) is None:
        return []
    try:
        found = read_metrics(folder).evaluations
    except DatasetError as error:
        logger.warning("the report leaves out test-time augmentation: %s", error)
        return []
    usual = {each.name: each for each in metrics.evaluations}
    return [
        each
        for each in found
        if each.name in usual
        and each.command == usual[each.name].command
        and each.date >= usual[each.name].date
    ]


def _differences(baseline: Any) -> list[Difference]:
    """Return the differences that metrics.json holds; none without a baseline."""
    if baseline is None:
        return []
    try:
        return [
            Difference(
                str(entry["figure"]),
                *(
                    _finite(entry.get(key))
                    for key in ("before", "now", "difference", "lower", "upper")
                ),
            )
            for entry in baseline["differences"]
        ]
    except INVALID as error:
        logger.warning("the report leaves out a malformed baseline: %r", error)
        return []


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
