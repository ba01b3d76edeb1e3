"""The schedule of a training as it was executed, from the lines that it wrote."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from resnext_det.evaluation.results_file import Scalars
from resnext_det.report.config import ConfigSummary, grouped

_LOG_BYTES = 1_000_000  # the plan stands at the beginning of log.txt
_IMAGES = re.compile(r"^Images to train on +([\d,]{1,15})$", re.MULTILINE)


def schedule_facts(
    run: Path, config: ConfigSummary | None, training: Sequence[Scalars]
) -> list[tuple[str, str]]:
    """Return names and values that tell what a training did.

    What was executed may differ from the config: a training that was stopped has fewer iterations,
    and where SOLVER.SCALING changes the batch with the number of processes, other ones.

    Args:
        run: its folder; log.txt tells on how many images it trained.
        config: of the run, None where it is not known.
        training: its lines; none for a run that was evaluated only, of which this tells the
            config's schedule.
    """
    if not training:
        return [] if config is None else _planned(config)
    done = round(max(record["iteration"] for record in training)) + 1
    batch = _images_per_update(training)
    facts = [("Iterations", _iterations(done, config))]
    if config is not None:
        if batch is None and re.fullmatch(r"\d{1,9}", config.images_per_update):
            batch = int(config.images_per_update)
        planned = config.images_per_update
        more = "" if batch is None or str(batch) == planned else f" ({planned} in the config)"
        facts.append(("Images per update", f"{planned if batch is None else batch}{more}"))
        facts.append(("Learning rate", _rate(training, config)))
        facts.append(("Rate falls at", _falls(config)))
    elif batch is not None:
        facts.append(("Images per update", str(batch)))
    images = _training_images(run)
    if images and batch:
        epochs = done * float(batch) / images
        facts.append(("Epochs", f"{epochs:.2f} of {grouped(images)} images"))
    seconds = _finite(training, "time")
    if seconds:
        facts.append(("Time per iteration", f"{statistics.median(seconds):.2f} s (median)"))
        whole = duration(statistics.fmean(seconds) * done)
        facts.append(("Duration", f"{whole}, evaluations aside"))
    return facts


def duration(seconds: float) -> str:
    """Return a time as people say it, such as "2 h 05 min" or "2 min 23 s"."""
    minutes, rest = divmod(round(min(seconds, 1e9)), 60)
    hours, left = divmod(minutes, 60)
    if hours:
        return f"{grouped(hours)} h {left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _planned(config: ConfigSummary) -> list[tuple[str, str]]:
    return [
        ("Iterations", config.iterations),
        ("Images per update", config.images_per_update),
        ("Learning rate", config.rate),
        ("Rate falls at", _falls(config)),
    ]


def _falls(config: ConfigSummary) -> str:
    return "; ".join(grouped(step) for step in config.steps) or "never"


def _iterations(done: int, config: ConfigSummary | None) -> str:
    if config is None or config.iterations == grouped(done):
        return grouped(done)
    return f"{grouped(done)} of {config.iterations}"


def _rate(training: Sequence[Scalars], config: ConfigSummary) -> str:
    rates = _finite(training, "lr")
    if not rates or f"{max(rates):g}" == config.rate:
        return config.rate
    return f"at most {max(rates):.4g} ({config.rate} in the config)"


def _images_per_update(training: Sequence[Scalars]) -> int | None:
    """Return the images of an update: the trainer notes images per second beside the seconds."""
    products = [
        record["time"] * record["images_per_second"]
        for record in training
        if math.isfinite(record.get("time", math.nan) * record.get("images_per_second", math.nan))
    ]
    return round(statistics.median(products)) if products else None


def _finite(training: Sequence[Scalars], key: str) -> list[float]:
    return [record[key] for record in training if math.isfinite(record.get(key, math.nan))]


def _training_images(run: Path) -> int | None:
    """Return the number of training images that the plan in log.txt names."""
    try:
        with (run / "log.txt").open("rb") as stream:
            found = _IMAGES.findall(stream.read(_LOG_BYTES).decode("utf-8", "replace"))
    except OSError:
        return None
    return int(found[-1].replace(",", "") or 0) if found else None
