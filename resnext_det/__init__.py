"""ResNeXt for Detectron2. Importing this package registers its backbones and data sets.

It does nothing else: no download, no logging setup, no change of the environment. Without
Detectron2 it imports nothing, as in an environment that only runs exported detectors:
`resnext_det.runtime` needs neither Detectron2 nor torch.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def require_detectron2() -> None:
    """Raise one error that says what to do if Detectron2 is missing or does not import."""
    try:
        if importlib.util.find_spec("pkg_resources") is None:
            raise ImportError("pkg_resources is missing; setuptools below 81 has it")
        # The imports warn about what Detectron2's authors have to change: torch.jit.script and,
        # in its model zoo, pkg_resources.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
            import detectron2.data
            import detectron2.engine
            import detectron2.model_zoo
            import detectron2.modeling  # noqa: F401

    except Exception as error:
        raise ImportError(
            f"resnext_det needs Detectron2, and importing it failed: {type(error).__name__}: "
            f"{error}. In a checkout of resnext_det, `make setup` installs everything it needs. "
            "In another environment (setuptools below 81):\n"
            "  pip install --no-deps --upgrade --only-binary=:all: --python-version 3.10 "
            "--implementation cp --platform manylinux2014_x86_64 --target "
            '"$(python -c \'import sysconfig; print(sysconfig.get_path("purelib"))\')" '
            "sal-detectron2==0.7.2\n"
            "  pip install 'setuptools<81' cloudpickle hydra-core 'iopath<0.1.10' "
            "'omegaconf<2.4' tensorboard termcolor yacs"
        ) from error


if importlib.util.find_spec("detectron2") is not None:
    require_detectron2()

    # Imported for what they register.
    from resnext_det import data as data
    from resnext_det import hub as hub
    from resnext_det import model_zoo as model_zoo
    from resnext_det.backbones import (
        ResNeXtRes5ROIHeads,
        build_resnext_backbone,
        build_resnext_fpn_backbone,
        build_retinanet_resnext_fpn_backbone,
    )
    from resnext_det.config import add_resnext_config, load_config
    from resnext_det.data import registered as registered
    from resnext_det.engine.predictor import Predictor
    from resnext_det.modeling.resnext import ResNeXt
    from resnext_det.modeling.template import Template
    from resnext_det.prediction import Prediction
    from resnext_det.weights import fetching as fetching

    fetching.register()
    hub.register()

__all__ = [
    "Prediction",
    "Predictor",
    "ResNeXt",
    "ResNeXtRes5ROIHeads",
    "Template",
    "add_resnext_config",
    "build_resnext_backbone",
    "build_resnext_fpn_backbone",
    "build_retinanet_resnext_fpn_backbone",
    "load_config",
]

if not TYPE_CHECKING:  # a type checker would accept every name

    def __getattr__(name: str) -> object:
        """Explain why a public name is missing."""
        if name in __all__:
            require_detectron2()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
