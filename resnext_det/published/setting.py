"""How a detector was trained and tested, as far as two results are compared by it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COCO_TRAIN_IMAGES = 118_287
"""Of trainval35k, the union of train2014 and valminusminival: the images of train2017."""
TRAINVAL35K = "COCO trainval35k"
MINIVAL = "COCO minival"

_SAME_DATA = {
    # Detectron's model zoo: the union of the two is exactly equivalent to train2017.
    frozenset({"coco_2014_train", "coco_2014_valminusminival"}): TRAINVAL35K,
    frozenset({"coco_2017_train"}): TRAINVAL35K,
    frozenset({"coco_2014_minival"}): MINIVAL,
    frozenset({"coco_2017_val"}): MINIVAL,
}


@dataclass(frozen=True)
class Setting:
    """A setting; None stands for what is not known.

    Attributes:
        detector: such as "Faster R-CNN".
        neck: "FPN", "C4", "DC5", or "none" where the heads take one stage as it is.
        norm: of the backbone, as MODEL.RESNETS.NORM says it.
        images: seen in training: iterations times images per iteration.
        rate_falls: how often the learning rate falls by a step.
        train_size: smallest and largest shorter side of a training image, in pixels.
        test_size: shorter side of a test image, in pixels.
        test_longest: the most that the longer side of a test image may have, in pixels.
        train_set: that it was trained on; `TRAINVAL35K` by whatever name.
        test_set: that it was evaluated on; `MINIVAL` by whatever name.
    """

    detector: str | None = None
    neck: str | None = None
    norm: str | None = None
    images: int | None = None
    rate_falls: int | None = None
    train_size: tuple[int, int] | None = None
    test_size: int | None = None
    test_longest: int | None = None
    train_set: str | None = None
    test_set: str | None = None

    @property
    def epochs(self) -> float | None:
        """How often the training saw each of the 118,287 images of COCO."""
        return None if self.images is None else self.images / COCO_TRAIN_IMAGES


def setting_of(config: Mapping[str, Any]) -> Setting:
    """Return the setting that a config describes.

    Args:
        config: a Detectron2 `CfgNode`, or the dict that yaml.safe_load makes of a dumped one. What
            it lacks, or has of another type, is not known afterwards.
    """
    sizes = _numbers(_value(config, "INPUT.MIN_SIZE_TRAIN"))
    iterations = _number(_value(config, "SOLVER.MAX_ITER"))
    batch = _number(_value(config, "SOLVER.IMS_PER_BATCH"))
    steps = _value(config, "SOLVER.STEPS")
    falls_in_steps = _text(config, "SOLVER.LR_SCHEDULER_NAME") in (None, "WarmupMultiStepLR")
    return Setting(
        detector=_detector(config),
        neck=_neck(config),
        norm=_text(config, "MODEL.RESNETS.NORM"),
        images=None if iterations is None or batch is None else iterations * batch,
        rate_falls=None if steps is None or not falls_in_steps else len(_numbers(steps)),
        train_size=(min(sizes), max(sizes)) if sizes else None,
        test_size=_number(_value(config, "INPUT.MIN_SIZE_TEST")),
        test_longest=_number(_value(config, "INPUT.MAX_SIZE_TEST")),
        train_set=_data(_value(config, "DATASETS.TRAIN")),
        test_set=_data(_value(config, "DATASETS.TEST")),
    )


def _value(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key such as "SOLVER.MAX_ITER", None where there is none."""
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _text(config: Mapping[str, Any], key: str) -> str | None:
    found = _value(config, key)
    return found if isinstance(found, str) else None


def _number(found: Any) -> int | None:
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _numbers(found: Any) -> list[int]:
    """Return whole numbers: a tuple may have been dumped as a list or as the text "(640, 800)"."""
    if isinstance(found, str):
        return [int(digits) for digits in re.findall(r"\b\d{1,9}\b", found)]
    if not isinstance(found, list | tuple):
        return []
    return [each for each in map(_number, found) if each is not None]


def _detector(config: Mapping[str, Any]) -> str | None:
    architecture = _text(config, "MODEL.META_ARCHITECTURE")
    if architecture != "GeneralizedRCNN":
        return architecture
    if "Cascade" in (_text(config, "MODEL.ROI_HEADS.NAME") or ""):
        return "Cascade R-CNN"
    if _value(config, "MODEL.LOAD_PROPOSALS") is True:
        return "Fast R-CNN"
    for key, name in (("MASK_ON", "Mask R-CNN"), ("KEYPOINT_ON", "Keypoint R-CNN")):
        if _value(config, f"MODEL.{key}") is True:
            return name
    return "Faster R-CNN"


def _neck(config: Mapping[str, Any]) -> str | None:
    backbone = _text(config, "MODEL.BACKBONE.NAME")
    if backbone is None:
        return None
    if "fpn" in backbone:
        return "FPN"
    if "Res5" in (_text(config, "MODEL.ROI_HEADS.NAME") or ""):
        return "C4"
    return "DC5" if _value(config, "MODEL.RESNETS.RES5_DILATION") == 2 else "none"


def _data(found: Any) -> str | None:
    """Return the name of the data that several registered names may stand for."""
    if isinstance(found, str):
        names = re.findall(r"[^\s()\[\],'\"]+", found)
    elif isinstance(found, list | tuple):
        names = [each for each in found if isinstance(each, str)]
    else:
        return None
    return _SAME_DATA.get(frozenset(names), ", ".join(names)) or None
