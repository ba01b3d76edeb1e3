"""The config keys of this package, and how a config is read."""

from __future__ import annotations

import ast
import contextlib
import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, downgrade_config, get_cfg, upgrade_config

from resnext_det.config_files import read_config
from resnext_det.config_rules import refuse, value_of, wrong
from resnext_det.errors import ConfigError, quoted


def add_resnext_config(cfg: CfgNode) -> None:
    """Add the keys of this package to a Detectron2 config.

    The shape of the network needs none of them: MODEL.RESNETS describes it.

    Args:
        cfg: the config of `detectron2.config.get_cfg`, changed in place.
    """
    cfg.MODEL.RESNEXT = CfgNode()
    # Form of the blocks (the paper's Fig. 3): "grouped" (c), the fast one, "concatenated" (b) or
    # "aggregated" (a). All are the same function, and weights are converted on loading.
    cfg.MODEL.RESNEXT.FORM = "grouped"
    # Stages with activation checkpointing, such as ["res3", "res4"]: less memory, more time, the
    # same gradients.
    cfg.MODEL.RESNEXT.CHECKPOINT_STAGES = []
    # Start the last norm of every block at 0, for training from scratch (1706.02677, section 5.1).
    cfg.MODEL.RESNEXT.ZERO_INIT_RESIDUAL = False
    # Every published ResNeXt has its stride in the 3x3 convolution, so the backbone refuses
    # MODEL.RESNETS.STRIDE_IN_1X1 True (Detectron2's default) above cardinality 1
    # unless this is set.
    cfg.MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1 = False
    # Evaluate, demonstrate or resume a detector under settings that change what it computes, such
    # as other pixel statistics or anchors than those its checkpoint records.
    cfg.MODEL.RESNEXT.ALLOW_OTHER_FUNCTION = False
    _add_training_config(cfg)


def _add_training_config(cfg: CfgNode) -> None:
    """Add the keys that only this package's trainer reads."""
    # On another number of processes than REFERENCE_WORLD_SIZE: "accumulate" gradients over
    # micro-batches (the same images per update, the same learning rate, the same iterations),
    # "linear" (Detectron2's rule: batch, learning rate, iterations and periods), or "none".
    cfg.SOLVER.SCALING = "accumulate"
    # Images per micro-batch and process, to save memory; 0 leaves it to SCALING.
    cfg.SOLVER.IMS_PER_MICRO_BATCH = 0
    # The linear rule: learning rate per image of a batch. Twice this and more is warned about.
    cfg.SOLVER.LR_PER_IMAGE = 0.02 / 16
    # With SOLVER.AMP.ENABLED: "float16" (GPU only) or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"
    # How many updates with a non-finite loss to skip before aborting.
    cfg.SOLVER.SKIP_BAD_UPDATES = 0
    # How many periodic checkpoints to keep, besides the best and the final one; 0 keeps all.
    cfg.SOLVER.KEEP_LAST = 5
    # A moving average of the weights, saved and evaluated with them.
    cfg.SOLVER.EMA = CfgNode({"ENABLED": False, "DECAY": 0.9998})
    # On an image that cannot be read: "stop", or "skip", which counts and reports it.
    cfg.DATALOADER.BAD_IMAGES = "stop"
    # The metric of the best checkpoint, such as "bbox/AP" or "bbox/AP50" ("" for none), and how
    # many evaluations without a better one end the training (0 for never).
    cfg.TEST.BEST = CfgNode({"METRIC": "bbox/AP", "PATIENCE": 0})
    # Which library computes COCO's figures: "hotcoco", or "pycocotools", about a hundred times
    # slower. CROSS_CHECK runs both, and makes any difference an error.
    cfg.TEST.ENGINE = "hotcoco"
    cfg.TEST.CROSS_CHECK = False
    # Compute the losses on the first data set of DATASETS.TEST with each evaluation.
    cfg.TEST.VALIDATION_LOSS = False
    # Weights & Biases, besides metrics.jsonl and TensorBoard; needs `pip install wandb`.
    cfg.WANDB = CfgNode({"ENABLED": False, "PROJECT": "resnext_det"})


def complete(cfg: CfgNode) -> CfgNode:
    """Return a config with the default of every key that it lacks.

    A config of Detectron2's model zoo, or one that an older version wrote, lacks keys of this
    package; whoever reads them calls this first.

    Args:
        cfg: any Detectron2 config; it is not changed.

    Returns:
        The config itself if it is complete, else a copy, frozen if `cfg` is.
    """
    if not _lacks(cfg, _DEFAULTS):
        return cfg
    full: CfgNode = cfg.clone()
    full.defrost()
    _fill(full, _DEFAULTS)
    if cfg.is_frozen():
        full.freeze()
    return full


def _defaults() -> CfgNode:
    """Return every key, with its default."""
    cfg = get_cfg()
    add_resnext_config(cfg)
    return cfg


_DEFAULTS: CfgNode = _defaults()


def default_of(key: str) -> Any:
    """Return the default of a key such as "SOLVER.BASE_LR", or None if there is no such key."""
    return value_of(_DEFAULTS, key)


def _lacks(cfg: CfgNode, defaults: CfgNode) -> bool:
    return any(
        name not in cfg or (isinstance(value, CfgNode) and _lacks(cfg[name], value))
        for name, value in defaults.items()
    )


def _fill(cfg: CfgNode, defaults: CfgNode) -> None:
    for name, value in defaults.items():
        if name not in cfg:
            cfg[name] = copy.deepcopy(value)
        elif isinstance(value, CfgNode):
            _fill(cfg[name], value)


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """Read a yaml config, apply overrides and freeze it.

    MODEL.DEVICE "cuda" becomes "cpu" if there is no GPU. A number or a name where a list is meant
    becomes a list of one.

    Args:
        file: a path, or the name of a shipped config (see `resnext_det.model_zoo.names`).
        overrides: KEY, VALUE, KEY, VALUE, ... as on the command line.

    Returns:
        The frozen config.

    Raises:
        ConfigError: the file is missing or no config, or a key or value is refused; every one that
            is wrong is named.
    """
    path = locate_config(file)
    if len(overrides) % 2:
        raise ConfigError(
            f"overrides come in pairs, KEY VALUE, and these are {len(overrides)} words: "
            f"{quoted(' '.join(overrides))}"
        )
    cfg: CfgNode = _DEFAULTS.clone()
    problems: list[str] = []
    values = read_config(path)
    if _is_version_1(values):
        cfg = _upgraded(cfg, values, path)
    else:
        problems += [f"{quoted(path)}: {problem}" for problem in _merge(values, cfg, cfg)]
    for key, value in zip(overrides[::2], overrides[1::2]):
        problems += _merge(_nested(key, value), cfg, cfg)
    for key in _keys(cfg):
        value, default = value_of(cfg, key), value_of(_DEFAULTS, key)
        if value is None and default is not None:
            problems.append(f"{key} is empty (None); its default is {default!r}.")
        elif (problem := wrong(key, value)) is not None:
            problems.append(problem)
    refuse(*problems)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Return {"A": {"B": value}} for "A.B"."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


def _merge(values: Mapping[str, Any], node: CfgNode, cfg: CfgNode, prefix: str = "") -> list[str]:
    """Put values into a config, and return what cannot be put there; rules are checked later.

    Args:
        values: nested as the config is.
        node: of the config, changed in place.
        cfg: the whole config, for hints.
        prefix: of the keys of the node.
    """
    problems = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in node:
            while isinstance(value, dict) and len(value) == 1:  # the rest of the name
                ((more, value),) = value.items()
                key += f".{more}"
            problems.append(_unknown(cfg, key))
        elif isinstance(node[name], CfgNode) != isinstance(value, dict):
            group = "a group of keys" if isinstance(node[name], CfgNode) else "a single value"
            problems.append(f"{quoted(key)} is {group}, and {quoted(value)} is given.")
        elif isinstance(value, dict):
            problems += _merge(value, node[name], cfg, f"{key}.")
        else:
            node[name] = _fitted(value, value_of(_DEFAULTS, key))
    return problems


def _fitted(value: Any, default: Any) -> Any:
    """Return a value in the type of a default, where there is no doubt what is meant."""
    read = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            read = ast.literal_eval(value)
    if isinstance(default, str) and read is not None and not isinstance(read, str):
        return value  # a folder called 2024
    if isinstance(default, float) and type(read) is int:
        with contextlib.suppress(OverflowError):
            return float(read)
    if isinstance(default, list | tuple):
        if isinstance(read, list | tuple):
            return type(default)(read)
        kinds = (str,) if not default or isinstance(default[0], str) else (int, float)
        # Two to four values are coordinates, channels or stages: one of them alone is a mistake.
        if isinstance(read, kinds) and type(read) is not bool and len(default) not in (2, 3, 4):
            return type(default)([read])
    return read


def _is_version_1(values: Mapping[str, Any]) -> bool:
    """Tell whether a config is of Detectron2's first version; without VERSION as it guesses."""
    guess = any(
        name in part
        for part, name in ((values.get("MODEL"), "WEIGHT"), (values.get("TEST"), "AUG_ON"))
        if isinstance(part, dict)
    )
    version = values.get("VERSION", 1 if guess else 2)
    return type(version) is int and version == 1


def _upgraded(cfg: CfgNode, values: dict[str, Any], path: Path) -> CfgNode:
    """Merge a config of Detectron2's first version, whose keys have other names."""
    try:
        old = downgrade_config(cfg, to_version=1)
        old.merge_from_other_cfg(CfgNode(values))
        upgraded: CfgNode = upgrade_config(old)
    except (KeyError, ValueError, AssertionError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{quoted(path)}, of Detectron2's config version 1, cannot be read: {quoted(error)}"
        ) from error
    return upgraded


def locate_config(file: str | Path) -> Path:
    """Return the path of a config.

    Args:
        file: a path, or the name of a shipped config (see `resnext_det.model_zoo.names`).

    Raises:
        ConfigError: there is neither.
    """
    with contextlib.suppress(ValueError, OSError):  # of no file's name at all
        if Path(file).is_file():
            return Path(file)
    name = str(file).removeprefix("configs/").removesuffix(".yaml")
    if name in shipped_names():
        return shipped_config(name)
    raise ConfigError(
        f"there is no config file {quoted(Path(file))}. Shipped configs are: "
        f"{', '.join(shipped_names())}"
    )


def shipped_names() -> list[str]:
    """Return the names of the shipped configs, sorted; the Base configs are not among them."""
    found = (path.stem for path in _folder().glob("*.yaml"))
    return sorted(name for name in found if not name.startswith("Base-"))


def shipped_config(name: str) -> Path:
    """Return the path of a shipped config.

    Args:
        name: one of `shipped_names()`, such as "faster_rcnn_X_50_32x4d_FPN_paper".

    Raises:
        ConfigError: there is no config of this name.
    """
    if name not in shipped_names():
        raise ConfigError(
            f"there is no config {quoted(name)}; there are: {', '.join(shipped_names())}"
        )
    return _folder() / f"{name}.yaml"


def _folder() -> Path:
    """Return where the configs are: in the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "Base-ResNeXt-FPN.yaml").is_file():
            return folder
    raise ConfigError(f"the configs of resnext_det are missing beside {here}; install it again.")


def _unknown(cfg: CfgNode, key: str) -> str:
    nearest = difflib.get_close_matches(key[:200], list(_keys(cfg)), n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else "."
    shown = key if key.isprintable() and len(key) <= 100 else quoted(key, 100)
    return f"there is no config key {shown}{hint}"


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """Give every key that holds a value."""
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name
