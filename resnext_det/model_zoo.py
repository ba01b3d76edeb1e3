"""The configs that are installed with the package."""

from __future__ import annotations

from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig

from resnext_det.config import load_config, shipped_config, shipped_names

names = shipped_names
get_config_file = shipped_config


def get_config(name: str) -> CfgNode:
    """Return a shipped config, frozen.

    Args:
        name: one of `names()`.

    Raises:
        ConfigError: there is no such config.
    """
    return load_config(get_config_file(name))


def get_lazy_config(name: str) -> DictConfig:
    """Return the LazyConfig twin of a shipped config, as Detectron2's `LazyConfig.load` reads it.

    It has all that Detectron2's tools/lazyconfig_train_net.py needs: `model`, `dataloader`,
    `optimizer`, `lr_multiplier` and `train`.

    Args:
        name: one of `names()`.

    Raises:
        ConfigError: there is no such config.
    """
    config: DictConfig = LazyConfig.load(str(get_config_file(name).with_suffix(".py")))
    return config
