"""The configs that are installed with the package."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig

from resnext_det.errors import ConfigError


def names() -> list[str]:
    """Return the names of the shipped configs, sorted; the Base configs are not among them."""
    found = (path.stem for path in _folder().glob("*.yaml"))
    return sorted(name for name in found if not name.startswith("Base-"))


def get_config_file(name: str) -> Path:
    """Return the path of a shipped config.

    Args:
        name: one of `names()`, such as "faster_rcnn_X_50_32x4d_FPN_paper".

    Raises:
        ConfigError: there is no config of this name.
    """
    if name not in names():
        raise ConfigError(f"there is no config {name!r}; there are: {', '.join(names())}")
    return _folder() / f"{name}.yaml"


def get_config(name: str) -> CfgNode:
    """Return a shipped config, read and frozen.

    Args:
        name: one of `names()`.

    Raises:
        ConfigError: there is no config of this name.
    """
    from resnext_det.config import load_config

    return load_config(get_config_file(name))


def get_lazy_config(name: str) -> DictConfig:
    """Return the LazyConfig twin of a shipped config, as Detectron2's `LazyConfig.load` reads it.

    It holds what Detectron2's tools/lazyconfig_train_net.py asks for: `model`, `dataloader`,
    `optimizer`, `lr_multiplier` and `train`, each to be changed before it is instantiated.

    Args:
        name: one of `names()`.

    Raises:
        ConfigError: there is no config of this name.
    """
    config: DictConfig = LazyConfig.load(str(get_config_file(name).with_suffix(".py")))
    return config


def _folder() -> Path:
    """Return where the configs are: in the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "Base-ResNeXt-FPN.yaml").is_file():
            return folder
    raise ConfigError(f"the configs of resnext_det are missing beside {here}; install it again.")
