"""What the shipped configs reached here: one small JSON file for each, made from a run's folder."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from resnext_det import model_zoo
from resnext_det.data.registered import TOY_MINIVAL
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
from resnext_det.zoo_page.origin import began_with, evaluated_checkpoint
from resnext_det.zoo_page.shipped import read_config, shipped_config

_TEST_IMAGES = {MINIVAL: 5000, TOY_MINIVAL: ToySpec().val_images}


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
        weights: the run's checkpoint that was evaluated, a file name.
        weights_sha256: of that file.
        trained_from: what the training began with, in words.
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
    weights: str
    weights_sha256: str
    trained_from: str


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
            **{
                name: _matches("[0-9a-f]{64}", getattr(result, name))
                for name in ("metrics_sha256", "weights_sha256")
            },
            "versions": isinstance(result.versions, dict)
            and all(map(_is_line, [*result.versions, *result.versions.values()])),
            **{
                name: _is_line(getattr(result, name))
                for name in ("command", "hardware", "dataset", "weights", "trained_from")
            },
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
        run: the folder of a training that was evaluated: config.yaml, metrics.jsonl, metrics.json,
            and the checkpoint that was evaluated.
        command: that made it, to stand beside the figures.

    Raises:
        DatasetError: a file is missing or broken, the training is not finished, or the evaluation
            is none of the whole test set.
        ConfigError: it is no run of a shipped config, it began with weights that saw more than
            ImageNet-1K, or the command is no line of text.
        WeightsError: the figures are not of its last checkpoint, or that cannot be read.
    """
    if not _is_line(command):
        raise ConfigError(f"--command {command!r} must be one line, without ` | < and >.")
    metrics = read_metrics(run)
    config = read_config(run / "config.yaml")
    name = shipped_config(config, run)
    iterations = model_zoo.get_config(name).SOLVER.MAX_ITER
    _check_finished(run, iterations)
    checkpoint = evaluated_checkpoint(
        run, metrics.weights, str(config.get("OUTPUT_DIR", "")), name, iterations
    )
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
        weights=checkpoint.file.name,
        weights_sha256=checkpoint.sha256,
        trained_from=began_with(checkpoint.began_with, run),
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
