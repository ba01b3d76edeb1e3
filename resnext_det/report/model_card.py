"""A run as a repository of the Hugging Face Hub: weights, config and model card.

Nothing else of the run folder is published, and no path of this machine.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from detectron2.config import CfgNode, get_cfg

from resnext_det.backbones import build_detector
from resnext_det.checkpoint_file import RUN, Run, read_run
from resnext_det.config import add_resnext_config, config_of, load_config, parse_config
from resnext_det.config_rules import leaves, value_of
from resnext_det.data.checks import CUSTOM
from resnext_det.engine.evaluate import of_run
from resnext_det.engine.inference import renamed, state_digest
from resnext_det.engine.recorded_config import changes, check_same_function, listed
from resnext_det.errors import EvaluationError, WeightsError, plain, quoted
from resnext_det.evaluation.coco import shown
from resnext_det.evaluation.results_file import INFERENCE, Metrics, read_metrics, read_training
from resnext_det.files import write_text
from resnext_det.hub import CARD, CONFIG, SCHEME, WEIGHTS, Address
from resnext_det.report.facts import (
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
    config, found = of_run(run)
    checkpoint, cfg = Path(found), load_config(config)
    recorded = read_run(checkpoint)
    if recorded is None or not recorded.class_names:
        raise WeightsError(
            f"{quoted(checkpoint)} does not record its classes: push the run of a training by "
            "`resnext-det train`."
        )
    metrics = read_metrics(run)
    check_same_function(renamed(cfg, str(checkpoint)))
    text = shared_config(cfg, address)
    record = {"class_names": recorded.class_names, "versions": dict(recorded.versions)}
    header = {RUN: json.dumps({**record, "config": text})}
    with tempfile.TemporaryDirectory(prefix=".push_", dir=run) as folder:
        card, shared, weights = (Path(folder, name) for name in (CARD, CONFIG, WEIGHTS))
        tensors = {name: each.clone() for name, each in read_tensors(checkpoint).items()}
        safetensors.torch.save_file(tensors, weights, header)
        model = build_detector(cfg)
        load_weights(model, renamed(cfg, str(weights)), whole_detector=True)
        if not metrics.evaluations or state_digest(model) != metrics.state_blake2b:
            raise EvaluationError(
                f"the figures of {quoted(run)} are of other weights than {quoted(checkpoint)}, or "
                "do not record theirs. Evaluate the run again: "
                f"resnext-det eval --run {quoted(run)}"
            )
        write_text(shared, text)
        write_text(card, model_card(run, cfg, address, recorded, metrics, licence))
        weights.chmod(card.stat().st_mode)  # safetensors makes files that only their owner reads
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
    run: Path, cfg: CfgNode, address: Address, recorded: Run, metrics: Metrics, licence: str = ""
) -> str:
    """Return README.md, with the front matter that the hub reads.

    Args:
        run: the run's folder.
        cfg: its config; MODEL.WEIGHTS is what its training started from.
        address: of the repository.
        recorded: in its checkpoint.
        metrics: its figures.
        licence: as for `repository`.
    """
    tree = parse_config(shared_config(cfg, address), "the config")
    name, count = address.repository.rpartition("/")[2], len(recorded.class_names)
    source = origin(run, cfg.MODEL.WEIGHTS) or Origin("")
    start = _start(cfg.MODEL.WEIGHTS, source)
    front: dict[str, Any] = {
        "library_name": "resnext_det",
        "pipeline_tag": "object-detection",
        "license": licence or (source.licence or "unknown").lower(),
        "tags": ["object-detection", "resnext", "detectron2"],
        "model-index": [{"name": name, "results": _index(metrics)}],
    }
    if cfg.MODEL.WEIGHTS.startswith(SCHEME):
        front["base_model"] = Address.of(cfg.MODEL.WEIGHTS).repository
    facts = [
        ("Trained on", ", ".join(dataset_title(each) for each in cfg.DATASETS.TRAIN)),
        ("Started from", start),
        *(fact for fact in config_facts(tree) if fact[0] != "DATASETS.TRAIN"),
        *schedule_facts(tree, read_training(run)),
    ]
    rows = [
        [title, images, kind, *(shown(figures.get(figure)) for figure in _FIGURES)]
        for title, images, kind, figures in _evaluated(metrics)
    ]
    non_commercial = "-NC" in (source.licence or "").upper()
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}

{model_name(tree)}, {cfg.MODEL.META_ARCHITECTURE}: a detector of {count} classes, trained with
resnext_det on Detectron2.

## Use

```python
from resnext_det import Predictor
detector = Predictor("{address}")
found = detector("photo.jpg")  # .boxes, .scores, .names
```

`resnext-det eval --run {address}` evaluates it.

## Figures

{_table(["data set", "images", "of", *_FIGURES], rows)}

In per cent. {_circumstances(metrics)}{_settings(run, cfg, address)}

## Training

{_table(["", ""], facts)}

Versions: {_escaped(_listed(recorded.versions))}.

## Licence

{_escaped(licence or source.licence or "Not stated")}. The training started from {_escaped(start)}.
{"**Those weights may not be used commercially.**" if non_commercial else ""}

## Classes

{", ".join(_escaped(each) for each in recorded.class_names)}
"""


def _evaluated(metrics: Metrics) -> Iterator[tuple[str, str, str, dict[str, float | None]]]:
    """Yield data set, number of images, kind and figures of each evaluation."""
    for each in metrics.evaluations:
        for kind, found in each.kinds.items():
            yield dataset_title(each.name), f"{each.image_count:,}", kind, found.figures


def _index(metrics: Metrics) -> list[dict[str, Any]]:
    return [
        {
            "task": {"type": "object-detection"},
            "dataset": {"type": title, "name": title},
            "metrics": [
                {"type": _IN_INDEX[figure], "name": f"{kind} {figure}", "value": round(value, 2)}
                for figure in _IN_INDEX
                if (value := figures.get(figure)) is not None
            ],
        }
        for title, _, kind, figures in _evaluated(metrics)
    ]


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
    return "; ".join(f"{key}: {_escaped(value)}" for key, value in facts.items() if value) + "."


def _settings(run: Path, cfg: CfgNode, address: Address) -> str:
    """Return the settings that the evaluation changed, without those of training."""
    file = run / INFERENCE / "config.yaml"
    if not file.is_file():
        return ""
    then = config_of(parse_config(shared_config(load_config(file), address), "the config"))
    found = changes(shared_config(cfg, address), then).items()
    changed = {key: both for key, both in found if key.startswith(("INPUT.", "MODEL.", "TEST."))}
    return f" Changed for the evaluation: {listed(changed)}." if changed else ""


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in versions.items())


def _start(weights: str, source: Origin) -> str:
    """Return the weights that a training started from, without their path."""
    public = weights.startswith(("resnext://", "detectron2://", SCHEME))
    name = weights if public else re.split(r"[/\\]", weights.partition("?")[0])[-1]
    return f"{name} ({source})" if source.source else name or "random weights"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Return text on one line that Markdown takes literally."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", plain(text, 500))
