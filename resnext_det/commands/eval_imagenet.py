"""`resnext-det eval-imagenet`."""

from __future__ import annotations

import argparse

from tabulate import tabulate

from resnext_det.errors import ConfigError, reported
from resnext_det.files import write_json
from resnext_det.weights.catalog import entry
from resnext_det.weights.classifier import load_classifier, locate
from resnext_det.weights.imagenet import IMAGES, Evaluation, choose_device, measure
from resnext_det.weights.imagenet_images import Preprocessing, validation_images


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and save."""
    with reported():
        evaluated = evaluate(arguments)
        print(described(evaluated))
        if arguments.json:
            try:
                write_json(arguments.json, evaluated.document())
            except OSError as error:
                raise ConfigError(f"{arguments.json} cannot be written: {error}") from error


def evaluate(arguments: argparse.Namespace) -> Evaluation:
    """Do what the arguments say."""
    device = choose_device(arguments.device)
    like = entry(arguments.like.removeprefix("resnext://")) if arguments.like else None
    if like is not None and like.accuracy is None:
        raise ConfigError(f"no figures of {like.name} are published, so --like cannot take them.")
    file, known = locate(arguments.weights)
    trained_as = like or known
    published = trained_as.accuracy if trained_as else None
    preprocessing = Preprocessing.of(
        published, arguments.resize, arguments.crop, arguments.interpolation
    )
    classifier = load_classifier(file, known, like)
    images = validation_images(arguments.data, classifier.classes, preprocessing, arguments.limit)
    weights = classifier.weights
    print(
        f"{known.name if known else file}: {weights} ({weights.layout} layout), "
        f"{classifier.classes} classes, on {device}\n"
        f"{len(images)} images, {preprocessing}",  # type: ignore[arg-type]  # it has a length
        flush=True,
    )
    score = measure(
        classifier,
        images,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=device,
    )
    return Evaluation(classifier, known, preprocessing, arguments.data, device, score)


def described(evaluated: Evaluation) -> str:
    """Return the figures as a table, and what one must know to compare them."""
    score, intervals = evaluated.score, evaluated.intervals
    measured = {"top1": score.top1, "top5": score.top5}
    rows = []
    for name, label in (("top1", "top-1 %"), ("top5", "top-5 %")):
        published, difference = evaluated.published[name], evaluated.differences[name]
        low, high = intervals[name] if intervals else (None, None)
        rows.append(
            (
                label,
                f"{measured[name]:.3f}",
                "-" if low is None else f"{low:.2f} to {high:.2f}",
                "-" if published is None else f"{published:.3f}",
                "-" if difference is None else f"{difference:+.3f}",
            )
        )
    headers = ("", "measured", "95 % interval", "published", "difference")
    lines = [tabulate(rows, headers=headers, disable_numparse=True)]
    accuracy = evaluated.known.accuracy if evaluated.known else None
    if evaluated.known is None:
        lines.append("This file is not in the catalog, so no published figure is known.")
    elif accuracy is None:
        lines.append(f"No figures of {evaluated.known.name} are published.")
    if accuracy is None:
        return "\n".join(lines)
    lines.append(f"Published: {accuracy.source}, on the {IMAGES:,} images of ImageNet-1K.")
    if evaluated.other_preprocessing:
        lines.append(f"Those images were cut otherwise: {Preprocessing.of(accuracy)}.")
    return "\n".join(lines)
