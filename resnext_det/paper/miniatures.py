"""Experiments in miniature: their data, the trainings they need, and what these gave."""

from __future__ import annotations

import importlib.resources
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from PIL import Image

from resnext_det.data.toy import ToySpec, write_toy_coco
from resnext_det.environment import commit, hardware, versions
from resnext_det.errors import ConfigError, DatasetError, TrainingError, quoted
from resnext_det.evaluation.results_file import read_training
from resnext_det.files import open_regular, write_json, written_beside
from resnext_det.modeling.complexity import network_complexity
from resnext_det.modeling.template import Cost
from resnext_det.paper.tables import network_name

RESULTS = "paper.json"
QUICK_UPDATES = 3
_RESULT = "result.json"
_CIFAR = "cifar-10-batches-py"
_TRAIN_ERROR = "train/top1_error"
_CURVE_POINTS = 20

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """A training that an experiment needs; experiments share equal ones.

    Attributes:
        data: its name in miniatures.yaml.
        network: the name of the network.
        seed: of the training, and of the data if they are drawn.
        folder: of the run.
        words: of `resnext-det pretrain`, without the program.
    """

    data: str
    network: str
    seed: int
    folder: Path
    words: tuple[str, ...]


def definitions() -> dict[str, Any]:
    """Return the content of miniatures.yaml."""
    text = importlib.resources.files(__package__).joinpath("miniatures.yaml").read_text("utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def chosen(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the experiments of these names, or all.

    Raises:
        ConfigError: no experiment has this name.
    """
    experiments: list[dict[str, Any]] = definitions()["experiments"]
    known = [each["name"] for each in experiments]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--only {quoted(unknown[0])}: choose among {', '.join(known)}.")
    return [each for each in experiments if not names or each["name"] in names]


def trainings(experiment: Row, folder: Path, seeds: int, quick: bool) -> list[Training]:
    """Return the trainings of an experiment, seed by seed.

    Args:
        experiment: of miniatures.yaml.
        folder: of all miniatures.
        seeds: how many; 0 for the experiment's own number.
        quick: whether to make a few updates on little data only.
    """
    data = definitions()["data"][experiment["data"]]
    side = str(data["side"])
    settings = {
        **data["overrides"],
        "CLASSIFICATION.CROP": side,
        "CLASSIFICATION.RESIZE": side,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": data["network"]["stem_out_channels"],
        "MODEL.RESNETS.RES2_OUT_CHANNELS": data["network"]["res2_out_channels"],
        "SOLVER.MAX_EPOCHS": 0.0,
        "SOLVER.CHECKPOINT_PERIOD": 1_000_000,
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
        "DATALOADER.NUM_WORKERS": 0,
    }
    if quick:
        settings |= {"SOLVER.MAX_ITER": QUICK_UPDATES, "SOLVER.WARMUP_ITERS": 0}
        settings |= {"SOLVER.STEPS": (), "TEST.EVAL_PERIOD": 2}
    found = []
    for seed in range(seeds or experiment["seeds"]):
        for network in experiment["networks"]:
            name = network_name(network)
            run = "_".join([experiment["data"], *name.replace(",", "").split(), str(seed)])
            words = ["--recipe", data["recipe"], "--output", str(folder / "runs" / run)]
            words += ["--data", str(data_folder(folder, experiment["data"], seed, quick))]
            words += ["--depth", str(network["depth"]), "--template", network["template"]]
            words += [str(word) for pair in settings.items() for word in pair]
            words += ["MODEL.RESNEXT.SHORTCUTS", str(network.get("shortcuts", True))]
            words += ["SEED", str(seed)]
            found.append(
                Training(experiment["data"], name, seed, folder / "runs" / run, tuple(words))
            )
    return found


def data_folder(folder: Path, data: str, seed: int, quick: bool) -> Path:
    """Return where the data of a training lie: digits are drawn for each seed, crops once."""
    name = f"{data}{'_quick' * quick}"
    return folder / "data" / (f"{name}_{seed}" if data == "digits" else name)


def prepare_data(training: Training, folder: Path, quick: bool) -> None:
    """Write the data of a training, unless they are there.

    Raises:
        ConfigError: scikit-learn is missing.
        ResNeXtError: they cannot be written.
    """
    settings = definitions()["data"][training.data]
    target = data_folder(folder, training.data, training.seed, quick)
    images = settings["quick_train" if quick else "train"]
    if training.data != "digits":
        write_toy_coco(target, ToySpec(train_images=images, val_images=images))
    elif not (target / _CIFAR / "test_batch").is_file():  # the last to be written
        _write_digits(target / _CIFAR, training.seed, images, 4 * images if quick else None)


def _write_digits(folder: Path, seed: int, train: int, most: int | None) -> None:
    """Write scikit-learn's digits as the files of CIFAR-10's Python version."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the miniatures on digits need scikit-learn: pip install scikit-learn."
        ) from error
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))[:most]
    pictures = [Image.fromarray(each) for each in (digits.images[order] * 15.9375).astype(np.uint8)]
    size, method = (32, 32), Image.Resampling.BICUBIC
    large = np.stack([np.asarray(each.resize(size, method)) for each in pictures])
    pixels = np.repeat(large.reshape(len(large), 1, -1), 3, axis=1).reshape(len(large), -1)
    labels = digits.target[order].tolist()
    contents: dict[str, Any] = {"batches.meta": {"label_names": [str(each) for each in range(10)]}}
    pieces = [*np.array_split(np.arange(train), 5), np.arange(train, len(order))]
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name, piece in zip(names, pieces):
        contents[name] = {"data": pixels[piece], "labels": [labels[each] for each in piece]}
    for name, content in contents.items():
        with written_beside(folder / name) as beside:
            beside.write_bytes(pickle.dumps(content, protocol=2))


def result_of(training: Training) -> dict[str, Any] | None:
    """Return what a finished training gave; None if it must be run, or run again."""
    file = training.folder / _RESULT
    if not file.is_file():
        return None
    try:
        with open_regular(file) as stream:
            found: dict[str, Any] = json.load(stream)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{quoted(file)} cannot be read: {quoted(error)}. Remove it.") from error
    return found if found["words"] == list(training.words) else None


def summarize(training: Training, seconds: float) -> None:
    """Write the result of a training that has just ended, and drop its checkpoints.

    Args:
        training: whose log gives the figures: errors in per cent, at the end, of the test, and of
            the last tenth of the updates in training.
        seconds: that it took.

    Raises:
        TrainingError: its log lacks them.
    """
    rows = read_training(training.folder)
    tested = [(row["iteration"] + 1, 100 - row["top1"]) for row in rows if "top1" in row]
    trained = [(row["iteration"] + 1, row[_TRAIN_ERROR]) for row in rows if _TRAIN_ERROR in row]
    if not tested or not trained:
        raise TrainingError(f"{quoted(training.folder)} has no errors in metrics.jsonl.")
    parts = np.array_split(np.array(trained), min(_CURVE_POINTS, len(trained)))
    curve = [[float(part[:, 0].mean()), float(part[:, 1].mean())] for part in parts]
    result = {
        "words": list(training.words),
        "error": tested[-1][1],
        "train_error": fmean(error for _, error in trained[-max(1, len(trained) // 10) :]),
        "test_curve": tested,
        "train_curve": curve,
        "seconds": round(seconds, 1),
    }
    write_json(training.folder / _RESULT, result)
    for file in training.folder.glob("*.pth"):
        file.unlink()


def cost_of(network: Row, data: Row) -> Cost:
    """Return what a network of an experiment costs, for one image of its data."""
    side, switches = data["side"], {"shortcuts": network.get("shortcuts", True), **data["network"]}
    total = network_complexity(
        network["depth"], network["template"], side, side, data["classes"], **switches
    ).total
    return Cost(total.parameters, total.multiply_adds)


def collect(experiments: Iterable[Row], folder: Path, seeds: int, quick: bool) -> dict[str, Any]:
    """Return the results of experiments whose trainings have all finished, for `RESULTS`."""
    found: dict[str, Any] = {}
    for experiment in experiments:
        data = definitions()["data"][experiment["data"]]
        results = [
            (each.network, result_of(each)) for each in trainings(experiment, folder, seeds, quick)
        ]
        networks: list[dict[str, Any]] = []
        for network in experiment["networks"]:
            name = network_name(network)
            ours = [result for owner, result in results if owner == name and result]
            networks.append({"network": name, **asdict(cost_of(network, data))})
            for key in ("error", "train_error", "seconds"):
                networks[-1][key] = [round(result[key], 3) for result in ours]
            for key in ("test_curve", "train_curve"):
                mean = np.mean([result[key] for result in ours], axis=0)
                networks[-1][key] = mean.round(3).tolist()
        found[experiment["name"]] = {
            "networks": networks,
            "quick": quick,
            "date": datetime.now().date().isoformat(),
            "versions": versions(),
            "hardware": hardware(),
            "commit": commit(),
        }
    return found


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results of a folder; empty without any.

    Raises:
        DatasetError: the file cannot be read.
    """
    file = folder / RESULTS
    if not file.is_file():
        return {}
    try:
        with open_regular(file) as stream:
            found: dict[str, Any] = json.load(stream)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{quoted(file)} cannot be read: {quoted(error)}.") from error
    return found
