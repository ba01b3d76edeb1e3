"""A summary of a run's config."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnext_det import config_files
from resnext_det.data.checks import CUSTOM
from resnext_det.errors import ConfigError
from resnext_det.evaluation.results_file import INFERENCE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConfigSummary:
    """What the report shows of a config.

    Attributes:
        depth: layers of the backbone; 0 where that is no number.
        template: of the backbone, for example "32x4d".
        model: for example "ResNeXt-50 32x4d".
        facts: names and values to show, in order.
        iterations: SOLVER.MAX_ITER, as text.
        images_per_update: SOLVER.IMS_PER_BATCH, as text.
        rate: SOLVER.BASE_LR, as text.
        steps: the iterations at which the learning rate falls.
        weights: MODEL.WEIGHTS; "" for none.
    """

    depth: int
    template: str
    model: str
    facts: list[tuple[str, str]]
    iterations: str
    images_per_update: str
    rate: str
    steps: list[int]
    weights: str


def read_config(run: Path) -> ConfigSummary | None:
    """Read config.yaml of a run's training or, if there is none, of its evaluation.

    Args:
        run: the run's folder.

    Returns:
        A summary, or None if there is no such file or it is no config, which is logged.
    """
    candidates = run / "config.yaml", run / INFERENCE / "config.yaml"
    path = next((file for file in candidates if file.exists()), None)
    if path is None:
        return None
    try:
        return _summary(config_files.read_config(path))
    except (ConfigError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read, so the report leaves the config out: %s", path, error)
        return None


def summary_of(text: str) -> ConfigSummary:
    """Return the summary of a config.

    Args:
        text: YAML without tags.

    Raises:
        ConfigError, KeyError, TypeError, ValueError: it is no config.
    """
    return _summary(config_files.parse_config(text, "the recorded config"))


def _summary(config: config_files.Tree) -> ConfigSummary:
    model, solver = config["MODEL"], config["SOLVER"]
    resnets = model["RESNETS"]
    template = f"{resnets['NUM_GROUPS']}x{resnets['WIDTH_PER_GROUP']}d"
    # A tuple may have been dumped as a list or as the text "(320,)".
    steps = [int(digits) for digits in re.findall(r"\d+", str(solver["STEPS"]))]
    depth = resnets["DEPTH"]
    family = "ResNet" if template == "1x64d" else "ResNeXt"
    return ConfigSummary(
        depth=depth if isinstance(depth, int) else 0,
        template=template,
        model=f"{family}-{depth}" + ("" if family == "ResNet" else f" {template}"),
        facts=[("Depth", f"{depth} layers"), ("Template", template), *_facts(config)],
        iterations=grouped(solver["MAX_ITER"]),
        images_per_update=str(solver["IMS_PER_BATCH"]),
        rate=str(solver["BASE_LR"]),
        steps=steps,
        weights=str(model.get("WEIGHTS") or ""),
    )


def _facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    sizes = {
        "training": _sizes(config, "MIN_SIZE_TRAIN"),
        "testing": _sizes(config, "MIN_SIZE_TEST"),
    }
    shown = ", ".join(f"{size} in {phase}" for phase, size in sizes.items() if size)
    data = config.get("DATASETS")
    trained_on = data.get("TRAIN") if isinstance(data, Mapping) else None
    names = (
        ", ".join(dataset_title(str(name)) for name in trained_on)
        if isinstance(trained_on, list)
        else trained_on
    )
    facts = {
        "Detector": _detector(config["MODEL"]),
        "Norm": config["MODEL"]["RESNETS"].get("NORM"),
        "Trained on": names,
        "Shorter side": f"{shown} (pixels)" if shown else "",
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _sizes(config: Mapping[str, Any], key: str) -> str:
    given = config.get("INPUT")
    # A tuple may have been dumped as a list or as the text "(640, 800)".
    text = str(given.get(key, "")) if isinstance(given, Mapping) else ""
    found = [int(digits) for digits in re.findall(r"\d+", text)]
    return " to ".join(dict.fromkeys(map(str, (min(found), max(found))))) if found else ""


def _detector(model: Mapping[str, Any]) -> str:
    """Return the detector and its neck, such as "Faster R-CNN, FPN"."""
    architecture, heads = model.get("META_ARCHITECTURE"), str(model.get("ROI_HEADS", ""))
    kind = str(architecture or "")
    if kind == "GeneralizedRCNN":
        kind = "Faster R-CNN"
        for name, on in (
            ("Keypoint R-CNN", model.get("KEYPOINT_ON")),
            ("Mask R-CNN", model.get("MASK_ON")),
            ("Fast R-CNN", model.get("LOAD_PROPOSALS")),
            ("Cascade R-CNN", "Cascade" in heads),
        ):
            kind = name if on is True else kind
    backbone = str(model.get("BACKBONE", ""))
    neck = "FPN" if "fpn" in backbone else "C4" if "Res5" in heads else ""
    if not neck and model["RESNETS"].get("RES5_DILATION") == 2:
        neck = "DC5"
    return ", ".join(part for part in (kind, neck) if part)


def dataset_title(name: str) -> str:
    """Return how people call a data set: one of their own by the name of its annotation file.

    Args:
        name: in Detectron2's catalog; `CustomData.name` adds a prefix and a digest to the file's.
    """
    own = re.fullmatch(rf"{CUSTOM}(.+)_[0-9a-f]{{8}}", name)
    return own[1] if own else name


def grouped(number: object) -> str:
    """Return a number with commas between the thousands, and anything else as it is."""
    return f"{number:,}" if isinstance(number, int) else str(number)
