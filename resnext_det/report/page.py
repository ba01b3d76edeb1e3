"""One HTML page about a run: figures, curves, classes and pictures, with nothing to load."""

from __future__ import annotations

import importlib.resources
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from resnext_det.errors import ResNeXtError
from resnext_det.evaluation.coco import LIMITS, Figures
from resnext_det.evaluation.results_file import (
    DatasetMetrics,
    Scalars,
    read_metrics,
    read_training,
)
from resnext_det.files import written_beside
from resnext_det.report.baseline import Comparison, comparison_of
from resnext_det.report.config import dataset_title, grouped, read_config
from resnext_det.report.details import ReportDetails, read_details
from resnext_det.report.gallery import (
    LOWEST,
    MATCHED_FROM,
    SHOWN_FROM,
    Gallery,
    make_gallery,
)
from resnext_det.report.schedule import schedule_facts
from resnext_det.report.weights import weights_facts
from resnext_det.visualize.curves import Curves, loss_curves, precision_curves

logger = logging.getLogger(__name__)

# Okabe and Ito's colours: they stay apart for most kinds of colour blindness.
_COLOURS = {"truth": "#009e73", "right": "#0072b2", "wrong": "#d55e00"}
MOST_PICTURES = 36
_FILTERED_FROM = 9  # classes; fewer are found at a glance

# The figures as COCO defines them: name, heading and what is measured.
PRECISION = (
    ("AP", "AP", "IoU 0.50 to 0.95"),
    ("AP50", "AP50", "IoU 0.50"),
    ("AP75", "AP75", "IoU 0.75"),
    ("APs", "AP small", "area below 32\u00b2 pixels"),
    ("APm", "AP medium", "area 32\u00b2 to 96\u00b2"),
    ("APl", "AP large", "area above 96\u00b2"),
)
RECALL = (
    ("AR", "AR", "OKS 0.50 to 0.95"),
    ("AR50", "AR50", "OKS 0.50"),
    ("AR75", "AR75", "OKS 0.75"),
    ("AR1", "AR1", "1 detection per image"),
    ("AR10", "AR10", "10 detections"),
    ("AR100", "AR100", "100 detections"),
    ("ARs", "AR small", "area below 32\u00b2 pixels"),
    ("ARm", "AR medium", "area 32\u00b2 to 96\u00b2"),
    ("ARl", "AR large", "area above 96\u00b2"),
)
# Of the figures of a class: key, heading, and what it is.
CLASS_FIGURES = (
    ("AP", "AP", "IoU 0.50 to 0.95"),
    ("AP50", "AP50", "IoU 0.50"),
    ("APs", "small", "AP of objects below 32\u00b2 pixels"),
    ("APm", "medium", "AP of objects of 32\u00b2 to 96\u00b2"),
    ("APl", "large", "AP of objects above 96\u00b2"),
    ("AR", "AR", "greatest recall with 100 detections, IoU 0.50 to 0.95"),
)


@dataclass(frozen=True)
class Section:
    """One data set of the page.

    Attributes:
        evaluation: its figures.
        details: where the detector errs; None where that was not written.
        comparison: with an earlier evaluation, if there was one.
        gallery: its pictures.
    """

    evaluation: DatasetMetrics
    details: ReportDetails | None
    comparison: Comparison | None
    gallery: Gallery

    @property
    def kinds(self) -> list[tuple[str, Figures]]:
        """The kinds of output that have figures, by what they are of: boxes, masks, keypoints."""
        found = self.evaluation
        boxes = Figures(found.figures, found.per_class)
        kinds = (("boxes", boxes), ("masks", found.segm), ("keypoints", found.keypoints))
        return [(name, figures) for name, figures in kinds if figures is not None]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What is known of the evaluation: its date, speed and command."""
        found = self.evaluation
        speed = found.seconds_per_image
        facts = {
            "Evaluated": found.date.replace("T", " "),
            "Figures by": found.engine,
            "Speed": f"{1000 * speed:.3g} ms per image (median, of the model alone)"
            if speed
            else "",
            "Command": found.command,
        }
        return [(name, value) for name, value in facts.items() if value]

    @property
    def class_figures(self) -> list[tuple[str, str, str]]:
        """The columns of the table of classes that hold anything; AP and AP50 in any case."""
        classes = self.evaluation.per_class
        return [
            column
            for column in CLASS_FIGURES
            if column[0] in ("AP", "AP50")
            or any(getattr(each, column[0]) is not None for each in classes)
        ]


@dataclass(frozen=True)
class Chart:
    """One figure of the page with its heading; the SVG is ours and needs no escaping."""

    title: str
    svg: Markup
    curves: Curves
    digits: int


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write a page about a run that opens anywhere: one file, nothing from the network.

    Args:
        run: a folder with inference/metrics.json, the detections that it names and, after a
            training, metrics.jsonl and config.yaml.
        output: the page to write; report.html in the run's folder if it is not given. It is
            written beside and then renamed.

    Returns:
        The page that was written.

    Raises:
        DatasetError: metrics.json, annotations or detections are missing or broken.
        ResNeXtError: the page cannot be written.
    """
    page = _render(run)
    target = run / "report.html" if output is None else output
    try:
        with written_beside(target) as beside:
            # Half a pair of surrogates, which JSON may hold, is no text.
            beside.write_text(page, encoding="utf-8", errors="replace")
    except ResNeXtError as error:
        raise ResNeXtError(f"{error} Name another file with --output.") from error
    logger.info("wrote %s, %.1f MB", target, len(page) / 1e6)
    return target


def _render(run: Path) -> str:
    metrics = read_metrics(run)
    training = read_training(run)
    config = read_config(run)
    share = max(1, MOST_PICTURES // max(1, len(metrics.evaluations)))
    steps = [] if config is None else config.steps
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            metrics=metrics,
            config=config,
            schedule=schedule_facts(run, config, training),
            weights=weights_facts(run, metrics.weights, config, trained=bool(training)),
            sections=[_section(entry, share) for entry in metrics.evaluations],
            trained=bool(training),
            charts=_charts(training, steps),
            steps=steps,
            tables=(("Average precision", PRECISION), ("Average recall", RECALL)),
            limits=LIMITS,
            colours=_COLOURS,
            shown_from=SHOWN_FROM,
            lowest=LOWEST,
            matched_from=MATCHED_FROM,
            filtered_from=_FILTERED_FROM,
        )
    )


def _section(evaluation: DatasetMetrics, most: int) -> Section:
    return Section(
        evaluation,
        read_details(evaluation.details),
        comparison_of(evaluation.baseline),
        make_gallery(evaluation, most),
    )


def _environment() -> Environment:
    folder = importlib.resources.files("resnext_det.report")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
    )
    environment.filters["figure"] = _figure
    environment.filters["grouped"] = grouped
    environment.filters["dataset"] = dataset_title
    return environment


def _charts(training: Sequence[Scalars], steps: Sequence[int]) -> list[Chart]:
    charts = []
    loss = loss_curves(training, steps)
    if loss is not None:
        title = "Loss, logarithmic" if loss.logarithmic else "Loss"
        charts.append(Chart(title, Markup(loss.svg), loss, digits=3))
    # Detectron2 writes "bbox/AP", or "NAME/bbox/AP" where it evaluates on several data sets.
    keys = dict.fromkeys(key for record in training for key in record)
    for prefix in [key.removesuffix("AP") for key in keys if key.endswith("bbox/AP")]:
        curves = precision_curves(training, prefix, steps, prefix)
        if curves is not None:
            name = prefix.removesuffix("bbox/").removesuffix("/")
            title = f"Precision in %, {dataset_title(name)}" if name else "Precision in %"
            charts.append(Chart(title, Markup(curves.svg), curves, digits=1))
    return charts


def _figure(value: float | None) -> str:
    """Return a percentage with one digit, or a dash where there is nothing to measure."""
    return "\u2013" if value is None else f"{value:.1f}"
