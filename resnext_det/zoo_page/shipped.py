"""Which shipped config a run is one of."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from resnext_det import model_zoo
from resnext_det.config import add_resnext_config
from resnext_det.errors import ConfigError, DatasetError
from resnext_det.published.setting import setting_of

_MOST_BYTES = 1_000_000  # of a config.yaml; a dumped one has 9,000

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


def read_config(path: Path) -> Mapping[str, Any]:
    """Read a config.yaml of any origin.

    Raises:
        DatasetError: it is missing, or no config.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DatasetError(f"{path} is too large for a config.")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as a config: {error}") from error
    return config_of(text, path)


def config_of(text: str, source: Path) -> Mapping[str, Any]:
    """Return the config that a text in YAML is; source is named in messages.

    Raises:
        DatasetError: it is none.
    """
    if len(text) > _MOST_BYTES:
        raise DatasetError(f"{source} is too large for a config.")
    try:
        found = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise DatasetError(f"{source} cannot be read as a config: {error}") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{source} is no config: name the folder of a training.")
    return found


def shipped_config(given: Mapping[str, Any], source: Path) -> str:
    """Return the name of the shipped config that a config is, but for what changes no result.

    Args:
        given: see `read_config`.
        source: named in the message.

    Raises:
        ConfigError: it is none of them.
    """
    found = {name: list(changes(given, name)) for name in model_zoo.names()}
    nearest = min(found, key=lambda name: len(found[name]))
    if found[nearest]:
        raise ConfigError(
            f"{source} is no run of a shipped config. The nearest is {nearest}, and unlike there: "
            f"{', '.join(found[nearest][:5])}."
        )
    return nearest


def changes(given: Mapping[str, Any], name: str) -> Iterator[str]:
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
