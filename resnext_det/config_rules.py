"""What each config key may hold, one rule for every key of Detectron2 and of this package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode

from resnext_det.errors import ConfigError, quoted


@dataclass(frozen=True)
class Rule:
    """What a key may hold.

    Attributes:
        allowed: in words, to follow "it must be".
        holds: whether a value is allowed.
    """

    allowed: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    # True is an int to Python.
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _whole(least: int, meaning: str = "", most: int = 2**31 - 1) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    upper = " or more" if most == 2**31 - 1 else f" to {most}"
    return Rule(f"a whole number, {least}{meaning}{upper}", holds)


def _number(allowed: str, fits: Callable[[float], bool]) -> Rule:
    return Rule(f"a number {allowed}", lambda value: _is_number(value) and fits(value))


def _word(*words: object) -> Rule:
    names = ", ".join(str(word) if word != "" else "''" for word in words)
    return Rule(f"one of {names}", lambda value: type(value) in (str, int) and value in words)


def _listed(value: Any, holds: Callable[[Any], bool], lengths: range) -> bool:
    return isinstance(value, list | tuple) and len(value) in lengths and all(map(holds, value))


def _list(of: Rule, allowed: str, least: int = 0, most: int = 1000) -> Rule:
    return Rule(allowed, lambda value: _listed(value, of.holds, range(least, most + 1)))


def _is_device(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(torch.device(value))
    except RuntimeError:
        return False


def _optional(rule: Rule) -> Rule:
    return Rule(f"{rule.allowed}, or None", lambda value: value is None or rule.holds(value))


_FLAG = Rule("True or False", lambda value: isinstance(value, bool))
_TEXT = Rule("text", lambda value: isinstance(value, str))
_NAME = Rule("a name", lambda value: isinstance(value, str) and value != "")
_NAMES = _list(_NAME, "a list of names")
_ANY_NUMBER = Rule("a number", _is_number)
_POSITIVE = _number("above 0", lambda value: value > 0)
_NOT_NEGATIVE = _number("from 0 on", lambda value: value >= 0)
_SHARE = _number("from 0 to 1", lambda value: 0 <= value <= 1)
_COUNT = _whole(1)
_COUNT_OR_0 = _whole(0)
_FOUR = _list(_POSITIVE, "four numbers above 0", 4, 4)
_RATIOS = _list(_SHARE, "numbers from 0 to 1", 1)
_LABELS = _list(_word(-1, 0, 1), "numbers, each -1, 0 or 1", 2)
_SIZES = _list(_COUNT, "whole numbers, 1 or more", 1)
_LEVELS = _list(
    _list(_POSITIVE, "", 1), "lists of numbers above 0, one for all features or one for each", 1
)
_LOSS = _word("smooth_l1", "giou", "diou", "ciou")
_POOLER = _word("ROIAlignV2", "ROIAlign", "ROIPool", "ROIAlignRotated")
_ANY_WHOLE = Rule("a whole number", _whole(-(2**31)).holds)

_MODEL: dict[str, Rule] = {
    **dict.fromkeys(("LOAD_PROPOSALS", "MASK_ON", "KEYPOINT_ON"), _FLAG),
    "DEVICE": Rule("a device, such as cpu, cuda or cuda:0", _is_device),
    "META_ARCHITECTURE": _NAME,
    "WEIGHTS": _TEXT,
    "PIXEL_MEAN": _list(_ANY_NUMBER, "a number for each channel", 1),
    "PIXEL_STD": _list(_POSITIVE, "a number above 0 for each channel", 1),
    "BACKBONE.NAME": _NAME,
    "BACKBONE.FREEZE_AT": _ANY_WHOLE,
    "FPN.IN_FEATURES": _NAMES,
    "FPN.OUT_CHANNELS": _COUNT,
    "FPN.NORM": _TEXT,
    "FPN.FUSE_TYPE": _word("sum", "avg"),
    "PROPOSAL_GENERATOR.NAME": _NAME,
    "PROPOSAL_GENERATOR.MIN_SIZE": _NOT_NEGATIVE,
    "ANCHOR_GENERATOR.NAME": _NAME,
    "ANCHOR_GENERATOR.SIZES": _LEVELS,
    "ANCHOR_GENERATOR.ASPECT_RATIOS": _LEVELS,
    "ANCHOR_GENERATOR.ANGLES": _list(_list(_ANY_NUMBER, "", 1), "lists of angles in degrees", 1),
    "ANCHOR_GENERATOR.OFFSET": _number("from 0 to below 1", lambda value: 0 <= value < 1),
    "RPN.HEAD_NAME": _NAME,
    "RPN.IN_FEATURES": _list(_NAME, "a list of names, at least one", 1),
    "RPN.BOUNDARY_THRESH": _number("from -1 on (-1 keeps all anchors)", lambda value: value >= -1),
    "RPN.IOU_THRESHOLDS": _RATIOS,
    "RPN.IOU_LABELS": _LABELS,
    "RPN.BATCH_SIZE_PER_IMAGE": _COUNT,
    "RPN.POSITIVE_FRACTION": _SHARE,
    "RPN.BBOX_REG_LOSS_TYPE": _LOSS,
    "RPN.BBOX_REG_WEIGHTS": _FOUR,
    **dict.fromkeys(
        ("RPN.BBOX_REG_LOSS_WEIGHT", "RPN.SMOOTH_L1_BETA", "RPN.LOSS_WEIGHT"), _NOT_NEGATIVE
    ),
    **{
        f"RPN.{when}_NMS_TOPK_{use}": _COUNT
        for when in ("PRE", "POST")
        for use in ("TRAIN", "TEST")
    },
    "RPN.NMS_THRESH": _SHARE,
    "RPN.CONV_DIMS": Rule(
        "numbers of channels, 1 or more, or -1 for those of the input",
        lambda value: _listed(value, lambda n: n == -1 or _COUNT.holds(n), range(1, 100)),
    ),
    "ROI_HEADS.NAME": _NAME,
    "ROI_HEADS.NUM_CLASSES": _COUNT,
    "ROI_HEADS.IN_FEATURES": _list(_NAME, "a list of names, at least one", 1),
    "ROI_HEADS.IOU_THRESHOLDS": _RATIOS,
    "ROI_HEADS.IOU_LABELS": _LABELS,
    "ROI_HEADS.BATCH_SIZE_PER_IMAGE": _COUNT,
    **dict.fromkeys(
        (
            *("ROI_HEADS.POSITIVE_FRACTION", "ROI_HEADS.SCORE_THRESH_TEST"),
            *("ROI_HEADS.NMS_THRESH_TEST", "RETINANET.SCORE_THRESH_TEST"),
            "RETINANET.NMS_THRESH_TEST",
        ),
        _SHARE,
    ),
    "ROI_HEADS.PROPOSAL_APPEND_GT": _FLAG,
    "ROI_BOX_HEAD.NAME": _TEXT,
    "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _LOSS,
    "ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": _NOT_NEGATIVE,
    "ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _list(_POSITIVE, "four numbers above 0 (five rotated)", 4, 5),
    "ROI_BOX_HEAD.SMOOTH_L1_BETA": _NOT_NEGATIVE,
    **{f"ROI_{head}_HEAD.POOLER_RESOLUTION": _COUNT for head in ("BOX", "MASK", "KEYPOINT")},
    **{f"ROI_{head}_HEAD.POOLER_SAMPLING_RATIO": _whole(0) for head in ("BOX", "MASK", "KEYPOINT")},
    **{f"ROI_{head}_HEAD.POOLER_TYPE": _POOLER for head in ("BOX", "MASK", "KEYPOINT")},
    **dict.fromkeys(("ROI_BOX_HEAD.NUM_FC", "ROI_BOX_HEAD.NUM_CONV"), _COUNT_OR_0),
    **dict.fromkeys(("ROI_BOX_HEAD.FC_DIM", "ROI_BOX_HEAD.CONV_DIM"), _COUNT),
    "ROI_BOX_HEAD.NORM": _TEXT,
    **dict.fromkeys(
        (
            *("ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES"),
            *("ROI_BOX_HEAD.USE_FED_LOSS", "ROI_BOX_HEAD.USE_SIGMOID_CE"),
        ),
        _FLAG,
    ),
    "ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": _NOT_NEGATIVE,
    "ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": _COUNT,
    "ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": _list(_FOUR, "four numbers above 0 for each stage", 1),
    "ROI_BOX_CASCADE_HEAD.IOUS": _RATIOS,
    "ROI_MASK_HEAD.NAME": _NAME,
    "ROI_MASK_HEAD.NUM_CONV": _COUNT_OR_0,
    "ROI_MASK_HEAD.CONV_DIM": _COUNT,
    "ROI_MASK_HEAD.NORM": _TEXT,
    "ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": _FLAG,
    "ROI_KEYPOINT_HEAD.NAME": _NAME,
    "ROI_KEYPOINT_HEAD.CONV_DIMS": _SIZES,
    "ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": _COUNT,
    "ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": _COUNT_OR_0,
    "ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": _FLAG,
    "ROI_KEYPOINT_HEAD.LOSS_WEIGHT": _NOT_NEGATIVE,
    "SEM_SEG_HEAD.NAME": _NAME,
    "SEM_SEG_HEAD.IN_FEATURES": _list(_NAME, "a list of names, at least one", 1),
    "SEM_SEG_HEAD.IGNORE_VALUE": _ANY_WHOLE,
    **{f"SEM_SEG_HEAD.{key}": _COUNT for key in ("NUM_CLASSES", "CONVS_DIM", "COMMON_STRIDE")},
    "SEM_SEG_HEAD.NORM": _TEXT,
    "SEM_SEG_HEAD.LOSS_WEIGHT": _NOT_NEGATIVE,
    "PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": _NOT_NEGATIVE,
    "PANOPTIC_FPN.COMBINE.ENABLED": _FLAG,
    "PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": _SHARE,
    "PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": _NOT_NEGATIVE,
    "PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": _SHARE,
    "RETINANET.NUM_CLASSES": _COUNT,
    "RETINANET.IN_FEATURES": _list(_NAME, "a list of names, at least one", 1),
    "RETINANET.NUM_CONVS": _COUNT_OR_0,
    "RETINANET.IOU_THRESHOLDS": _RATIOS,
    "RETINANET.IOU_LABELS": _LABELS,
    "RETINANET.PRIOR_PROB": _number("between 0 and 1", lambda value: 0 < value < 1),
    "RETINANET.TOPK_CANDIDATES_TEST": _COUNT,
    "RETINANET.BBOX_REG_WEIGHTS": _FOUR,
    "RETINANET.FOCAL_LOSS_GAMMA": _NOT_NEGATIVE,
    "RETINANET.FOCAL_LOSS_ALPHA": _number(
        "from 0 to 1, or -1 for no weighting", lambda value: value == -1 or 0 <= value <= 1
    ),
    "RETINANET.SMOOTH_L1_LOSS_BETA": _NOT_NEGATIVE,
    "RETINANET.BBOX_REG_LOSS_TYPE": _LOSS,
    "RETINANET.NORM": _TEXT,
    "RESNETS.OUT_FEATURES": _NAMES,
    "RESNETS.NORM": _TEXT,
    "RESNETS.STRIDE_IN_1X1": _FLAG,
    "RESNETS.DEFORM_ON_PER_STAGE": _list(_FLAG, "True or False for each of res2 to res5", 4, 4),
    "RESNETS.DEFORM_MODULATED": _FLAG,
    # Their ranges depend on one another, and are checked where the network is built.
    **{
        f"RESNETS.{key}": _ANY_WHOLE
        for key in (
            *("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP", "RES5_DILATION", "RES2_OUT_CHANNELS"),
            *("STEM_OUT_CHANNELS", "DEFORM_NUM_GROUPS"),
        )
    },
    "RESNEXT.FORM": _TEXT,
    "RESNEXT.CHECKPOINT_STAGES": _NAMES,
    "RESNEXT.ZERO_INIT_RESIDUAL": _FLAG,
    "RESNEXT.ALLOW_STRIDE_IN_1X1": _FLAG,
    "RESNEXT.ALLOW_OTHER_FUNCTION": _FLAG,
}

SCALINGS = ("accumulate", "linear", "none")
# Detectron2's, see detectron2.solver.build_lr_scheduler.
MULTI_STEP, COSINE, FIXED_GAMMA = (
    "WarmupMultiStepLR",
    "WarmupCosineLR",
    "WarmupStepWithFixedGammaLR",
)

_SOLVER: dict[str, Rule] = {
    "SCALING": _word(*SCALINGS),
    "IMS_PER_BATCH": _COUNT,
    "IMS_PER_MICRO_BATCH": _whole(0, " (as SOLVER.SCALING has it)"),
    "REFERENCE_WORLD_SIZE": _whole(0, " (for any number of processes)"),
    "MAX_ITER": _COUNT,
    "BASE_LR": _POSITIVE,
    "BASE_LR_END": _ANY_NUMBER,
    "LR_PER_IMAGE": _POSITIVE,
    "BIAS_LR_FACTOR": _NOT_NEGATIVE,
    "MOMENTUM": _number("from 0 to below 1", lambda momentum: 0 <= momentum < 1),
    "NESTEROV": _FLAG,
    "WEIGHT_DECAY": _NOT_NEGATIVE,
    "WEIGHT_DECAY_NORM": _optional(_NOT_NEGATIVE),
    "WEIGHT_DECAY_BIAS": _optional(_NOT_NEGATIVE),
    "LR_SCHEDULER_NAME": _word(MULTI_STEP, COSINE, FIXED_GAMMA),
    "GAMMA": _number("above 0 and up to 1", lambda gamma: 0 < gamma <= 1),
    "STEPS": _list(_COUNT, "iterations, whole numbers from 1 on, such as (60000, 80000), or ()"),
    "NUM_DECAYS": _COUNT,
    "WARMUP_ITERS": _whole(0, " (for no warm-up)"),
    "WARMUP_FACTOR": _SHARE,
    "WARMUP_METHOD": _word("linear", "constant"),
    "RESCALE_INTERVAL": _FLAG,
    "CHECKPOINT_PERIOD": _COUNT,
    "KEEP_LAST": _whole(0, " (for all)"),
    "SKIP_BAD_UPDATES": _COUNT_OR_0,
    "CLIP_GRADIENTS.ENABLED": _FLAG,
    "CLIP_GRADIENTS.CLIP_TYPE": _word("value", "norm", "global_norm"),
    "CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "CLIP_GRADIENTS.NORM_TYPE": Rule(
        "a number above 0, or .inf", lambda value: _POSITIVE.holds(value) or value == math.inf
    ),
    "AMP.ENABLED": _FLAG,
    "AMP.PRECISION": _word("float16", "bfloat16"),
    "EMA.ENABLED": _FLAG,
    "EMA.DECAY": _number("between 0 and 1", lambda decay: 0 < decay < 1),
}

_TEST: dict[str, Rule] = {
    "EXPECTED_RESULTS": Rule("a list", lambda value: isinstance(value, list | tuple)),
    "EVAL_PERIOD": _whole(0, " (for the end alone)"),
    "KEYPOINT_OKS_SIGMAS": _list(_POSITIVE, "a list of numbers above 0"),
    "DETECTIONS_PER_IMAGE": _COUNT,
    "AUG.ENABLED": _FLAG,
    "AUG.MIN_SIZES": _SIZES,
    "AUG.MAX_SIZE": _COUNT,
    "AUG.FLIP": _FLAG,
    "PRECISE_BN.ENABLED": _FLAG,
    "PRECISE_BN.NUM_ITER": _COUNT,
    "BEST.METRIC": _TEXT,
    "BEST.PATIENCE": _whole(0, " (for never)"),
    "ENGINE": _TEXT,
    "CROSS_CHECK": _FLAG,
    "VALIDATION_LOSS": _FLAG,
}

_CROPS = ("relative", "relative_range", "absolute", "absolute_range")

_OTHERS: dict[str, Rule] = {
    "VERSION": _word(2),
    "INPUT.MIN_SIZE_TRAIN": _SIZES,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": _word("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": _COUNT,
    "INPUT.MIN_SIZE_TEST": _whole(0, " (for the images' own size)"),
    "INPUT.MAX_SIZE_TEST": _COUNT,
    "INPUT.RANDOM_FLIP": _word("horizontal", "vertical", "none"),
    "INPUT.CROP.ENABLED": _FLAG,
    "INPUT.CROP.TYPE": _word(*_CROPS),
    "INPUT.CROP.SIZE": _list(_POSITIVE, "two numbers above 0", 2, 2),
    "INPUT.FORMAT": _TEXT,
    "INPUT.MASK_FORMAT": _word("polygon", "bitmask"),
    **{f"DATASETS.{key}": _NAMES for key in ("TRAIN", "TEST")},
    **{f"DATASETS.PROPOSAL_FILES_{key}": _NAMES for key in ("TRAIN", "TEST")},
    **{f"DATASETS.PRECOMPUTED_PROPOSAL_TOPK_{key}": _COUNT for key in ("TRAIN", "TEST")},
    "DATALOADER.NUM_WORKERS": _whole(0, " (to read images in the process that trains)", most=4096),
    "DATALOADER.ASPECT_RATIO_GROUPING": _FLAG,
    "DATALOADER.SAMPLER_TRAIN": _word("TrainingSampler", "RepeatFactorTrainingSampler"),
    "DATALOADER.REPEAT_THRESHOLD": _NOT_NEGATIVE,
    "DATALOADER.REPEAT_SQRT": _FLAG,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": _FLAG,
    "DATALOADER.BAD_IMAGES": _word("stop", "skip"),
    "OUTPUT_DIR": _NAME,
    "SEED": _ANY_WHOLE,
    "CUDNN_BENCHMARK": _FLAG,
    "FLOAT32_PRECISION": _word("", "highest", "high", "medium"),  # of newer Detectron2s
    "VIS_PERIOD": _COUNT_OR_0,
    "GLOBAL.HACK": Rule("anything", lambda value: True),
    "WANDB.ENABLED": _FLAG,
    "WANDB.PROJECT": _TEXT,
}

RULES: dict[str, Rule] = {
    **{f"MODEL.{key}": rule for key, rule in _MODEL.items()},
    **{f"SOLVER.{key}": rule for key, rule in _SOLVER.items()},
    **{f"TEST.{key}": rule for key, rule in _TEST.items()},
    **_OTHERS,
}
"""By key. A key that another package adds has no rule, and may hold what it likes."""


def wrong(key: str, value: object) -> str | None:
    """Return what is wrong with the value of a key, or None.

    Args:
        key: such as "SOLVER.BASE_LR".
        value: of any type and size.
    """
    rule = RULES.get(key)
    if rule is None or rule.holds(value):
        return None
    return f"{key} is {quoted(value)}; it must be {rule.allowed}."


def value_of(cfg: CfgNode, key: str) -> Any:
    """Return the value of a key such as "SOLVER.BASE_LR", or None if the config lacks it."""
    node: Any = cfg
    for name in key.split("."):
        node = node.get(name) if isinstance(node, CfgNode) else None
    return node


def refuse(*found: str | None) -> None:
    """Raise one error about all that was found to be wrong, if anything was.

    Args:
        found: sentences; None for what is right.

    Raises:
        ConfigError: there is a sentence.
    """
    problems = [problem for problem in found if problem]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        numbered = " ".join(f"({number}) {each}" for number, each in enumerate(problems, 1))
        raise ConfigError(f"{len(problems)} settings are wrong: {numbered}")
