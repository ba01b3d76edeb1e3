"""The page of a run that trained a classifier."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnext_det.data.annotations import read_json
from resnext_det.errors import DatasetError, quoted
from resnext_det.evaluation.classified import results_file
from resnext_det.evaluation.results_file import INVALID, read_training
from resnext_det.report.facts import (
    config_facts,
    model_name,
    run_config,
    schedule_facts,
    weights_facts,
)
from resnext_det.report.templates import rendered_page
from resnext_det.visualize.curves import run_curves

_MOST_IN_TABLE = 20  # classes
_MOST_PAIRS = 30


@dataclass(frozen=True)
class WorstImage:
    """An image with a high loss; `uri` holds its thumbnail."""

    name: str
    actual: str
    predicted: str
    confidence: float
    loss: float
    uri: str


@dataclass(frozen=True)
class Results:
    """The content of classification.json.

    Attributes:
        figures: errors in per cent by heading: "Top-1 error", "Top-5 error, 1000-way".
        classes: name, images, top-1 and top-5 error, the worst first.
        columns: the predicted classes.
        rows: by true class, the count and the share of each predicted one; empty for many classes.
        pairs: true class, predicted class, count and share of the most frequent mistakes.
        worst: the images with the highest losses.
        environment: hardware, commit and versions.
    """

    weights: str
    source: str
    image_count: int
    date: str
    figures: dict[str, float]
    classes: list[tuple[str, int, float, float]]
    columns: list[str]
    rows: list[tuple[str, list[tuple[int, float]]]]
    pairs: list[tuple[str, str, int, float]]
    worst: list[WorstImage]
    environment: list[tuple[str, str]]


def read_results(file: Path) -> Results:
    """Read classification.json.

    Raises:
        DatasetError: it is missing or malformed.
    """
    try:
        document = read_json(file)
        classes = [
            (str(each["name"]), int(each["images"]), 100 - float(each["top1"]), 100 - each["top5"])
            for each in document["classes"]
        ]
        images = {name: max(1, count) for name, count, _, _ in classes}
        counts = {(str(one), str(other)): int(n) for one, other, n in document["confusion"]}
        columns = list(dict.fromkeys([*images, *(said for _, said in counts)]))
        mistakes = sorted((-n, *pair) for pair, n in counts.items() if pair[0] != pair[1])
        table = []
        for actual in images if len(columns) <= _MOST_IN_TABLE else ():
            row = [counts.get((actual, said), 0) for said in columns]
            table.append((actual, [(n, n / images[actual]) for n in row]))
        return Results(
            weights=str(document["weights"]),
            source=str(document["source"]),
            image_count=int(document["image_count"]),
            date=str(document["date"]).replace("T", " "),
            figures=_errors(document["figures"]),
            classes=sorted(classes, key=lambda each: (-each[2], -each[3])),
            columns=columns,
            rows=table,
            pairs=[
                (actual, said, -count, -count / images[actual])
                for count, actual, said in mistakes[:_MOST_PAIRS]
            ],
            worst=[_worst(each) for each in document["worst"]],
            environment=[
                ("Hardware", str(document["hardware"])),
                *([("Commit", str(document["commit"]))] if document.get("commit") else []),
                *((str(name), str(value)) for name, value in document["versions"].items()),
            ],
        )
    except INVALID as error:
        raise DatasetError(
            f"{quoted(file)} is malformed ({quoted(repr(error))}). Train the run again."
        ) from error


def _errors(figures: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for kind, each in figures.items():
        way = "" if kind == "all_classes" else f", {str(kind).replace('_', '-')}"
        found[f"Top-1 error{way}"] = 100 - float(each["top1"])
        found[f"Top-5 error{way}"] = 100 - float(each["top5"])
    return found


def _worst(entry: Mapping[str, Any]) -> WorstImage:
    jpeg = base64.b64encode(base64.b64decode(entry["jpeg"], validate=True)).decode()
    return WorstImage(
        str(entry["image"]),
        str(entry["class"]),
        str(entry["predicted"]),
        float(entry["confidence"]),
        float(entry["loss"]),
        f"data:image/jpeg;base64,{jpeg}",
    )


def render_classifier(run: Path) -> str:
    """Return the page of a run with classification.json.

    Raises:
        DatasetError: the file is malformed.
    """
    results, training, config = read_results(results_file(run)), read_training(run), run_config(run)
    return rendered_page(
        "classifier.html.j2",
        title=model_name(config),
        results=results,
        curves=run_curves(training),
        weights=weights_facts(run, results.weights, config, trained=bool(training)),
        schedule=schedule_facts(config, training),
        config=config_facts(config),
    )
