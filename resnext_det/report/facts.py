"""Facts about a run from its files: config, executed schedule, and origin of the weights."""

from __future__ import annotations

import ast
import logging
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from resnext_det.checkpoint_file import Run, read_run
from resnext_det.config import Tree, parse_config, read_config
from resnext_det.config_rules import CLASSIFIER
from resnext_det.data.annotations import parse_annotations, read_categories
from resnext_det.data.checks import CUSTOM
from resnext_det.data.custom import read_record
from resnext_det.data.records import is_object
from resnext_det.errors import ConfigError, ResNeXtError, quoted
from resnext_det.evaluation.results_file import INFERENCE, INVALID, Scalars
from resnext_det.weights import catalog
from resnext_det.weights.converting import Record
from resnext_det.weights.reading import read_checkpoint

logger = logging.getLogger(__name__)

Facts = list[tuple[str, str]]

# fmt: off
_KEYS = (
    "MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "MODEL.ROI_HEADS.NAME",
    "MODEL.RESNETS.DEPTH", "MODEL.RESNETS.NORM", "MODEL.MASK_ON", "MODEL.KEYPOINT_ON",
    "DATASETS.TRAIN", "INPUT.FORMAT", "INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST",
    "SOLVER.BASE_LR", "SOLVER.STEPS", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH",
)
# fmt: on
_SCHEME = "resnext://"
_MOST_BYTES = 100_000_000


def run_config(run: Path) -> Tree:
    """Return config.yaml of a run's training, or else of its evaluation; empty if unreadable."""
    for file in (run / "config.yaml", run / INFERENCE / "config.yaml"):
        if file.exists():
            try:
                return read_config(file)
            except ConfigError as error:
                logger.warning("the report leaves out the config: %s", error)
                return {}
    return {}


def training_objects(run: Path, config: Tree) -> dict[str, int] | None:
    """Count the objects of each class that a run was trained on; None if they are unknown.

    Files of more than 100 MB are not read.
    """
    counts: Counter[str] = Counter()
    try:
        recorded = read_record(run)
        names = config["DATASETS"]["TRAIN"]
        for name in ast.literal_eval(names) if isinstance(names, str) else names:
            if name not in recorded and name not in DatasetCatalog:
                return None
            known = recorded.get(name)
            file = known.file if known else Path(MetadataCatalog.get(name).json_file)
            if file.stat().st_size > _MOST_BYTES:
                return None
            document = parse_annotations(file)
            classes = read_categories(document["categories"], file)
            counts.update(
                classes[each["category_id"]]
                for each in document["annotations"]
                if is_object(each) and not each.get("iscrowd") and each["category_id"] in classes
            )
    except (OSError, SyntaxError, ResNeXtError, *INVALID):
        return None
    return dict(counts) or None


def value_of(config: Tree, key: str) -> str:
    """Return the value of a dotted key as text; "" if it is missing."""
    found: object = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, list):
        return ", ".join(map(str, found))
    return "" if found is None else str(found)


def model_name(config: Tree) -> str:
    """Return a name such as "ResNeXt-50 32x4d"; "Detector" if unknown."""
    keys = ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP")
    depth, groups, width = (value_of(config, f"MODEL.RESNETS.{key}") for key in keys)
    if not (depth and groups and width):
        return "Detector"
    return f"ResNet-{depth}" if groups == "1" else f"ResNeXt-{depth} {groups}x{width}d"


def dataset_title(name: str) -> str:
    """Return a data set's name; for a custom one, that of its annotation file."""
    custom = re.fullmatch(rf"{CUSTOM}(.+)_[0-9a-f]{{8}}", name)
    return custom[1] if custom else name


def config_facts(config: Tree) -> Facts:
    """Return the main keys of a config and their values."""
    return [(key, value) for key in _KEYS if (value := value_of(config, key))]


def schedule_facts(config: Tree, training: Sequence[Scalars]) -> Facts:
    """Return the executed schedule beside the planned one.

    The two differ if the training was stopped, or if SOLVER.SCALING adapted the batch.

    Args:
        config: of the run.
        training: from `read_training`.
    """
    if not training:
        return []

    def finite(key: str) -> list[float]:
        return [one[key] for one in training if math.isfinite(one.get(key, math.nan))]

    done = round(training[-1]["iteration"]) + 1
    planned = value_of(config, "SOLVER.MAX_ITER")
    facts = [("Iterations", f"{done:,}" + (f" (config: {planned})" if planned else ""))]
    products = [
        record["time"] * record["images_per_second"]
        for record in training
        if math.isfinite(record.get("time", math.nan) * record.get("images_per_second", math.nan))
    ]
    planned = value_of(config, "SOLVER.IMS_PER_BATCH")
    if products:
        batch = f"{statistics.median(products):.0f}"
        facts.append(("Images per iteration", batch + (f" (config: {planned})" if planned else "")))
    elif planned:
        facts.append(("Images per iteration", f"{planned} (config)"))
    rates = finite("lr")
    if rates:
        facts.append(("Learning rate", f"up to {max(rates):.4g}, {rates[-1]:.4g} at the end"))
    seconds = finite("time")
    if seconds:
        hours = statistics.fmean(seconds) * done / 3600
        facts.append(("Seconds per iteration", f"{statistics.median(seconds):.3g} (median)"))
        facts.append(("Hours of training", f"{hours:,.2f}, without evaluations"))
    return facts


def weights_facts(run: Path, weights: str, config: Tree, *, trained: bool) -> Facts:
    """Return which weights were evaluated, and from which they were trained.

    Args:
        run: the run's folder.
        weights: from metrics.json: a file, an address or a catalog name.
        config: of the run.
        trained: whether the run trained.
    """
    initial = value_of(config, "MODEL.WEIGHTS")
    file = _file(run, weights)
    in_run = file is not None and file.resolve().parent == run.resolve()
    if trained and weights == initial and not in_run:
        # An evaluation during a training records the weights that the training started from.
        facts = [("Weights", "of this training"), ("Trained from", initial or "random weights")]
        return [*facts, *_source(run, initial)]
    facts = [("Weights", weights)]
    if file is not None:
        try:
            recorded = read_run(file)
            if recorded is not None and recorded.iteration is not None:
                facts.append(("Saved after iteration", f"{recorded.iteration + 1:,}"))
            if recorded is not None and recorded.config:
                tree = parse_config(recorded.config, "the recorded config")
                initial = value_of(tree, "MODEL.WEIGHTS")
        except (ResNeXtError, OSError) as error:
            logger.warning("%s: the initial weights are unknown: %s", quoted(file), error)
    facts += _source(run, weights)
    if initial and initial != weights:
        facts += [("Trained from", initial), *_source(run, initial)]
    return facts


def _source(run: Path, weights: str) -> Facts:
    found = origin(run, weights)
    return [("Source", str(found))] if found else []


def _file(run: Path, weights: str) -> Path | None:
    if not weights or "://" in weights:
        return None
    try:
        # A run that was moved still has its checkpoints in its folder.
        candidates = (Path(weights), run / Path(weights).name)
        return next((file for file in candidates if file.is_file()), None)
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Origin:
    """Where weights come from: in words, their licence, top-1 in per cent and digest, if known."""

    source: str
    licence: str | None = None
    top1: float | None = None
    sha256: str = ""

    def __str__(self) -> str:
        # Without the scheme, so that nothing in the page looks like a link.
        parts = [self.source.partition("://")[2] or self.source]
        if self.licence:
            parts.append(f"licence {self.licence}")
        if self.top1 is not None:
            parts.append(f"{self.top1:.1f} % top-1 on ImageNet-1K")
        return ", ".join(parts) + (f"; sha256 {self.sha256[:16]}\u2026" if self.sha256 else "")


def origin(run: Path, weights: str) -> Origin | None:
    """Return the origin of weights, from the catalog or the record in a file; None if unknown.

    Args:
        run: the run's folder.
        weights: MODEL.WEIGHTS.
    """
    name = weights.removeprefix(_SCHEME)
    if weights.startswith(_SCHEME) and name in catalog.ENTRIES:
        known = catalog.ENTRIES[name]
        top1 = None if known.accuracy is None else known.accuracy.top1
        return Origin(known.url, known.licence, top1)
    file = _file(run, weights)
    if file is None:
        return None
    try:
        record = Record.of(read_checkpoint(file).record)
        if record is None:
            return _pretraining(read_run(file))
    except (ResNeXtError, OSError) as error:
        logger.warning("%s: the source is unknown: %s", quoted(file), error)
        return None
    return Origin(record.name or record.source, record.licence, record.top1, record.sha256)


def _pretraining(run: Run | None) -> Origin | None:
    """Return what a classifier was trained on, if it was one of this package."""
    try:
        config = parse_config(run.config, "the recorded config") if run else {}
    except ConfigError:
        return None
    if run is None or value_of(config, "MODEL.META_ARCHITECTURE") != CLASSIFIER:
        return None
    data = Path(value_of(config, "CLASSIFICATION.DATA")).name
    iterations = f", {run.iteration + 1:,} iterations" if run.iteration is not None else ""
    return Origin(f"pretrained on {len(run.class_names):,} classes of {data}{iterations}")
