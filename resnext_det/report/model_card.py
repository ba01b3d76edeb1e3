"""A run as a repository of the Hugging Face Hub: weights, config and model card.

Nothing else of the run folder is published, and no path of this machine.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from detectron2.config import CfgNode, get_cfg

from resnext_det.backbones import build_detector
from resnext_det.checkpoint_file import RUN, Run, read_run
from resnext_det.config import add_resnext_config, load_config, parse_config
from resnext_det.config_rules import leaves, value_of
from resnext_det.data.checks import CUSTOM
from resnext_det.engine.evaluate import of_run
from resnext_det.engine.inference import renamed, state_digest
from resnext_det.engine.recorded_config import changes, check_same_function, listed
from resnext_det.errors import EvaluationError, WeightsError, plain, quoted
from resnext_det.evaluation.coco import shown
from resnext_det.evaluation.results_file import INFERENCE, Metrics, read_metrics, read_training
from resnext_det.files import write_text
from resnext_det.hub import CARD, CONFIG, WEIGHTS, Address
from resnext_det.report.facts import (
    Facts,
    Origin,
    config_facts,
    dataset_title,
    model_name,
    origin,
    schedule_facts,
)
from resnext_det.weights.loading import load_weights
from resnext_det.weights.reading import read_tensors

_PRIVATE = ("OUTPUT_DIR", "MODEL.DEVICE", "DATASETS.PROPOSAL_*", "CLASSIFICATION.*", "WANDB.*")
_NO_PATH = ("TEST.BEST.METRIC",)  # such as "bbox/AP"
_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_IN_INDEX = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}  # as the hub calls them


@contextlib.contextmanager
def repository(run: Path, address: Address, licence: str = "") -> Iterator[list[Path]]:
    """Write the files of a repository into a temporary folder of the run, and yield them.

    Args:
        run: an evaluated run.
        address: where they are to be published, named in the card and the config.
        licence: as the hub writes it, such as "apache-2.0"; by default that of the weights the
            training started from.

    Raises:
        ConfigError: the run has no checkpoint or no config.
        DatasetError: the run has no figures.
        EvaluationError: its figures are those of other weights.
        WeightsError: its checkpoint is damaged, or was written by another program.
    """
    config, checkpoint = of_run(run)
    recorded = read_run(Path(checkpoint))
    if recorded is None or not recorded.class_names:
        raise WeightsError(
            f"{quoted(checkpoint)} does not record its classes: push the run of a training by "
            "`resnext-det train`."
        )
    metrics = read_metrics(run)
    started_from = load_config(config).MODEL.WEIGHTS
    cfg = load_config(config, ["MODEL.WEIGHTS", str(checkpoint)])
    check_same_function(cfg)
    text = shared_config(cfg, address)
    with tempfile.TemporaryDirectory(prefix=".push_", dir=run) as folder:
        card, shared, weights = (Path(folder, name) for name in (CARD, CONFIG, WEIGHTS))
        record = {
            "config": text,
            "class_names": recorded.class_names,
            "versions": dict(recorded.versions),
        }
        tensors = {name: each.clone() for name, each in read_tensors(Path(checkpoint)).items()}
        safetensors.torch.save_file(tensors, weights, {RUN: json.dumps(record)})
        model = build_detector(cfg)
        load_weights(model, renamed(cfg, str(weights)), whole_detector=True)
        if not metrics.evaluations or state_digest(model) != metrics.state_blake2b:
            raise EvaluationError(
                f"the figures of {quoted(run)} are those of other weights than "
                f"{quoted(checkpoint)}, or do not say of which. Evaluate the run again: "
                f"resnext-det eval --run {quoted(run)}"
            )
        write_text(shared, text)
        write_text(card, model_card(run, cfg, address, recorded, metrics, started_from, licence))
        yield [card, shared, weights]


def shared_config(cfg: CfgNode, address: Address) -> str:
    """Return a config for others as yaml: MODEL.WEIGHTS is the address, paths have their defaults.

    Data sets given as files are left out, as their names are of no use elsewhere.
    """
    defaults = get_cfg()
    add_resnext_config(defaults)
    shared: CfgNode = cfg.clone()
    shared.defrost()
    for key, value in list(leaves(cfg)):
        private = any(fnmatchcase(key, pattern) for pattern in _PRIVATE)
        if private or (key not in _NO_PATH and _holds_path(value)):
            shared.merge_from_list([key, value_of(defaults, key)])
    for name in ("TRAIN", "TEST"):
        public = (each for each in shared.DATASETS[name] if not each.startswith(CUSTOM))
        shared.DATASETS[name] = tuple(public)
    shared.MODEL.WEIGHTS = str(address)
    return str(shared.dump())


def _holds_path(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_path(each) for each in value)
    return isinstance(value, str) and re.search(r"[/\\~]", value) is not None


def model_card(
    run: Path,
    cfg: CfgNode,
    address: Address,
    recorded: Run,
    metrics: Metrics,
    started_from: str,
    licence: str = "",
) -> str:
    """Return README.md, with the front matter that the hub reads.

    Args:
        run: the run's folder.
        cfg: its config.
        address: of the repository.
        recorded: in its checkpoint.
        metrics: its figures.
        started_from: MODEL.WEIGHTS of its training.
        licence: as for `repository`.
    """
    tree = parse_config(shared_config(cfg, address), "the config")
    found = origin(run, started_from)
    title = f"{model_name(tree)}, {cfg.MODEL.META_ARCHITECTURE}"
    name = address.repository.rpartition("/")[2]
    front: dict[str, Any] = {
        "library_name": "resnext_det",
        "pipeline_tag": "object-detection",
        "license": licence or (found.licence.lower() if found and found.licence else "unknown"),
        "tags": ["object-detection", "resnext", "detectron2", "coco"],
        "model-index": [{"name": name, "results": _index(metrics)}],
    }
    if started_from.startswith("hf://"):
        front["base_model"] = Address.of(started_from).repository
    facts: Facts = [
        ("Trained on", ", ".join(dataset_title(each) for each in cfg.DATASETS.TRAIN)),
        ("Started from", _start(started_from, found)),
        *(fact for fact in config_facts(tree) if fact[0] != "DATASETS.TRAIN"),
        *schedule_facts(tree, read_training(run)),
    ]
    classes = ", ".join(_escaped(each) for each in recorded.class_names)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}

{title}: a detector of {len(recorded.class_names)} classes, trained with resnext_det on Detectron2.

## Use

```python
from resnext_det import Predictor
detector = Predictor("{address}")
found = detector("photo.jpg")  # .boxes, .scores, .names
```

`resnext-det eval --run {address}` evaluates it.

## Figures

{_table(["data set", "images", "of", *_FIGURES], _figures(metrics))}

In per cent. {_circumstances(metrics)}
{_settings(run, cfg)}

## Training

{_table(["", ""], [[key, value] for key, value in facts])}

Versions: {_listed(recorded.versions)}.

## Licence

{_licence(found, started_from, licence)}

## Classes

{classes}
"""


def _index(metrics: Metrics) -> list[dict[str, Any]]:
    return [
        {
            "task": {"type": "object-detection"},
            "dataset": {"type": dataset_title(each.name), "name": dataset_title(each.name)},
            "metrics": [
                {"type": _IN_INDEX[figure], "name": f"{kind} {figure}", "value": round(value, 2)}
                for figure in _IN_INDEX
                if (value := figures.figures.get(figure)) is not None
            ],
        }
        for each in metrics.evaluations
        for kind, figures in each.kinds.items()
    ]


def _figures(metrics: Metrics) -> list[list[str]]:
    return [
        [
            dataset_title(each.name),
            f"{each.image_count:,}",
            kind,
            *(shown(figures.figures.get(figure)) for figure in _FIGURES),
        ]
        for each in metrics.evaluations
        for kind, figures in each.kinds.items()
    ]


def _settings(run: Path, cfg: CfgNode) -> str:
    """Return the settings that an evaluation changed."""
    file = run / INFERENCE / "config.yaml"
    found = changes(cfg.dump(), load_config(file)) if file.is_file() else {}
    changed = {
        key: values
        for key, values in found.items()
        if key.startswith(("INPUT.", "MODEL.", "TEST."))
        and key not in ("MODEL.WEIGHTS", "MODEL.DEVICE")
    }
    return f"Settings of the evaluation: {listed(changed)}.\n" if changed else ""


def _circumstances(metrics: Metrics) -> str:
    last = metrics.evaluations[-1]
    facts = {
        "evaluated": last.date[:10],
        "precision": metrics.precision,
        "figures by": last.engine,
        "hardware": metrics.hardware,
        "versions": _listed(metrics.versions),
        "commit": metrics.commit,
    }
    return "; ".join(f"{key}: {value}" for key, value in facts.items() if value) + "."


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in versions.items())


def _start(weights: str, found: Origin | None) -> str:
    """Return the weights that a training started from, without their path."""
    if not weights:
        return "random weights"
    name = weights if "://" in weights else re.split(r"[/\\]", weights)[-1]
    return f"{name} ({found})" if found else name


def _licence(found: Origin | None, weights: str, licence: str) -> str:
    if not weights:
        return f"Trained from random weights. Licence: {licence or 'not stated'}."
    if found is None or found.licence is None:
        return (
            f"The licence of the weights that the training started from, {_start(weights, found)}, "
            f"is not recorded. Licence of this detector: {licence or 'not stated'}."
        )
    text = f"The training started from weights under {found.licence}."
    if "-NC" in found.licence.upper():
        text += " **That licence does not allow commercial use.**"
    return f"{text} Licence of this detector: {licence or found.licence}."


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Return text on one line that Markdown takes literally."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", plain(text, 500))
