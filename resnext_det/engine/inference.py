"""Evaluating a model on its data sets: every image once, and nothing lost when it is killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.testing import print_csv_format
from detectron2.utils import comm
from torch import nn

from resnext_det.console import progress_bar
from resnext_det.engine.stopping import SIGNALS
from resnext_det.engine.train_loop import unwrap
from resnext_det.environment import commit, versions
from resnext_det.errors import EvaluationError
from resnext_det.evaluation.annotations import ImageKey
from resnext_det.evaluation.evaluator import DetectionEvaluator
from resnext_det.files import file_digest

logger = logging.getLogger(__name__)

_WARMUP_BATCHES = 5  # as `inference_on_dataset` leaves out

Loader = Any
Results = dict[str, Any]


def evaluate_datasets(
    cfg: CfgNode,
    model: nn.Module,
    evaluator_of: Callable[[str], DatasetEvaluator],
    loader_of: Callable[[str], Loader],
) -> Results:
    """Evaluate a model on every data set of DATASETS.TEST.

    Called in all processes together; each takes its share of the images.

    Args:
        cfg: the config.
        model: with its weights.
        evaluator_of: gives the evaluator of a data set.
        loader_of: gives its images for this process.

    Returns:
        {"bbox": {"AP": ...}}, by data set where there are several; nothing but on the main
        process.

    Raises:
        EvaluationError: the processes have different weights.
    """
    results: OrderedDict[str, Results] = OrderedDict()
    kept: list[DetectionEvaluator] = []
    with buffers_of_the_first(model):
        digest = model_digest(cfg, model)
        for name in cfg.DATASETS.TEST:
            evaluator = evaluator_of(name)
            done: frozenset[ImageKey] = frozenset()
            if isinstance(evaluator, DetectionEvaluator):
                _tell_files(evaluator)
                evaluator.description["model_sha256"] = digest
                done = evaluator.keep(_identity(digest, evaluator))
                kept.append(evaluator)
            results[name] = _evaluate(model, evaluator, loader_of, name, done)
            if comm.is_main_process():
                print_csv_format(results[name])
    for evaluator in kept:  # only now: one that is killed at the last set repeats no other
        evaluator.forget()
    return next(iter(results.values())) if len(results) == 1 else results


def _tell_files(evaluator: DetectionEvaluator) -> None:
    logger.info(
        "evaluating on %s: annotations %s, images %s",
        evaluator.dataset,
        evaluator.annotations.resolve(),
        evaluator.images,
    )


def _evaluate(
    model: nn.Module,
    evaluator: DatasetEvaluator,
    loader_of: Callable[[str], Loader],
    name: str,
    done: frozenset[ImageKey],
) -> Results:
    if done:
        logger.info("%d images were predicted before this evaluation was ended", len(done))
        if isinstance(evaluator, DetectionEvaluator) and evaluator.needs_none_but(done):
            evaluator.reset()
            return evaluator.evaluate()
    remaining = Remaining(loader_of(name), done)
    callbacks: dict[str, Callable[[], None]] = {}
    if isinstance(evaluator, DetectionEvaluator):
        evaluator.measured["parameters"] = sum(each.numel() for each in model.parameters())
        callbacks = Stopwatch(remaining, evaluator.measured).callbacks
    bar = progress_bar(
        remaining,
        desc=name,
        unit="batch",
        # In all processes but one it would repeat.
        disable=not comm.is_main_process(),
    )
    found: Results | None = inference_on_dataset(model, bar, evaluator, callbacks)
    return found or {}


class Stopwatch:
    """The time that a model takes, as callbacks of `inference_on_dataset` measure it."""

    def __init__(self, remaining: Remaining, measured: dict[str, float]) -> None:
        """Prepare.

        Args:
            remaining: gives the number of images of a batch.
            measured: gets "seconds_per_image" after the last batch: the median of all batches
                after the first five, in this process, without reading images.
        """
        self._remaining = remaining
        self._measured = measured
        self._began = 0.0
        self._seconds: list[float] = []

    @property
    def callbacks(self) -> dict[str, Callable[[], None]]:
        """By the names that `inference_on_dataset` has for them."""
        return {"before_inference": self._start, "after_inference": self._stop, "on_end": self._end}

    def _start(self) -> None:
        self._began = time.perf_counter()

    def _stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds.append((time.perf_counter() - self._began) / self._remaining.batch_size)

    def _end(self) -> None:
        timed = self._seconds[_WARMUP_BATCHES:]
        if timed:
            self._measured["seconds_per_image"] = statistics.median(timed)


class Remaining:
    """The batches of a loader without the images that are done; these are read, and dropped.

    Attributes:
        batch_size: images of the batch that was given last.
    """

    def __init__(self, loader: Loader, done: frozenset[ImageKey]) -> None:
        """Wrap a loader.

        Args:
            loader: of records with "image_id", as lists.
            done: ids of images.
        """
        self.batch_size = 0
        self._loader = loader
        self._done = done

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in SIGNALS.interrupting(self._loader):
            left = [record for record in batch if record.get("image_id") not in self._done]
            if left:
                self.batch_size = len(left)
                yield left


@contextlib.contextmanager
def buffers_of_the_first(model: nn.Module) -> Iterator[None]:
    """Give all processes the buffers of the first one for a while.

    Each has running statistics of its own, as in Detectron2, and a checkpoint has the first one's:
    without this, a figure would be of no model that there is.

    Args:
        model: with the same weights in all processes.
    """
    if comm.get_world_size() == 1:
        yield
        return
    own = [buffer.clone() for buffer in model.buffers()]
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, src=0)
    try:
        yield
    finally:
        for buffer, before in zip(model.buffers(), own):
            buffer.copy_(before)


def renamed(cfg: CfgNode, weights: str) -> CfgNode:
    """Return a config under which results name other weights.

    Args:
        cfg: the config; it is not changed.
        weights: for MODEL.WEIGHTS, which a test does not load.
    """
    changed: CfgNode = cfg.clone()
    changed.defrost()
    changed.MODEL.WEIGHTS = weights
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


def model_digest(cfg: CfgNode, model: nn.Module) -> str:
    """Return a digest of all that a prediction depends on but the image: weights and settings.

    Called in all processes together.

    Args:
        cfg: the config.
        model: with its weights.

    Returns:
        32 bytes in hexadecimal.

    Raises:
        EvaluationError: the processes have different weights.
    """
    digests = comm.all_gather(state_digest(unwrap(model)))
    if len(set(digests)) > 1:
        raise EvaluationError(
            "the processes have different weights, so no figure would be of one model: load the "
            "same file in all of them."
        )
    settings = renamed(cfg, "")  # the digest holds the weights themselves
    said = {
        "weights": digests[0],
        "model": settings.MODEL.dump(),
        "input": settings.INPUT.dump(),
        "augmentation": settings.TEST.AUG.dump(),
        "detections": settings.TEST.DETECTIONS_PER_IMAGE,
        "precision": settings.get("FLOAT32_PRECISION", ""),  # of newer Detectron2s
        "proposals": [
            settings.MODEL.LOAD_PROPOSALS,
            settings.DATASETS.PROPOSAL_FILES_TEST,
            settings.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST,
        ],
        "versions": versions(),
        "commit": commit(),
    }
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return str(comm.all_gather(found)[0])  # git may have been too busy in another


def _identity(digest: str, evaluator: DetectionEvaluator) -> str:
    """Return a digest of a model and of the files that it is evaluated on, as the first has them.

    Of images it is names, sizes and times: they may be gigabytes.
    """
    if not comm.is_main_process():
        return str(comm.all_gather("")[0])
    said = hashlib.sha256(digest.encode())
    said.update(file_digest(evaluator.annotations).encode())
    said.update(evaluator.images.encode())
    for record in DatasetCatalog.get(evaluator.dataset):
        file = record.get("file_name", "")
        try:
            status = Path(file).stat()
            said.update(f"{file} {status.st_size} {status.st_mtime_ns};".encode())
        except OSError:  # of no file of this machine's; reading it will tell
            said.update(f"{file};".encode(errors="surrogateescape"))
    return str(comm.all_gather(said.hexdigest())[0])
