"""Evaluate a detector that was trained before."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from resnext_det.backbones import build_detector
from resnext_det.checkpoint_file import iteration_of, read_outline
from resnext_det.config import complete
from resnext_det.config_use import idle_warning, refuse_impossible
from resnext_det.data.custom import class_names
from resnext_det.engine.checkpoints import last_good
from resnext_det.engine.classes import check_classes
from resnext_det.engine.recorded_config import check_same_function
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError, quoted
from resnext_det.evaluation.coco import (
    COCO_KEYPOINTS,
    FIGURES,
    KEYPOINT_FIGURES,
    PROPOSAL_FIGURES,
)
from resnext_det.weights.loading import load_weights

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS on every data set of DATASETS.TEST.

    Args:
        cfg: the config.
        resume: evaluate the last checkpoint of OUTPUT_DIR instead of MODEL.WEIGHTS.

    Returns:
        {"bbox": {"AP": ...}} in percent, by data set where there are several; with
        TEST.AUG.ENABLED, the figures of augmented images as well, under names that end in "_TTA".

    Raises:
        WeightsError: the weights do not fill the whole detector.
        ConfigError: `resume`, and there is no checkpoint in OUTPUT_DIR; or the detector was trained
            with settings that change its function.
        DatasetError: the data has other classes than the weights.
    """
    refuse_impossible(cfg, comm.get_world_size(), training=False)
    if (warning := idle_warning(cfg)) is not None:
        logger.warning("%s", warning)
    if resume:
        checkpoint = last_checkpoint(cfg)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = str(checkpoint)
        cfg.freeze()
    if cfg.MODEL.WEIGHTS:
        check_same_function(cfg)
    model = build_detector(cfg)
    logger.info("%s", load_weights(model, cfg, whole_detector=True))
    check_classes(cfg, weights=Path(PathManager.get_local_path(cfg.MODEL.WEIGHTS)))
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results = {**results, **Trainer.test_with_TTA(cfg, model)}
    return results


def of_run(folder: Path) -> tuple[Path, Path]:
    """Return the config and the weights of a run.

    The weights are model_final.pth, unless a resumed training has gone further since: then its last
    good checkpoint.

    Args:
        folder: OUTPUT_DIR of a training.

    Returns:
        The files; config.yaml names the data, and datasets.json beside it their files.

    Raises:
        ConfigError: the folder, its config or its weights are missing.
        TrainingError: there are checkpoints, and all of them are damaged.
    """
    config, final = folder / "config.yaml", folder / "model_final.pth"
    if not config.is_file():
        raise ConfigError(
            f"--run {quoted(folder)} holds no config.yaml: name OUTPUT_DIR of a training, or name "
            "--config-file and MODEL.WEIGHTS instead."
        )
    weights = last_good(folder)
    if final.is_file() and (weights is None or _iteration(final) >= _iteration(weights)):
        weights = final
    if weights is None:
        raise ConfigError(
            f"--run {quoted(folder)} holds no checkpoint of a training: name OUTPUT_DIR of one, or "
            "name --config-file and MODEL.WEIGHTS instead."
        )
    return config, weights


def _iteration(file: Path) -> int:
    found = iteration_of(read_outline(file))
    return -1 if found is None else found


def check_expectations(cfg: CfgNode) -> None:
    """Refuse what would end an evaluation, or a training at its first one.

    Detectron2 notices a wrong TEST.EXPECTED_RESULTS at the very end, with a KeyError. What the
    evaluation of a model does not cover is warned about.

    Args:
        cfg: the run's config.

    Raises:
        ConfigError: an entry has not the form [task, metric, value, tolerance], or names what an
            evaluation does not give; losses are wanted of no data set; nothing of the model can
            be evaluated, or not with these sigmas.
    """
    cfg = complete(cfg)
    if cfg.DATASETS.TEST:
        _check_kinds(cfg)
    if cfg.TEST.VALIDATION_LOSS and not cfg.DATASETS.TEST:
        raise ConfigError(
            "TEST.VALIDATION_LOSS is True and DATASETS.TEST is empty: name the data set that the "
            "losses shall be of, or set TEST.VALIDATION_LOSS False."
        )
    expected = cfg.TEST.EXPECTED_RESULTS
    if not expected:
        return
    known = _figures(cfg)
    by_class: set[str] = set()
    if "bbox" in known:
        by_class = {f"AP-{name}" for name in class_names(cfg)}
    for entry in expected:
        try:
            given, metric, value, tolerance = entry
            sound = metric in known.get(given, ()) or (given in known and metric in by_class)
            sound = sound and float(value) == value and float(tolerance) >= 0
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise ConfigError(
                f"TEST.EXPECTED_RESULTS has the entry {quoted(entry)}. Entries are [TASK, METRIC, "
                "VALUE, TOLERANCE], in percent; TASK and METRIC are "
                + "; ".join(f"{task!r} and {', '.join(names)}" for task, names in known.items())
                + f"{', or AP-CLASS' if by_class else ''}."
            )
    if len(cfg.DATASETS.TEST) != 1:
        raise ConfigError(
            f"TEST.EXPECTED_RESULTS is of one data set, and DATASETS.TEST is {cfg.DATASETS.TEST}."
        )


def _figures(cfg: CfgNode) -> dict[str, tuple[str, ...]]:
    """Return the figures that an evaluation gives, by task."""
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        return {"box_proposals": PROPOSAL_FIGURES}
    known: dict[str, tuple[str, ...]] = {"bbox": FIGURES}
    if cfg.MODEL.MASK_ON:
        known["segm"] = FIGURES
    if cfg.MODEL.KEYPOINT_ON:
        known["keypoints"] = KEYPOINT_FIGURES
    if cfg.TEST.AUG.ENABLED:
        known |= {f"{task}_TTA": figures for task, figures in known.items()}
    return known


def _check_kinds(cfg: CfgNode) -> None:
    """Refuse models that the evaluation cannot cover, and warn about those it covers in part."""
    model = cfg.MODEL.META_ARCHITECTURE
    if model == "SemanticSegmentor":
        raise ConfigError(
            "MODEL.META_ARCHITECTURE is 'SemanticSegmentor', and boxes, masks, keypoints and "
            "proposals can be evaluated. Set DATASETS.TEST () and evaluate with Detectron2's "
            "SemSegEvaluator."
        )
    if model == "PanopticFPN":
        logger.warning(
            "the evaluation of PanopticFPN gives figures of boxes and masks (bbox, segm), and "
            "none of panoptic or semantic quality (PQ, mIoU): use Detectron2's "
            "COCOPanopticEvaluator and SemSegEvaluator for these"
        )
    points, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    if cfg.MODEL.KEYPOINT_ON and points != (len(sigmas) or COCO_KEYPOINTS):
        raise ConfigError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {points}, and TEST.KEYPOINT_OKS_SIGMAS has "
            f"{len(sigmas)} values: it takes one for each keypoint. It may be empty for COCO's "
            f"{COCO_KEYPOINTS} alone."
        )


def last_checkpoint(cfg: CfgNode) -> Path:
    """Return the last good checkpoint of OUTPUT_DIR, which a training would resume from.

    Args:
        cfg: the run's config; only OUTPUT_DIR is read.

    Raises:
        ConfigError: there is none.
        TrainingError: there are checkpoints, and all of them are damaged.
    """
    folder = Path(cfg.OUTPUT_DIR)
    file = last_good(folder)
    if file is None:
        raise ConfigError(
            f"--resume: {folder} holds no checkpoint. Name the folder of the training, OUTPUT_DIR "
            "FOLDER, or leave --resume out and name the weights: MODEL.WEIGHTS FILE."
        )
    return file
