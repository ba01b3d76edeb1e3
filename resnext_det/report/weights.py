"""Where the weights of a run came from, as far as their files and the catalog tell."""

from __future__ import annotations

import logging
from pathlib import Path

from resnext_det.checkpoint_file import read_run
from resnext_det.errors import ResNeXtError
from resnext_det.report.config import ConfigSummary, grouped, summary_of
from resnext_det.weights import catalog
from resnext_det.weights.converting import Record
from resnext_det.weights.reading import read_checkpoint

logger = logging.getLogger(__name__)

_SCHEME = "resnext://"
_NO_CONFIG = (ValueError, KeyError, TypeError)


def weights_facts(
    run: Path, weights: str, config: ConfigSummary | None, *, trained: bool
) -> list[tuple[str, str]]:
    """Return names and values that tell what was evaluated, and what that was trained from.

    Args:
        run: the run's folder.
        weights: what metrics.json says: a file, an address or a name.
        config: of the run, None where it is not known.
        trained: whether the run trained.
    """
    began_with = config.weights if config is not None else ""
    file = _file(run, weights)
    if (
        trained
        and weights == began_with
        and (file is None or file.resolve().parent != run.resolve())
    ):
        # An evaluation within a training names the weights that the training began with.
        return [
            ("Weights", "of this training"),
            ("Trained from", weights or "nothing, at random"),
            *_origin(run, weights),
        ]
    facts = [("Weights", weights)]
    if file is not None:
        iteration, told = _of_checkpoint(file)
        if iteration is not None:
            facts.append(("Written after", f"iteration {grouped(iteration + 1)}"))
        began_with = told or began_with
    facts += _origin(run, weights)
    if began_with and began_with != weights:
        facts += [("Trained from", began_with), *_origin(run, began_with)]
    return facts


def _file(run: Path, weights: str) -> Path | None:
    """Return the file of weights, where they are a file that is there."""
    if "://" in weights:
        return None
    try:
        # A run that was moved has its checkpoints in its folder still.
        candidates = (Path(weights), run / Path(weights).name)
        return next((file for file in candidates if weights and file.is_file()), None)
    except (OSError, ValueError):
        return None


def _of_checkpoint(file: Path) -> tuple[int | None, str]:
    """Return after which iteration a checkpoint was written, and what its training began with."""
    try:
        found = read_run(file)
        if found is None:
            return None, ""
        return found.iteration, summary_of(found.config).weights if found.config else ""
    except (ResNeXtError, OSError, *_NO_CONFIG) as error:
        logger.warning("%s does not tell what it was trained from: %s", file, error)
        return None, ""


def _origin(run: Path, weights: str) -> list[tuple[str, str]]:
    """Return what the catalog, or the record in a converted file, says about weights."""
    name = weights.removeprefix(_SCHEME)
    if name in catalog.ENTRIES and weights.startswith(_SCHEME):
        known = catalog.ENTRIES[name]
        top1 = None if known.accuracy is None else known.accuracy.top1
        return [("Their source", _line(known.url, known.licence, top1))]
    file = _file(run, weights)
    if file is None:
        return []
    try:
        record = Record.of(read_checkpoint(file).record)
    except (ResNeXtError, OSError) as error:
        logger.warning("%s does not tell where it came from: %s", file, error)
        return []
    if record is None:
        return []
    line = _line(record.name or record.source, record.licence, record.top1)
    return [("Their source", f"{line}; sha256 {record.sha256[:16]}\u2026")]


def _line(source: str, licence: str | None, top1: float | None) -> str:
    # Without its scheme, so that nothing in the page looks like a link.
    parts = [source.partition("://")[2] or source]
    if licence:
        parts.append(f"licence {licence}")
    if top1 is not None:
        parts.append(f"{top1:.1f} % top-1 on ImageNet-1K")
    return ", ".join(parts)
