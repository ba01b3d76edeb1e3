"""What the shipped configs reached here: one small JSON file for each, made from a run's folder."""

from __future__ import annotations

import ast
import datetime
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from resnext_det import model_zoo
from resnext_det.config import add_resnext_config
from resnext_det.data.splits import TOY_MINIVAL
from resnext_det.data.toy import ToySpec
from resnext_det.errors import ConfigError, DatasetError
from resnext_det.evaluation.run_folder import (
    Evaluation,
    Metrics,
    read_json,
    read_metrics,
    read_training,
)
from resnext_det.files import write_json
from resnext_det.published.setting import MINIVAL, setting_of

_MOST_BYTES = 1_000_000  # of a config.yaml; a dumped one has 9,000
_TEST_IMAGES = {MINIVAL: 5000, TOY_MINIVAL: ToySpec().val_images}

_SAME_RESULT = {
    # How and where it is computed, and how often it is saved and looked at.
    *("MODEL.WEIGHTS", "MODEL.DEVICE", "OUTPUT_DIR", "SEED", "VERSION", "VIS_PERIOD"),
    *("CUDNN_BENCHMARK", "DATALOADER.NUM_WORKERS", "DATALOADER.BAD_IMAGES"),
    *("MODEL.RESNEXT.FORM", "MODEL.RESNEXT.CHECKPOINT_STAGES"),
    *("SOLVER.SCALING", "SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.IMS_PER_MICRO_BATCH"),
    *("SOLVER.LR_PER_IMAGE", "SOLVER.AMP.ENABLED", "SOLVER.AMP.PRECISION"),
    *("SOLVER.SKIP_BAD_UPDATES", "SOLVER.KEEP_LAST", "SOLVER.CHECKPOINT_PERIOD"),
    *("TEST.EVAL_PERIOD", "TEST.VALIDATION_LOSS", "TEST.EXPECTED_RESULTS", "TEST.BEST.METRIC"),
    *("WANDB.ENABLED", "WANDB.PROJECT"),
    # Compared by what their names stand for.
    *("DATASETS.TRAIN", "DATASETS.TEST"),
}
"""Keys in which a run may differ from a shipped config and still be a run of it."""


@dataclass(frozen=True)
class OwnResult:
    """What a shipped config reached.

    Attributes:
        config: its name.
        dataset: that it was evaluated on, as it is registered.
        images: that it was evaluated on.
        AP: of boxes, averaged over IoU 0.50 to 0.95, in percent.
        AP50: of boxes at IoU 0.50, in percent.
        command: that made it.
        hardware: that it was evaluated with.
        versions: of Python and the packages, by name.
        date: of the evaluation, YYYY-MM-DD.
        metrics_sha256: of the run's metrics.json, in hexadecimal digits.
    """

    config: str
    dataset: str
    images: int
    AP: float
    AP50: float
    command: str
    hardware: str
    versions: Mapping[str, str]
    date: str
    metrics_sha256: str


def read_results(folder: Path) -> dict[str, OwnResult]:
    """Return the results in a folder, by the name of the config.

    Args:
        folder: with NAME.json for any of the shipped configs; it need not be there.

    Raises:
        DatasetError: a file that is no result of the config it is named after.
    """
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


def _read(path: Path) -> OwnResult:
    document = read_json(path, "write it with tools/model_zoo.py --add RUN")
    expected = {field.name for field in fields(OwnResult)}
    if not isinstance(document, dict) or set(document) != expected:
        raise DatasetError(f"{path} must hold {', '.join(sorted(expected))}, and nothing else.")
    result = OwnResult(**document)
    wrong = [
        name
        for name, right in {
            "config": result.config == path.stem and path.stem in model_zoo.names(),
            "AP": _is_percent(result.AP),
            "AP50": _is_percent(result.AP50),
            "images": isinstance(result.images, int) and result.images > 0,
            "date": _matches(r"\d{4}-\d\d-\d\d", result.date),
            "metrics_sha256": _matches("[0-9a-f]{64}", result.metrics_sha256),
            "versions": isinstance(result.versions, dict)
            and all(map(_is_line, [*result.versions, *result.versions.values()])),
            **{name: _is_line(getattr(result, name)) for name in ("command", "hardware")},
            "dataset": _is_line(result.dataset),
        }.items()
        if not right
    ]
    if wrong:
        raise DatasetError(f"{path}: {', '.join(wrong)} cannot be true; write the file again.")
    return result


def _is_percent(value: object) -> bool:
    return isinstance(value, float) and 0 <= value <= 100


def _matches(pattern: str, value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_line(value: object) -> bool:
    """Whether it is text that cannot break out of a line or a cell of the page."""
    return _matches(r"[^\n\r`|<>]{1,500}", value)


def write_result(folder: Path, result: OwnResult) -> Path:
    """Write a result to NAME.json in a folder, in place of an earlier one, and return the file.

    Raises:
        ResNeXtError: it cannot be written.
    """
    target = folder / f"{result.config}.json"
    write_json(target, asdict(result))
    return target


def result_of_run(run: Path, command: str) -> OwnResult:
    """Return what a run of a shipped config reached.

    Args:
        run: the folder of a training that was evaluated: config.yaml, metrics.jsonl, metrics.json.
        command: that made it, to stand beside the figures.

    Raises:
        DatasetError: a file is missing or broken, the training is not finished, or the evaluation
            is none of the whole test set.
        ConfigError: it is no run of a shipped config, or the command is no line of text.
    """
    if not _is_line(command):
        raise ConfigError(f"--command {command!r} must be one line, without ` | < and >.")
    metrics = read_metrics(run)
    name = _shipped_config(run)
    _check_finished(run, model_zoo.get_config(name).SOLVER.MAX_ITER)
    evaluation = _evaluation(run, metrics, name)
    AP, AP50 = evaluation.figures.get("AP"), evaluation.figures.get("AP50")
    if AP is None or AP50 is None:
        raise DatasetError(f"{run / 'metrics.json'} has no AP and AP50: evaluate the run again.")
    file = run / "metrics.json"
    written = datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.timezone.utc)
    return OwnResult(
        *(name, evaluation.name, evaluation.image_count, AP, AP50),
        command=command,
        hardware=metrics.hardware,
        versions=metrics.versions,
        date=written.date().isoformat(),
        metrics_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )


def _check_finished(run: Path, iterations: int) -> None:
    last = max((record["iteration"] for record in read_training(run)), default=-1)
    if last < iterations - 1:
        raise DatasetError(
            f"{run} is no finished training: its metrics.jsonl ends at iteration {last + 1:g} of "
            f"{iterations:,}. Go on with it: tools/train_net.py --resume."
        )


def _evaluation(run: Path, metrics: Metrics, name: str) -> Evaluation:
    """Return the evaluation on the whole test set of a config."""
    wanted = setting_of(model_zoo.get_config(name)).test_set or ""
    for evaluation in metrics.evaluations:
        found = setting_of({"DATASETS": {"TEST": [evaluation.name]}}).test_set
        if found == wanted and evaluation.image_count == _TEST_IMAGES[wanted]:
            return evaluation
    raise DatasetError(
        f"{run / 'metrics.json'} has no evaluation on the {_TEST_IMAGES[wanted]:,} images of "
        f"{wanted}: evaluate the run with tools/train_net.py --config-file {name} --eval-only."
    )


def _shipped_config(run: Path) -> str:
    """Return the name of the config that a run is one of."""
    given = _read_config(run / "config.yaml")
    changes = {name: list(_changes(given, name)) for name in model_zoo.names()}
    nearest = min(changes, key=lambda name: len(changes[name]))
    if changes[nearest]:
        raise ConfigError(
            f"{run} is no run of a shipped config. The nearest is {nearest}, and unlike there: "
            f"{', '.join(changes[nearest][:5])}."
        )
    return nearest


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DatasetError(f"{path} is too large for a config.")
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DatasetError(f"{path} cannot be read as a config: {error}") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{path} is no config: name the folder of a training.")
    return found


def _changes(given: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield every key, and the shipped value, in which a config is not the shipped one."""
    shipped = model_zoo.get_config(name)
    theirs, ours = setting_of(given), setting_of(shipped)
    if theirs.train_set != ours.train_set:
        yield f"DATASETS.TRAIN {ours.train_set}"
    if theirs.test_set != ours.test_set:
        yield f"DATASETS.TEST {ours.test_set}"
    defaults = dict(_leaves(_default_config()))
    for key, value in _leaves(shipped):
        found: Any = given
        for part in key.split("."):
            # What a config does not say has its default: keys are added from version to version.
            found = found.get(part, defaults[key]) if isinstance(found, dict) else defaults[key]
        if key not in _SAME_RESULT and not _same(found, value):
            yield f"{key} {value}"


def _default_config() -> CfgNode:
    cfg = get_cfg()
    add_resnext_config(cfg)
    return cfg


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _same(found: Any, value: Any) -> bool:
    """Whether a value out of yaml is the config's; it is looked at no deeper than the config is."""
    if not isinstance(value, list | tuple):
        return not isinstance(found, list | tuple | dict) and found == value
    if isinstance(found, str) and len(found) < 1000:
        # yacs dumps some tuples as text.
        try:
            found = ast.literal_eval(found)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return False
    return (
        isinstance(found, list | tuple)
        and len(found) == len(value)
        and all(map(_same, found, value))
    )
