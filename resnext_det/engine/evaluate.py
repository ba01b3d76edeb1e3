"""Evaluate a trained detector, given its config or the folder of its run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import ProposalNetwork
from detectron2.utils import comm
from torch import nn

from resnext_det import hub
from resnext_det.backbones import build_detector
from resnext_det.checkpoint_file import iteration_of
from resnext_det.config import complete, idle_warning
from resnext_det.config_rules import refuse_impossible
from resnext_det.data.annotations import forget
from resnext_det.engine.checkpoints import last_good
from resnext_det.engine.inference import evaluate_datasets, renamed
from resnext_det.engine.recorded_config import check_classes, check_same_function
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError, TrainingError, plain, quoted
from resnext_det.evaluation.coco import COCO_KEYPOINTS, Engine
from resnext_det.evaluation.proposals import ProposalEvaluator
from resnext_det.evaluation.results_file import INFERENCE
from resnext_det.weights.loading import load_weights, weights_file
from resnext_det.weights.reading import read_outline

logger = logging.getLogger(__name__)


def evaluate(
    cfg: CfgNode, *, resume: bool = False, save_proposals: Path | None = None
) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS on every data set of DATASETS.TEST.

    Args:
        cfg: the config.
        resume: evaluate the last checkpoint of OUTPUT_DIR instead.
        save_proposals: evaluate the proposals of the detector's RPN, and write them to this file.

    Returns:
        {"bbox": {"AP": ...}} in percent, by data set if there are several; with TEST.AUG.ENABLED
        also the figures of test-time augmentation, such as "bbox_TTA".

    Raises:
        WeightsError: the weights do not fill the whole detector.
        ConfigError: `resume` without a checkpoint in OUTPUT_DIR, or settings that change the
            function of the detector.
        DatasetError: the data has other classes than the weights.
    """
    refuse_impossible(cfg, comm.get_world_size(), training=False)
    if (warning := idle_warning(cfg)) is not None:
        logger.warning("%s", warning)
    if save_proposals is not None and len(cfg.DATASETS.TEST) != 1:
        raise ConfigError(
            f"--save-proposals {quoted(save_proposals)} holds the proposals of one data set, and "
            f"DATASETS.TEST names {len(cfg.DATASETS.TEST)}: name one."
        )
    if resume:
        cfg = renamed(cfg, str(last_checkpoint(cfg)))
    check_same_function(cfg)
    model = build_detector(cfg)
    logger.info("%s", load_weights(model, cfg, whole_detector=True))
    check_classes(cfg, weights=weights_file(cfg))
    if save_proposals is not None:
        try:
            return propose(cfg, model, dict.fromkeys(cfg.DATASETS.TEST, save_proposals))
        finally:
            forget()
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results = {**results, **Trainer.test_with_TTA(cfg, model)}
    return results


def propose(
    cfg: CfgNode, model: nn.Module, files: Mapping[str, Path], *, figures: bool = True
) -> dict[str, Any]:
    """Write the proposals of a detector's RPN, and evaluate them.

    A collective call.

    Args:
        cfg: the config.
        model: the detector, with its weights.
        files: to write, by data set.
        figures: whether to compute the average recall, for which one process reads the best 1000
            proposals of all images.

    Returns:
        {"box_proposals": {"AR@100": ...}} in percent, by data set if there are several.

    Raises:
        ConfigError: the detector has no RPN.
    """
    if not isinstance(model, ProposalNetwork):
        rpn = getattr(model, "proposal_generator", None)
        if rpn is None:
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, whose detector has no "
                "RPN: proposals need ProposalNetwork, or GeneralizedRCNN without "
                "MODEL.LOAD_PROPOSALS."
            )
        detector: Any = model
        model = ProposalNetwork(
            backbone=detector.backbone,
            proposal_generator=rpn,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
        )
        model.to(detector.device).train(detector.training)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = tuple(files)
    cfg.freeze()

    def evaluator(name: str) -> ProposalEvaluator:
        return ProposalEvaluator(
            name,
            Path(cfg.OUTPUT_DIR) / INFERENCE,
            {"weights": cfg.MODEL.WEIGHTS},
            Engine(cfg.TEST.ENGINE, cfg.TEST.CROSS_CHECK),
            files[name],
            cfg.MODEL.RPN.POST_NMS_TOPK_TEST,
            figures=figures,
        )

    return evaluate_datasets(
        cfg, model, evaluator, functools.partial(Trainer.build_test_loader, cfg)
    )


def of_run(folder: Path | str) -> tuple[Path, Path | str]:
    """Return the config and the weights in the OUTPUT_DIR of a training, or at an hf:// address.

    The weights are model_final.pth, or the last good checkpoint if that is newer or the training
    was not finished; those at an address are its commit's address.

    Raises:
        ConfigError: the folder, its config or its weights are missing.
        TrainingError: all checkpoints are damaged.
        WeightsError: the address cannot be fetched.
    """
    if str(folder).startswith(hub.SCHEME):
        address = hub.Address.of(str(folder))
        fetched = hub.fetch(address)
        return fetched.with_name(hub.CONFIG), str(replace(address, revision=fetched.parent.name))
    folder = Path(folder)
    config, weights = folder / "config.yaml", folder / "model_final.pth"
    try:
        last = last_good(folder)
    except TrainingError:
        if not weights.is_file():
            raise
        last = None  # weights without an optimizer cannot be resumed, but evaluated
    if last is not None and not (weights.is_file() and _iteration(weights) >= _iteration(last)):
        weights = last
    if not config.is_file() or not weights.is_file():
        missing = "checkpoint" if config.is_file() else "config.yaml"
        raise ConfigError(
            f"the folder {quoted(folder)} holds no {missing}: name the OUTPUT_DIR of a training, "
            "or a config and MODEL.WEIGHTS."
        )
    return config, weights


def _iteration(file: Path) -> int:
    found = iteration_of(read_outline(file, others=True))
    return -1 if found is None else found


def last_checkpoint(cfg: CfgNode) -> Path:
    """Return the last good checkpoint of OUTPUT_DIR, which a training would resume from.

    Raises:
        ConfigError: there is none.
        TrainingError: all checkpoints are damaged.
    """
    file = last_good(Path(cfg.OUTPUT_DIR))
    if file is None:
        raise ConfigError(
            f"--resume: {cfg.OUTPUT_DIR} holds no checkpoint. Set OUTPUT_DIR to the folder of a "
            "training, or omit --resume and set MODEL.WEIGHTS FILE."
        )
    return file


def check_expectations(cfg: CfgNode) -> None:
    """Refuse settings that would fail an evaluation, or a training at its first one.

    Raises:
        ConfigError: the model cannot be evaluated, or not with these sigmas, or there is no data
            set for validation losses.
    """
    cfg = complete(cfg)
    if not cfg.DATASETS.TEST:
        if cfg.TEST.VALIDATION_LOSS:
            raise ConfigError(
                "TEST.VALIDATION_LOSS is True, but DATASETS.TEST is empty: name the data set to "
                "compute the losses of, or set it to False."
            )
        return
    if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        raise ConfigError(
            "MODEL.META_ARCHITECTURE is SemanticSegmentor, but only boxes, masks, keypoints and "
            "proposals can be evaluated: set DATASETS.TEST () and use Detectron2's "
            "SemSegEvaluator."
        )
    panoptic = cfg.MODEL.META_ARCHITECTURE == "PanopticFPN"
    for name in cfg.DATASETS.TEST if panoptic else ():
        if not MetadataCatalog.get(name).get("panoptic_json"):
            logger.warning(
                "%s has no panoptic annotations, so of this PanopticFPN only boxes and masks are "
                "evaluated: register it with Detectron2's register_coco_panoptic_separated",
                plain(name),
            )
    keypoints, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    if cfg.MODEL.KEYPOINT_ON and keypoints != (len(sigmas) or COCO_KEYPOINTS):
        raise ConfigError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {keypoints}, but TEST.KEYPOINT_OKS_SIGMAS "
            f"has {len(sigmas)} values: set one per keypoint, or none for COCO's {COCO_KEYPOINTS} "
            "keypoints."
        )
