"""The config keys of this package, and how a config is read."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from resnext_det.errors import ConfigError

logger = logging.getLogger(__name__)


def add_resnext_config(cfg: CfgNode) -> None:
    """Add the keys of this package to a Detectron2 config.

    The shape of the network needs none of them: MODEL.RESNETS describes it.

    Args:
        cfg: the config of `detectron2.config.get_cfg`, changed in place.
    """
    cfg.MODEL.RESNEXT = CfgNode()
    # How a block is computed (the paper's Fig. 3): "grouped" (c), the fast one, "concatenated" (b)
    # or "aggregated" (a). The function is the same; weights are converted as they are loaded.
    cfg.MODEL.RESNEXT.FORM = "grouped"
    # Stages that keep only the inputs of their blocks in training and compute the rest twice, such
    # as ["res3", "res4"]: less memory, the same gradients.
    cfg.MODEL.RESNEXT.CHECKPOINT_STAGES = []
    # Start the last norm of every block at 0, for training from scratch (1706.02677, section 5.1).
    cfg.MODEL.RESNEXT.ZERO_INIT_RESIDUAL = False
    # Every published ResNeXt has its stride in the 3x3 convolution, so the backbone refuses
    # MODEL.RESNETS.STRIDE_IN_1X1 True (Detectron2's default) above cardinality 1
    # unless this is set.
    cfg.MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1 = False
    _add_training_config(cfg)


def _add_training_config(cfg: CfgNode) -> None:
    """Add what Detectron2's trainer has no key for; read by this package's trainer alone."""
    # On another number of processes than REFERENCE_WORLD_SIZE: "accumulate" gradients over
    # micro-batches (the same images per update, the same learning rate, the same iterations),
    # "linear" (Detectron2's rule: batch, learning rate, iterations and periods), or "none".
    cfg.SOLVER.SCALING = "accumulate"
    # Images of a micro-batch on one process, where memory asks for fewer; 0 leaves it to SCALING.
    cfg.SOLVER.IMS_PER_MICRO_BATCH = 0
    # The linear rule: learning rate per image of a batch. Twice this and more needs --force.
    cfg.SOLVER.LR_PER_IMAGE = 0.02 / 16
    # Of SOLVER.AMP.ENABLED: "float16" (GPU alone) or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"
    # Updates with a loss that is not finite which are left out before the training stops.
    cfg.SOLVER.SKIP_BAD_UPDATES = 0
    # Checkpoints that are kept beside the best and the final one; 0 keeps all.
    cfg.SOLVER.KEEP_LAST = 5
    # A moving average of the weights, evaluated beside them and saved with them.
    cfg.SOLVER.EMA = CfgNode({"ENABLED": False, "DECAY": 0.9998})
    # An image that cannot be read: "stop", or "skip" it, counted and reported.
    cfg.DATALOADER.BAD_IMAGES = "stop"
    # What decides which checkpoint is the best, such as "bbox/AP" or "bbox/AP50" ("" for none),
    # and after how many evaluations without a better one the training ends (0 for never).
    cfg.TEST.BEST = CfgNode({"METRIC": "bbox/AP", "PATIENCE": 0})
    # What computes COCO's figures: "hotcoco", or "pycocotools", which takes a hundred times as
    # long; and whether both shall, and any difference be an error.
    cfg.TEST.ENGINE = "hotcoco"
    cfg.TEST.CROSS_CHECK = False
    # Losses on the first data set of DATASETS.TEST, computed with each evaluation.
    cfg.TEST.VALIDATION_LOSS = False
    # Weights & Biases, beside metrics.jsonl and TensorBoard; needs `pip install wandb`.
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
    defaults = _defaults()
    if not _lacks(cfg, defaults):
        return cfg
    full: CfgNode = cfg.clone()
    full.defrost()
    _fill(full, defaults)
    if cfg.is_frozen():
        full.freeze()
    return full


def _defaults() -> CfgNode:
    """Return every key, with its default."""
    cfg = get_cfg()
    add_resnext_config(cfg)
    return cfg


def _lacks(cfg: CfgNode, defaults: CfgNode) -> bool:
    return any(
        name not in cfg or (isinstance(value, CfgNode) and _lacks(cfg[name], value))
        for name, value in defaults.items()
    )


def _fill(cfg: CfgNode, defaults: CfgNode) -> None:
    for name, value in defaults.items():
        if name not in cfg:
            cfg[name] = value
        elif isinstance(value, CfgNode):
            _fill(cfg[name], value)


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """Read a yaml config, apply overrides and freeze it.

    MODEL.DEVICE "cuda" becomes "cpu" where there is no GPU.

    Args:
        file: a path, or the name of a shipped config (see `resnext_det.model_zoo.names`).
        overrides: KEY, VALUE, KEY, VALUE, ... as on the command line.

    Returns:
        The frozen config.

    Raises:
        ConfigError: the file is missing or no config, or a key or value is refused.
    """
    cfg = _defaults()
    path = locate_config(file)
    if len(overrides) % 2:
        raise ConfigError(
            f"overrides come in pairs, KEY VALUE, and these are {len(overrides)} words: "
            f"{' '.join(overrides)}"
        )
    for key in overrides[::2]:
        _refuse_unknown(cfg, key)
    try:
        # yaml tags would run code: allow_unsafe=False refuses them.
        cfg.merge_from_file(str(path), allow_unsafe=False)
    except KeyError as error:
        # yacs names the key only inside the sentence "Non-existent config key: A.B.C".
        key = str(error).strip("'\"").rpartition(": ")[2]
        raise ConfigError(f"{path}: {_unknown(cfg, key)}") from error
    except (
        OSError,
        ValueError,
        AssertionError,
        TypeError,
        AttributeError,
        yaml.YAMLError,
    ) as error:
        raise ConfigError(f"{path} cannot be read as a config: {error}") from error
    try:
        cfg.merge_from_list(list(overrides))
    except (ValueError, AssertionError, KeyError) as error:
        raise ConfigError(f"{' '.join(overrides)} is refused: {error}") from error
    _refuse_empty(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def _refuse_empty(cfg: CfgNode) -> None:
    """Refuse None where there was a value: yacs lets it through for any key."""
    usual = _defaults()
    for key in _keys(cfg):
        given, default = _value(cfg, key), _value(usual, key)
        if given is None and default is not None:
            raise ConfigError(f"{key} is empty (None); its default is {default!r}.")


def _value(cfg: CfgNode, key: str) -> object:
    node: Any = cfg
    for name in key.split("."):
        node = node.get(name) if isinstance(node, CfgNode) else None
    return node


def locate_config(file: str | Path) -> Path:
    """Return the path of a config.

    Args:
        file: a path, or the name of a shipped config (see `resnext_det.model_zoo.names`).

    Raises:
        ConfigError: there is neither.
    """
    from resnext_det import model_zoo

    if Path(file).is_file():
        return Path(file)
    name = str(file).removeprefix("configs/").removesuffix(".yaml")
    if name in model_zoo.names():
        return model_zoo.get_config_file(name)
    raise ConfigError(
        f"there is no config file {file}. Shipped configs are: {', '.join(model_zoo.names())}"
    )


def _refuse_unknown(cfg: CfgNode, key: str) -> None:
    if key not in set(_keys(cfg)):
        raise ConfigError(_unknown(cfg, key))


def _unknown(cfg: CfgNode, key: str) -> str:
    nearest = difflib.get_close_matches(key, list(_keys(cfg)), n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else "."
    return f"there is no config key {key}{hint}"


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
