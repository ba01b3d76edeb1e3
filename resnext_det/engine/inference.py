"""Evaluating a model on its data sets: every image once, and nothing lost when it is killed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.testing import print_csv_format
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from resnext_det.engine.train_loop import bare
from resnext_det.environment import versions
from resnext_det.errors import DatasetError
from resnext_det.evaluation.evaluator import BoxEvaluator

logger = logging.getLogger(__name__)

Loader = Any
Results = dict[str, Any]


def evaluate_datasets(
    cfg: CfgNode,
    model: nn.Module,
    evaluator_of: Callable[[str], DatasetEvaluator],
    loader_of: Callable[[str, frozenset[int]], Loader],
) -> Results:
    """Evaluate a model on every data set of DATASETS.TEST.

    Called in all processes together; each takes its share of the images.

    Args:
        cfg: the config.
        model: with its weights.
        evaluator_of: gives the evaluator of a data set.
        loader_of: gives its images for this process, but for those of the given ids.

    Returns:
        {"bbox": {"AP": ...}}, by data set where there are several; nothing but on the main
        process.
    """
    results: OrderedDict[str, Results] = OrderedDict()
    kept: list[BoxEvaluator] = []
    digest = ""
    for name in cfg.DATASETS.TEST:
        evaluator = evaluator_of(name)
        done: frozenset[int] = frozenset()
        if isinstance(evaluator, BoxEvaluator):
            logger.info(
                "evaluating on %s: annotations %s, images %s",
                name,
                evaluator.annotations.resolve(),
                evaluator.metadata.image_root,
            )
            digest = digest or state_digest(bare(model))
            done = evaluator.keep(_identity(cfg, digest, evaluator))
            kept.append(evaluator)
        results[name] = _evaluate(model, evaluator, loader_of, name, done)
        if comm.is_main_process():
            print_csv_format(results[name])
    for evaluator in kept:  # only now: one that is killed at the last set repeats no other
        evaluator.forget()
    return next(iter(results.values())) if len(results) == 1 else results


def _evaluate(
    model: nn.Module,
    evaluator: DatasetEvaluator,
    loader_of: Callable[[str, frozenset[int]], Loader],
    name: str,
    done: frozenset[int],
) -> Results:
    if done:
        logger.info("%d images were predicted before this evaluation was ended", len(done))
    try:
        loader = loader_of(name, done)
    except NothingLeft:
        evaluator.reset()
        found: Results | None = evaluator.evaluate()
        return found or {}
    bar = tqdm(
        loader,
        desc=name,
        unit="batch",
        # In all processes but one it would repeat.
        disable=None if comm.is_main_process() else True,
        leave=False,
    )
    found = inference_on_dataset(model, bar, evaluator)
    return found or {}


class NothingLeft(DatasetError):
    """All images of a data set were predicted already."""


def remaining(records: list[dict[str, Any]], done: frozenset[int]) -> list[dict[str, Any]]:
    """Return the records of the images that are not done.

    Args:
        records: of a data set, with "image_id".
        done: ids of images.

    Raises:
        NothingLeft: there are none.
    """
    left = [record for record in records if record["image_id"] not in done]
    if not left and records:
        raise NothingLeft("all images were predicted already")
    return left


def renamed(cfg: CfgNode, folder: str, weights: str) -> CfgNode:
    """Return a config whose results go to a folder, and stand beside a name of the weights.

    Args:
        cfg: the config; it is not changed.
        folder: for OUTPUT_DIR.
        weights: for MODEL.WEIGHTS, which a test does not load.
    """
    changed: CfgNode = cfg.clone()
    changed.defrost()
    changed.OUTPUT_DIR, changed.MODEL.WEIGHTS = folder, weights
    changed.freeze()
    return changed


def state_digest(model: nn.Module) -> str:
    """Return a digest of all parameters and buffers of a model, and of their names.

    Args:
        model: on any device; the digest does not depend on it.

    Returns:
        32 bytes in hexadecimal.
    """
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _identity(cfg: CfgNode, weights: str, evaluator: BoxEvaluator) -> str:
    """Return a digest of all that predictions depend on."""
    settings = cfg.clone()
    settings.defrost()
    settings.MODEL.WEIGHTS = ""  # the weights themselves stand in the digest
    said = {
        "weights": weights,
        "model": settings.MODEL.dump(),
        "input": settings.INPUT.dump(),
        "augmentation": settings.TEST.AUG.dump(),
        "detections": settings.TEST.DETECTIONS_PER_IMAGE,
        "annotations": hashlib.sha256(evaluator.annotations.read_bytes()).hexdigest(),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
