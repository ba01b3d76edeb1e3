"""Settings that cannot work together, and settings that nothing reads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from resnext_det.config import complete, default_of
from resnext_det.config_rules import COSINE, FIXED_GAMMA, MULTI_STEP, RULES, refuse, value_of
from resnext_det.errors import quoted
from resnext_det.files import open_regular
from resnext_det.weights.pickles import ArrayUnpickler

_NORMS = (*("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD", "RETINANET"),)


def refuse_impossible(cfg: CfgNode, processes: int = 1, *, training: bool = True) -> None:
    """Refuse settings that would end a run later, most of them in an error of a library's.

    Args:
        cfg: any Detectron2 config.
        processes: of the run.
        training: whether it trains; else it evaluates only.

    Raises:
        ConfigError: it names every such setting, and what to do.
    """
    cfg = complete(cfg)
    refuse(
        _augmentation(cfg),
        _proposal_files(cfg, "TRAIN") if training else None,
        _proposal_files(cfg, "TEST"),
        *((_pictures(cfg), _federated_loss(cfg), _range(cfg), _crop(cfg)) if training else ()),
        *_synchronised_norms(cfg, processes),
        _pixels(cfg),
    )


def _augmentation(cfg: CfgNode) -> str | None:
    """Detectron2's GeneralizedRCNNWithTTA asserts as much."""
    if not cfg.TEST.AUG.ENABLED:
        return None
    model = cfg.MODEL.META_ARCHITECTURE
    reasons = [
        (model != "GeneralizedRCNN", f"MODEL.META_ARCHITECTURE is {model}"),
        (cfg.MODEL.KEYPOINT_ON, "MODEL.KEYPOINT_ON is True"),
        (cfg.MODEL.LOAD_PROPOSALS, "MODEL.LOAD_PROPOSALS is True"),
    ]
    found = " and ".join(reason for holds, reason in reasons if holds)
    return found and (
        f"TEST.AUG.ENABLED is True and {found}: Detectron2 augments the tests of GeneralizedRCNN "
        "alone, without keypoints and files of proposals. Set TEST.AUG.ENABLED False."
    )


def _proposal_files(cfg: CfgNode, use: str) -> str | None:
    names, files = cfg.DATASETS[use], cfg.DATASETS[f"PROPOSAL_FILES_{use}"]
    if not cfg.MODEL.LOAD_PROPOSALS or not names:
        return None
    if addresses := [f for f in files if "://" in f and not f.startswith("detectron2://")]:
        return (
            f"DATASETS.PROPOSAL_FILES_{use} has the address {quoted(addresses[0])}, and Detectron2 "
            "executes what it downloads from there. Download the file, and name its path."
        )
    missing = [file for file in files if "://" not in file and not Path(file).is_file()]
    if len(files) == len(names) and not missing:
        return next((said for file in files if (said := _more_than_boxes(Path(file)))), None)
    return (
        f"MODEL.LOAD_PROPOSALS is True, and DATASETS.PROPOSAL_FILES_{use} names {len(files)} files "
        f"({len(missing)} of them missing) for {len(names)} data sets in DATASETS.{use}: name an "
        "existing file for each, or set MODEL.LOAD_PROPOSALS False."
    )


def _more_than_boxes(file: Path) -> str | None:
    """Read a file of proposals as data: Detectron2 unpickles it, which runs any code in it."""
    if not file.is_file():
        return None  # of detectron2://, its own server
    try:
        with open_regular(file) as stream:
            ArrayUnpickler(stream).load()
    except Exception as error:  # a damaged pickle raises anything
        return (
            f"the proposals {quoted(file)} are not a pickle of arrays alone ({quoted(error)}): "
            "reading them might run a program. Write them again with Detectron2."
        )
    return None


def _pictures(cfg: CfgNode) -> str | None:
    if not cfg.VIS_PERIOD or importlib.util.find_spec("cv2") is not None:
        return None
    return (
        f"VIS_PERIOD is {cfg.VIS_PERIOD}, and Detectron2 draws the pictures with OpenCV, which is "
        "not installed: pip install opencv-python-headless, or set VIS_PERIOD 0."
    )


def _federated_loss(cfg: CfgNode) -> str | None:
    head = cfg.MODEL.ROI_BOX_HEAD
    if not head.USE_FED_LOSS:
        return None
    if not head.USE_SIGMOID_CE:
        return (
            "MODEL.ROI_BOX_HEAD.USE_FED_LOSS is True, which needs USE_SIGMOID_CE True as well: set "
            "both, or neither."
        )
    without = [
        name
        for name in cfg.DATASETS.TRAIN
        if not hasattr(MetadataCatalog.get(name), "class_image_count")
    ]
    return (
        f"MODEL.ROI_BOX_HEAD.USE_FED_LOSS is True, and data set {without[0]} does not say how many "
        "images each class is in (class_image_count in its metadata, as LVIS has it). Set "
        "USE_FED_LOSS False."
        if without
        else None
    )


def _range(cfg: CfgNode) -> str | None:
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING != "range" or len(sizes) == 2:
        return None
    return (
        f"INPUT.MIN_SIZE_TRAIN_SAMPLING is range, and INPUT.MIN_SIZE_TRAIN is {sizes}: give the "
        "least and the greatest, such as (640, 800), or set INPUT.MIN_SIZE_TRAIN_SAMPLING choice."
    )


def _crop(cfg: CfgNode) -> str | None:
    crop = cfg.INPUT.CROP
    relative = crop.TYPE.startswith("relative")
    if not crop.ENABLED or all(size <= 1 if relative else size == int(size) for size in crop.SIZE):
        return None
    allowed = "shares from 0 to 1" if relative else "whole numbers of pixels"
    return f"INPUT.CROP.SIZE is {crop.SIZE}; with INPUT.CROP.TYPE {crop.TYPE} it must be {allowed}."


def _synchronised_norms(cfg: CfgNode, processes: int) -> list[str]:
    if processes == 1 or not cfg.MODEL.DEVICE.startswith("cpu"):
        return []
    return [
        f"MODEL.{part}.NORM is {cfg.MODEL[part].NORM}, which PyTorch has for GPUs alone, and "
        f"{processes} processes run on the CPU. Set naiveSyncBN, or start one process."
        for part in _NORMS
        if cfg.MODEL[part].NORM in ("SyncBN", "nnSyncBN")
    ]


def _pixels(cfg: CfgNode) -> str | None:
    mean, deviation = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if len(mean) == len(deviation):
        return None
    return (
        f"MODEL.PIXEL_MEAN has {len(mean)} values and MODEL.PIXEL_STD {len(deviation)}: each has "
        "one for each channel of the image."
    )


Reads = Callable[[CfgNode], bool]


def _architecture(*names: str) -> Reads:
    return lambda cfg: cfg.MODEL.META_ARCHITECTURE in names


def _has(key: str, *values: object) -> Reads:
    return lambda cfg: value_of(cfg, key) in (values or (True,))


_RCNN = ("GeneralizedRCNN", "PanopticFPN")
_KNOWN = (*_RCNN, "ProposalNetwork", "RetinaNet", "SemanticSegmentor")
_C4 = ("Res5ROIHeads", "ResNeXtRes5ROIHeads")

# What a key, or all keys that begin so, need to be read, by the key that decides.
_NEEDS: tuple[tuple[str, str, Reads], ...] = (
    ("MODEL.RETINANET.", "MODEL.META_ARCHITECTURE", _architecture("RetinaNet")),
    *(
        (f"MODEL.{part}.", "MODEL.META_ARCHITECTURE", _architecture(*_RCNN))
        for part in ("ROI_HEADS", "ROI_BOX_HEAD", "ROI_BOX_CASCADE_HEAD", "ROI_MASK_HEAD")
    ),
    ("MODEL.ROI_KEYPOINT_HEAD.", "MODEL.META_ARCHITECTURE", _architecture(*_RCNN)),
    (
        "MODEL.SEM_SEG_HEAD.",
        "MODEL.META_ARCHITECTURE",
        _architecture("SemanticSegmentor", "PanopticFPN"),
    ),
    ("MODEL.PANOPTIC_FPN.", "MODEL.META_ARCHITECTURE", _architecture("PanopticFPN")),
    *(
        (prefix, "MODEL.META_ARCHITECTURE", _architecture(*_RCNN, "ProposalNetwork"))
        for prefix in ("MODEL.RPN.", "MODEL.PROPOSAL_GENERATOR.")
    ),
    ("VIS_PERIOD", "MODEL.META_ARCHITECTURE", _architecture(*_RCNN, "RetinaNet")),
    ("MODEL.ROI_MASK_HEAD.", "MODEL.MASK_ON", _has("MODEL.MASK_ON")),
    ("INPUT.MASK_FORMAT", "MODEL.MASK_ON", _has("MODEL.MASK_ON")),
    ("MODEL.ROI_KEYPOINT_HEAD.", "MODEL.KEYPOINT_ON", _has("MODEL.KEYPOINT_ON")),
    ("TEST.KEYPOINT_OKS_SIGMAS", "MODEL.KEYPOINT_ON", _has("MODEL.KEYPOINT_ON")),
    (
        "MODEL.ROI_BOX_CASCADE_HEAD.",
        "MODEL.ROI_HEADS.NAME",
        lambda cfg: "Cascade" in cfg.MODEL.ROI_HEADS.NAME,
    ),
    *(
        (f"MODEL.ROI_BOX_HEAD.{key}", "MODEL.ROI_HEADS.NAME", lambda cfg: not _is_c4(cfg))
        for key in ("NAME", "NUM_FC", "FC_DIM", "NUM_CONV", "CONV_DIM", "NORM", "TRAIN_ON_PRED")
    ),
    ("MODEL.FPN.", "MODEL.BACKBONE.NAME", lambda cfg: "fpn" in cfg.MODEL.BACKBONE.NAME.lower()),
    (
        "MODEL.RESNEXT.",
        "MODEL.BACKBONE.NAME",
        lambda cfg: "resnext" in f"{cfg.MODEL.BACKBONE.NAME}{cfg.MODEL.ROI_HEADS.NAME}".lower(),
    ),
    (
        "MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1",
        "MODEL.RESNETS.STRIDE_IN_1X1",
        _has("MODEL.RESNETS.STRIDE_IN_1X1"),
    ),
    ("MODEL.ANCHOR_GENERATOR.ANGLES", "MODEL.ANCHOR_GENERATOR.NAME", lambda cfg: _rotated(cfg)),
    *(
        (f"DATASETS.{key}_{use}", "MODEL.LOAD_PROPOSALS", _has("MODEL.LOAD_PROPOSALS"))
        for key in ("PROPOSAL_FILES", "PRECOMPUTED_PROPOSAL_TOPK")
        for use in ("TRAIN", "TEST")
    ),
    *(
        (f"MODEL.ROI_BOX_HEAD.FED_LOSS_{key}", key_of, _has(key_of))
        for key_of in ("MODEL.ROI_BOX_HEAD.USE_FED_LOSS",)
        for key in ("FREQ_WEIGHT_POWER", "NUM_CLASSES")
    ),
    *(
        (f"{group}.", f"{group}.ENABLED", _has(f"{group}.ENABLED"))
        for group in (
            *("TEST.AUG", "TEST.PRECISE_BN", "SOLVER.CLIP_GRADIENTS", "SOLVER.AMP", "SOLVER.EMA"),
            *("INPUT.CROP", "WANDB"),
        )
    ),
    (
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
        _has("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
    ),
    *(
        (f"SOLVER.{key}", "SOLVER.LR_SCHEDULER_NAME", _has("SOLVER.LR_SCHEDULER_NAME", *names))
        for key, names in (
            ("BASE_LR_END", (COSINE,)),
            ("NUM_DECAYS", (FIXED_GAMMA,)),
            ("GAMMA", (MULTI_STEP, FIXED_GAMMA)),
        )
    ),
    *(
        (f"DATALOADER.REPEAT_{key}", "DATALOADER.SAMPLER_TRAIN", lambda cfg: _repeats(cfg))
        for key in ("THRESHOLD", "SQRT")
    ),
    ("TEST.BEST.PATIENCE", "TEST.BEST.METRIC", lambda cfg: bool(cfg.TEST.BEST.METRIC)),
    ("GLOBAL.HACK", "nothing in Detectron2 or here", lambda cfg: False),
)


def _is_c4(cfg: CfgNode) -> bool:
    return cfg.MODEL.ROI_HEADS.NAME in _C4


def _rotated(cfg: CfgNode) -> bool:
    return "Rotated" in cfg.MODEL.ANCHOR_GENERATOR.NAME


def _repeats(cfg: CfgNode) -> bool:
    return bool(cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler")


def idle_settings(cfg: CfgNode) -> dict[str, str]:
    """Return the settings that are off their default and that nothing reads.

    Args:
        cfg: any Detectron2 config; of an architecture that Detectron2 does not have, nothing is
            known, and nothing said.

    Returns:
        By key, what would have to be set otherwise for it to be read.
    """
    cfg = complete(cfg)
    if cfg.MODEL.META_ARCHITECTURE not in _KNOWN:
        return {}
    idle: dict[str, str] = {}
    for key in RULES:
        if value_of(cfg, key) == default_of(key):
            continue
        for prefix, decides, reads in _NEEDS:
            if key != decides and key.startswith(prefix) and not reads(cfg):
                idle.setdefault(key, decides)
    return idle


def idle_warning(cfg: CfgNode) -> str | None:
    """Return one line about settings that have no effect, or None; see `idle_settings`."""
    idle = idle_settings(cfg)
    if not idle:
        return None
    shown = ", ".join(f"{key} (see {decides})" for key, decides in list(idle.items())[:5])
    more = f" and {len(idle) - 5} more" if len(idle) > 5 else ""
    return f"these settings have no effect in this config: {shown}{more}"
