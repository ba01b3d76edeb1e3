"""Which values config keys may have, which settings exclude each other, which keys go unread."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from resnext_det.errors import ConfigError, quoted


@dataclass(frozen=True)
class Rule:
    """The values that a key may have.

    Attributes:
        allowed: completes "it must be".
        holds: tells whether a value is allowed.
    """

    allowed: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _whole(least: int, meaning: str = "", most: int = 2**31 - 1) -> Rule:
    upper = " or more" if most == 2**31 - 1 else f" to {most}"
    return Rule(
        f"a whole number, {least}{meaning}{upper}",
        lambda value: _is_whole(value) and least <= value <= most,
    )


def _number(allowed: str, fits: Callable[[float], bool]) -> Rule:
    return Rule(f"a number {allowed}", lambda value: _is_number(value) and fits(value))


def _word(*words: str | int) -> Rule:
    names = ", ".join(repr(word) if word == "" else str(word) for word in words)
    return Rule(f"one of {names}", lambda value: type(value) in (str, int) and value in words)


def _list(item: Rule, allowed: str, least: int = 0, most: int = 1000) -> Rule:
    return Rule(
        f"a list {allowed}",
        lambda value: (
            isinstance(value, list | tuple)
            and least <= len(value) <= most
            and all(map(item.holds, value))
        ),
    )


def _optional(rule: Rule) -> Rule:
    return Rule(f"{rule.allowed}, or None", lambda value: value is None or rule.holds(value))


def _is_device(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(torch.device(value))
    except RuntimeError:
        return False


_FLAG = Rule("True or False", lambda value: isinstance(value, bool))
_TEXT = Rule("text", lambda value: isinstance(value, str))
_NAME = Rule("a name", lambda value: isinstance(value, str) and value != "")
_NAMES = _list(_NAME, "of names")
_ANY_WHOLE = Rule("a whole number", _whole(-(2**31)).holds)
_ANY_NUMBER = Rule("a number", _is_number)
_POSITIVE = _number("above 0", lambda value: value > 0)
_NOT_NEGATIVE = _number("0 or more", lambda value: value >= 0)
_SHARE = _number("from 0 to 1", lambda value: 0 <= value <= 1)
_BETWEEN = _number("between 0 and 1", lambda value: 0 < value < 1)
_BELOW_1 = _number("from 0 to below 1", lambda value: 0 <= value < 1)
_POSITIVE_LISTS = _list(_list(_POSITIVE, "", 1), "of lists of numbers above 0", 1)

SCALINGS = ("accumulate", "linear", "none")
STOCK = "stock"
"""MODEL.RESNEXT.PRECISION that leaves a detector as Detectron2 builds it."""
PRECISIONS = (STOCK, "fp32", "bf16", "fp16")
# Detectron2's, see detectron2.solver.build_lr_scheduler.
MULTI_STEP, COSINE, FIXED_GAMMA = (
    "WarmupMultiStepLR",
    "WarmupCosineLR",
    "WarmupStepWithFixedGammaLR",
)

# Rules of this package's keys, and of those keys of Detectron2 for which the type of the default
# (see `_of_default`) says too little; the first pattern that matches wins.
_PATTERNS: tuple[tuple[str, Rule], ...] = (
    ("VERSION", _word(2)),
    ("SEED MODEL.BACKBONE.FREEZE_AT MODEL.SEM_SEG_HEAD.IGNORE_VALUE", _ANY_WHOLE),
    ("FLOAT32_PRECISION", _word("", "highest", "high", "medium")),  # newer Detectron2s
    ("MODEL.DEVICE", Rule("a device, such as cpu, cuda or cuda:0", _is_device)),
    ("MODEL.PIXEL_MEAN", _list(_ANY_NUMBER, "of numbers, one per channel", 1)),
    ("MODEL.PIXEL_STD", _list(_POSITIVE, "of numbers above 0, one per channel", 1)),
    ("MODEL.FPN.FUSE_TYPE", _word("sum", "avg")),
    ("MODEL.*.NORM MODEL.ROI_BOX_HEAD.NAME MODEL.WEIGHTS INPUT.FORMAT", _TEXT),
    ("MODEL.PROPOSAL_GENERATOR.MIN_SIZE *.STUFF_AREA_LIMIT", _NOT_NEGATIVE),
    ("MODEL.ANCHOR_GENERATOR.SIZES MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", _POSITIVE_LISTS),
    ("*.ANGLES", _list(_list(_ANY_NUMBER, "", 1), "of lists of angles in degrees", 1)),
    ("MODEL.ANCHOR_GENERATOR.OFFSET SOLVER.MOMENTUM", _BELOW_1),
    ("*.BOUNDARY_THRESH", _number("-1 (keeps all anchors) or more", lambda value: value >= -1)),
    ("*.IOU_THRESHOLDS *.IOUS", _list(_SHARE, "of numbers from 0 to 1", 1)),
    ("*.IOU_LABELS", _list(_word(-1, 0, 1), "of numbers, each -1, 0 or 1", 2)),
    ("*.BBOX_REG_LOSS_TYPE", _word("smooth_l1", "giou", "diou", "ciou")),
    (
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
        _list(_POSITIVE, "of 4 numbers above 0 (5 if rotated)", 4, 5),
    ),
    (
        "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
        _list(_list(_POSITIVE, "", 4, 4), "of lists of four numbers above 0, one per stage", 1),
    ),
    ("*.BBOX_REG_WEIGHTS", _list(_POSITIVE, "of four numbers above 0", 4, 4)),
    (
        "MODEL.RPN.CONV_DIMS",
        _list(
            Rule("", lambda value: _whole(1).holds(value) or value == -1),
            "of channels, 1 or more, or -1 for those of the input",
            1,
        ),
    ),
    ("*.POOLER_TYPE", _word("ROIAlignV2", "ROIAlign", "ROIPool", "ROIAlignRotated")),
    ("*.NUM_CONVS *.MIN_KEYPOINTS_PER_IMAGE", _whole(0)),
    ("*.PRIOR_PROB SOLVER.EMA.DECAY", _BETWEEN),
    (
        "*.FOCAL_LOSS_ALPHA",
        _number("from 0 to 1, or -1 (unweighted)", lambda value: value == -1 or 0 <= value <= 1),
    ),
    ("*THRESH *THRESH_TEST *.POSITIVE_FRACTION *.WARMUP_FACTOR", _SHARE),
    ("*.DEFORM_ON_PER_STAGE", _list(_FLAG, "of True or False for each of res2 to res5", 4, 4)),
    ("*.DEFORM_MODULATED *.STRIDE_IN_1X1", _FLAG),
    ("*.OUT_FEATURES MODEL.FPN.IN_FEATURES", _NAMES),
    # The network itself checks the others: their ranges depend on each other.
    ("MODEL.RESNETS.*", _ANY_WHOLE),
    ("MODEL.RESNEXT.FORM TEST.ENGINE TEST.BEST.METRIC WANDB.PROJECT", _TEXT),
    ("MODEL.RESNEXT.CHECKPOINT_STAGES", _NAMES),
    ("MODEL.RESNEXT.PRECISION", _word(*PRECISIONS)),
    ("MODEL.RESNEXT.*", _FLAG),
    ("CLASSIFICATION.LAYOUT", _word("folder", "cifar10", "cifar100", "coco")),
    ("CLASSIFICATION.AUGMENTATION", _word("inception", "padded", "none")),
    ("CLASSIFICATION.DATA CLASSIFICATION.SYNSETS", _TEXT),
    ("CLASSIFICATION.COLOR_JITTER", _SHARE),
    ("CLASSIFICATION.LIGHTING SOLVER.MAX_EPOCHS", _NOT_NEGATIVE),
    ("CLASSIFICATION.*", _whole(1)),
    ("SOLVER.SCALING", _word(*SCALINGS)),
    ("SOLVER.IMS_PER_MICRO_BATCH", _whole(0, " (as SOLVER.SCALING says)")),
    ("SOLVER.MICRO_BATCHES_PER_PASS", _whole(1)),
    ("SOLVER.REFERENCE_WORLD_SIZE", _whole(0, " (any number of processes)")),
    ("SOLVER.BASE_LR_END", _ANY_NUMBER),
    ("SOLVER.BASE_LR SOLVER.LR_PER_IMAGE *.CLIP_VALUE", _POSITIVE),
    ("SOLVER.WEIGHT_DECAY_*", _optional(_NOT_NEGATIVE)),
    # Not FIXED_GAMMA: fvcore raises IndexError when it steps after the last iteration.
    ("SOLVER.LR_SCHEDULER_NAME", _word(MULTI_STEP, COSINE)),
    ("SOLVER.GAMMA", _number("above 0 and up to 1", lambda value: 0 < value <= 1)),
    ("SOLVER.STEPS", _list(_whole(1), "of iterations, such as (60000, 80000), or ()")),
    ("SOLVER.WARMUP_ITERS", _whole(0, " (no warm-up)")),
    ("SOLVER.WARMUP_METHOD", _word("linear", "constant")),
    ("SOLVER.KEEP_LAST", _whole(0, " (all)")),
    ("SOLVER.SKIP_BAD_UPDATES", _whole(0)),
    ("*.CLIP_TYPE", _word("value", "norm", "global_norm")),
    (
        "*.NORM_TYPE",
        Rule("a number above 0, or .inf", lambda n: _POSITIVE.holds(n) or n == math.inf),
    ),
    ("SOLVER.AMP.PRECISION", _word("float16", "bfloat16")),
    ("TEST.EXPECTED_RESULTS", Rule("a list", lambda value: isinstance(value, list | tuple))),
    ("TEST.EVAL_PERIOD", _whole(0, " (only at the end)")),
    ("TEST.KEYPOINT_OKS_SIGMAS", _list(_POSITIVE, "of numbers above 0")),
    ("TEST.BEST.PATIENCE", _whole(0, " (never)")),
    ("TEST.CROSS_CHECK TEST.VALIDATION_LOSS *.ENABLED SOLVER.EXACT_SUM", _FLAG),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", _word("choice", "range")),
    ("INPUT.MIN_SIZE_TEST", _whole(0, " (the images' own size)")),
    ("INPUT.RANDOM_FLIP", _word("horizontal", "vertical", "none")),
    ("INPUT.CROP.TYPE", _word("relative", "relative_range", "absolute", "absolute_range")),
    ("INPUT.CROP.SIZE", _list(_POSITIVE, "of two numbers above 0", 2, 2)),
    ("INPUT.MASK_FORMAT", _word("polygon", "bitmask")),
    ("DATASETS.PRECOMPUTED_*", _whole(1)),
    ("DATASETS.*", _NAMES),
    ("DATALOADER.NUM_WORKERS", _whole(0, " (loads in the training process)", most=4096)),
    ("DATALOADER.SAMPLER_TRAIN", _word("TrainingSampler", "RepeatFactorTrainingSampler")),
    ("DATALOADER.DECODER", _word("fast", "pillow")),
    ("DATALOADER.BAD_IMAGES", _word("stop", "skip")),
    # Detectron2's own key for experiments in a user's code; this package never reads it.
    ("GLOBAL.HACK", Rule("anything", lambda value: True)),
)

_OWN_KEYS = (
    *(f"MODEL.RESNEXT.{key}" for key in ("FORM", "CHECKPOINT_STAGES", "PRECISION")),
    *(f"MODEL.RESNEXT.{key}" for key in ("ZERO_INIT_RESIDUAL", "PRE_ACTIVATION", "SHORTCUTS")),
    *(f"MODEL.RESNEXT.ALLOW_{key}" for key in ("STRIDE_IN_1X1", "OTHER_FUNCTION")),
    *(f"CLASSIFICATION.{key}" for key in ("LAYOUT", "DATA", "SYNSETS", "NUM_CLASSES", "RESIZE")),
    *(f"CLASSIFICATION.{key}" for key in ("AUGMENTATION", "CROP", "COLOR_JITTER", "LIGHTING")),
    "SOLVER.MAX_EPOCHS",
    *(f"SOLVER.{key}" for key in ("SCALING", "IMS_PER_MICRO_BATCH", "MICRO_BATCHES_PER_PASS")),
    *("SOLVER.EXACT_SUM", "SOLVER.LR_PER_IMAGE", "SOLVER.KEEP_LAST"),
    *("SOLVER.AMP.PRECISION", "SOLVER.SKIP_BAD_UPDATES", "SOLVER.EMA.ENABLED", "SOLVER.EMA.DECAY"),
    *("TEST.BEST.METRIC", "TEST.BEST.PATIENCE", "TEST.ENGINE", "TEST.CROSS_CHECK"),
    *("TEST.VALIDATION_LOSS", "DATALOADER.DECODER", "DATALOADER.BAD_IMAGES"),
    *("WANDB.ENABLED", "WANDB.PROJECT"),
)


def _of_default(value: Any) -> Rule:
    """Return the rule that a default suggests: its type, and a lower bound for numbers."""
    if isinstance(value, bool):
        return _FLAG
    if isinstance(value, int):
        return _whole(min(value, 1))
    if isinstance(value, float):
        return _NOT_NEGATIVE
    if isinstance(value, str):
        return _NAME if value else _TEXT
    item = _of_default(value[0])
    kind = "names" if item is _NAME else "whole numbers, 1 or more"
    return _list(item, f"of {kind}, at least one", 1)


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key of a nested config, such as "SOLVER.BASE_LR", with its value."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _matches(text: str, patterns: str) -> bool:
    return any(
        fnmatchcase(text, pattern.removeprefix("!")) != pattern.startswith("!")
        for pattern in patterns.split()
    )


def _rule(key: str, default: Any = None) -> Rule:
    for patterns, rule in _PATTERNS:
        if _matches(key, patterns):
            return rule
    return _of_default(default)


RULES: dict[str, Rule] = {
    **{key: _rule(key, default) for key, default in leaves(get_cfg())},
    **{key: _rule(key) for key in _OWN_KEYS},
}
"""By key. Keys that other packages add have no rule."""


def wrong(key: str, value: object) -> str | None:
    """Return what is wrong with the value of a key such as "SOLVER.BASE_LR", or None."""
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
    """Raise one ConfigError about all problems found, if any; None stands for no problem."""
    problems = [problem for problem in found if problem]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        numbered = " ".join(f"({number}) {each}" for number, each in enumerate(problems, 1))
        raise ConfigError(f"{len(problems)} settings are wrong: {numbered}")


def refuse_impossible(cfg: CfgNode, processes: int = 1, *, training: bool = True) -> None:
    """Refuse settings that would end a run later, most of them in a library's error.

    Raises:
        ConfigError: names every such setting and what to do.
    """
    refuse(*_problems(cfg, processes, training), *(_training_problems(cfg) if training else ()))


def _problems(cfg: CfgNode, processes: int, training: bool) -> Iterator[str]:
    model = cfg.MODEL
    generator = model.PROPOSAL_GENERATOR.NAME
    in_rcnn = model.META_ARCHITECTURE in _RCNN.split()
    if (generator == PRECOMPUTED) != model.LOAD_PROPOSALS or (model.LOAD_PROPOSALS and not in_rcnn):
        yield (
            f"MODEL.LOAD_PROPOSALS is {model.LOAD_PROPOSALS}, MODEL.PROPOSAL_GENERATOR.NAME "
            f"{generator} and MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE}: proposals come "
            f"from files with True, {PRECOMPUTED} and GeneralizedRCNN, and from the RPN with False "
            "and RPN."
        )
    for use in ("TRAIN", "TEST") if model.LOAD_PROPOSALS else ():
        names, files = cfg.DATASETS[use], cfg.DATASETS[f"PROPOSAL_FILES_{use}"]
        if len(names) != len(files) and (training or use == "TEST"):
            yield (
                f"DATASETS.PROPOSAL_FILES_{use} names {len(files)} files for the {len(names)} data "
                f"sets of DATASETS.{use}, and MODEL.LOAD_PROPOSALS is True: name one for each. "
                "resnext-det eval --save-proposals writes them, or resnext-det two-step."
            )
    not_augmented = model.KEYPOINT_ON or model.LOAD_PROPOSALS
    if cfg.TEST.AUG.ENABLED and (model.META_ARCHITECTURE != "GeneralizedRCNN" or not_augmented):
        yield (
            f"TEST.AUG.ENABLED is True, MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE}, "
            f"MODEL.KEYPOINT_ON {model.KEYPOINT_ON} and MODEL.LOAD_PROPOSALS "
            f"{model.LOAD_PROPOSALS}: Detectron2 can augment only the tests of GeneralizedRCNN "
            "with an RPN and without keypoints. Set TEST.AUG.ENABLED False."
        )
    if len(model.PIXEL_MEAN) != len(model.PIXEL_STD):
        yield (
            f"MODEL.PIXEL_MEAN has {len(model.PIXEL_MEAN)} values and MODEL.PIXEL_STD "
            f"{len(model.PIXEL_STD)}: give both one per channel."
        )
    if processes > 1 and model.DEVICE.startswith("cpu"):
        for part, node in model.items():
            if isinstance(node, CfgNode) and node.get("NORM") in ("SyncBN", "nnSyncBN"):
                yield (
                    f"MODEL.{part}.NORM is {node.NORM}, which PyTorch supports only on GPUs, and "
                    f"{processes} processes run on the CPU. Set naiveSyncBN, or start one process."
                )


def _training_problems(cfg: CfgNode) -> Iterator[str]:
    if cfg.VIS_PERIOD and importlib.util.find_spec("cv2") is None:
        yield (
            f"VIS_PERIOD is {cfg.VIS_PERIOD}, and Detectron2 draws the pictures with OpenCV, which "
            "is not installed: pip install opencv-python-headless, or set VIS_PERIOD 0."
        )
    head, sizes, crop = cfg.MODEL.ROI_BOX_HEAD, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.CROP
    if head.USE_FED_LOSS and not head.USE_SIGMOID_CE:
        yield (
            "MODEL.ROI_BOX_HEAD.USE_FED_LOSS is True, which needs USE_SIGMOID_CE True as well: set "
            "both, or neither."
        )
    for name in cfg.DATASETS.TRAIN if head.USE_FED_LOSS else ():
        if not hasattr(MetadataCatalog.get(name), "class_image_count"):
            yield (
                f"MODEL.ROI_BOX_HEAD.USE_FED_LOSS is True, and the metadata of data set {name} has "
                "no class_image_count, as that of LVIS has. Set USE_FED_LOSS False."
            )
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) != 2:
        yield (
            f"INPUT.MIN_SIZE_TRAIN_SAMPLING is range, and INPUT.MIN_SIZE_TRAIN is {sizes}: give "
            "the smallest and the largest, such as (640, 800), or sample by choice."
        )
    relative = crop.TYPE.startswith("relative")
    if crop.ENABLED and not all(s <= 1 if relative else s == int(s) for s in crop.SIZE):
        allowed = "fractions from 0 to 1" if relative else "whole numbers of pixels"
        yield f"INPUT.CROP.SIZE is {crop.SIZE}; INPUT.CROP.TYPE {crop.TYPE} takes {allowed}."


_RCNN = "GeneralizedRCNN PanopticFPN"
PRECOMPUTED = "PrecomputedProposals"  # Detectron2's name for no generator
CLASSIFIER = "ImageClassifier"
"""MODEL.META_ARCHITECTURE of `resnext-det pretrain`."""
KNOWN_ARCHITECTURES = (
    *_RCNN.split(),
    *("ProposalNetwork", "RetinaNet", "SemanticSegmentor", CLASSIFIER),
)
_ARCHITECTURE, _SCHEDULER = "MODEL.META_ARCHITECTURE", "SOLVER.LR_SCHEDULER_NAME"
_IN_BOX_HEAD = ("NAME", "NUM_FC", "FC_DIM", "NUM_CONV", "CONV_DIM", "NORM", "TRAIN_ON_PRED*")
_SWITCHED = ("TEST.AUG", "TEST.PRECISE_BN", "SOLVER.CLIP_GRADIENTS", "SOLVER.AMP", "SOLVER.EMA")

# Patterns of keys; the keys that decide whether these are read; the values for which they are
# (patterns too; "!" negates one).
_NEEDS: tuple[tuple[str, str, str], ...] = (
    ("CLASSIFICATION.* SOLVER.MAX_EPOCHS MODEL.RESNEXT.SHORTCUTS", _ARCHITECTURE, CLASSIFIER),
    # What a classifier does not read.
    (
        "MODEL.ANCHOR_GENERATOR.* MODEL.RESNETS.OUT_FEATURES INPUT.M??_SIZE* "
        "INPUT.CROP.* MODEL.RESNETS.DEFORM* MODEL.RESNETS.RES5_DILATION MODEL.FPN.* "
        "TEST.AUG.* TEST.ENGINE TEST.CROSS_CHECK TEST.DETECTIONS_PER_IMAGE "
        "DATALOADER.REPEAT_* DATALOADER.FILTER_EMPTY_ANNOTATIONS",
        _ARCHITECTURE,
        f"!{CLASSIFIER}",
    ),
    ("MODEL.RETINANET.*", _ARCHITECTURE, "RetinaNet"),
    ("MODEL.ROI_*", _ARCHITECTURE, _RCNN),
    ("MODEL.SEM_SEG_HEAD.*", _ARCHITECTURE, "SemanticSegmentor PanopticFPN"),
    ("MODEL.PANOPTIC_FPN.*", _ARCHITECTURE, "PanopticFPN"),
    ("MODEL.RPN.* MODEL.PROPOSAL_GENERATOR.*", _ARCHITECTURE, f"{_RCNN} ProposalNetwork"),
    (
        "MODEL.RPN.* MODEL.ANCHOR_GENERATOR.* MODEL.PROPOSAL_GENERATOR.MIN_SIZE",
        "MODEL.PROPOSAL_GENERATOR.NAME",
        f"!{PRECOMPUTED}",
    ),
    ("VIS_PERIOD", _ARCHITECTURE, f"{_RCNN} RetinaNet"),
    ("MODEL.ROI_MASK_HEAD.* INPUT.MASK_FORMAT", "MODEL.MASK_ON", "True"),
    ("MODEL.ROI_KEYPOINT_HEAD.* TEST.KEYPOINT_OKS_SIGMAS", "MODEL.KEYPOINT_ON", "True"),
    ("MODEL.ROI_BOX_CASCADE_HEAD.*", "MODEL.ROI_HEADS.NAME", "*Cascade*"),
    *(  # C4 has no box head
        (f"MODEL.ROI_BOX_HEAD.{key}", "MODEL.ROI_HEADS.NAME", "!*Res5ROIHeads")
        for key in _IN_BOX_HEAD
    ),
    ("MODEL.ROI_BOX_HEAD.FED_LOSS_*", "MODEL.ROI_BOX_HEAD.USE_FED_LOSS", "True"),
    ("MODEL.FPN.*", "MODEL.BACKBONE.NAME", "*fpn* *FPN*"),
    # PRECISION, unlike the others, applies to any detector.
    (
        "MODEL.RESNEXT.[!P]* MODEL.RESNEXT.PRE_ACTIVATION",
        "MODEL.BACKBONE.NAME MODEL.ROI_HEADS.NAME",
        "*resnext* *ResNeXt*",
    ),
    ("MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1", "MODEL.RESNETS.STRIDE_IN_1X1", "True"),
    ("MODEL.ANCHOR_GENERATOR.ANGLES", "MODEL.ANCHOR_GENERATOR.NAME", "*Rotated*"),
    ("DATASETS.PROPOSAL_FILES_* DATASETS.PRECOMPUTED_*", "MODEL.LOAD_PROPOSALS", "True"),
    *((f"{group}.*", f"{group}.ENABLED", "True") for group in (*_SWITCHED, "INPUT.CROP", "WANDB")),
    ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
    ("SOLVER.BASE_LR_END", _SCHEDULER, COSINE),
    ("SOLVER.NUM_DECAYS", _SCHEDULER, FIXED_GAMMA),
    ("SOLVER.GAMMA", _SCHEDULER, f"{MULTI_STEP} {FIXED_GAMMA}"),
    ("DATALOADER.REPEAT_*", "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
    ("TEST.BEST.PATIENCE", "TEST.BEST.METRIC", "?*"),
    ("GLOBAL.HACK", "", ""),
)


def unread_because(cfg: CfgNode, key: str) -> str | None:
    """Return the keys whose values keep a key from being read ("" if nothing ever reads it).

    None if it is read.

    Args:
        cfg: with the keys of this package.
        key: such as "SOLVER.BASE_LR_END".
    """
    for patterns, decides, values in _NEEDS:
        found = [str(value_of(cfg, each)) for each in decides.split()]
        is_read = key == decides or any(_matches(value, values) for value in found)
        if _matches(key, patterns) and not is_read:
            return decides.replace(" ", " and ")
    return None
