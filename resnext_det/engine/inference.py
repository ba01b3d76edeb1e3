"""Evaluate a model on its data sets: every image once, and nothing lost by a kill."""

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
from detectron2.data import DatasetCatalog, MapDataset
from detectron2.data.samplers import InferenceSampler
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.testing import print_csv_format
from detectron2.utils import comm
from torch import nn

from resnext_det.config import complete
from resnext_det.config_rules import STOCK
from resnext_det.console import progress_bar
from resnext_det.engine.hooks import SIGNALS
from resnext_det.engine.train_loop import unwrap
from resnext_det.environment import commit, versions
from resnext_det.errors import EvaluationError
from resnext_det.evaluation.annotations import ImageKey
from resnext_det.evaluation.evaluator import DetectionEvaluator
from resnext_det.files import file_digest
from resnext_det.modeling.fast import DTYPES, FastConv2d

logger = logging.getLogger(__name__)

_WARMUP_BATCHES = 5  # as in `inference_on_dataset`

Loader = Any
Results = dict[str, Any]


def evaluate_datasets(
    cfg: CfgNode,
    model: nn.Module,
    evaluator_of: Callable[[str], DatasetEvaluator],
    loader_of: Callable[[str], Loader],
) -> Results:
    """Evaluate a model on every data set of DATASETS.TEST.

    A collective call; each process takes its share of the images.

    Args:
        cfg: the config.
        model: with its weights.
        evaluator_of: returns the evaluator of a data set by its name.
        loader_of: likewise, this process's images.

    Returns:
        {"bbox": {"AP": ...}}, by data set if there are several; empty except on the main process.

    Raises:
        EvaluationError: the processes have different weights.
    """
    results: OrderedDict[str, Results] = OrderedDict()
    kept: list[DetectionEvaluator] = []
    with buffers_of_first_process(model):
        digest, state = model_digest(cfg, model), state_digest(unwrap(model))
        for name in cfg.DATASETS.TEST:
            evaluator = evaluator_of(name)
            done: frozenset[ImageKey] = frozenset()
            if isinstance(evaluator, DetectionEvaluator):
                logger.info(
                    "evaluating on %s: annotations %s, images %s",
                    name,
                    evaluator.annotations.resolve(),
                    evaluator.images,
                )
                evaluator.description["model_sha256"] = digest
                evaluator.description["state_blake2b"] = state
                evaluator.description["precision"] = precision_of(model)
                done = evaluator.keep(_identity(digest, evaluator))
                kept.append(evaluator)
            results[name] = _evaluate(model, evaluator, loader_of, name, done)
            if comm.is_main_process():
                print_csv_format(results[name])
    for evaluator in kept:  # not before: a kill during the last data set must not cost the others
        evaluator.forget()
    return next(iter(results.values())) if len(results) == 1 else results


def _evaluate(
    model: nn.Module,
    evaluator: DatasetEvaluator,
    loader_of: Callable[[str], Loader],
    name: str,
    done: frozenset[ImageKey],
) -> Results:
    if done:
        logger.info("resuming an evaluation that has predicted %d images", len(done))
    if isinstance(evaluator, DetectionEvaluator):
        if done and evaluator.is_complete(done):
            evaluator.reset()
            return evaluator.evaluate()
        if parameters := sum(each.numel() for each in model.parameters()):
            evaluator.measured["parameters"] = parameters
    loader = loader_of(name)
    if done:
        share_rest(loader, done)
    sizes: list[int] = []
    times: list[float] = []  # before and after each batch

    def mark() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    def measure() -> None:
        spans = zip(times[::2], times[1::2], sizes)
        seconds = [(after - before) / size for before, after, size in spans]
        if isinstance(evaluator, DetectionEvaluator) and (timed := seconds[_WARMUP_BATCHES:]):
            evaluator.measured["seconds_per_image"] = statistics.median(timed)

    batches = progress_bar(
        _remaining(loader, done, sizes),
        total=len(loader),
        desc=name,
        unit="iteration",
        disable=not comm.is_main_process(),
    )
    callbacks = {"before_inference": mark, "after_inference": mark, "on_end": measure}
    found: Results | None = inference_on_dataset(model, batches, evaluator, callbacks)
    return found or {}


def share_rest(loader: Loader, done: frozenset[ImageKey]) -> None:
    """Let the processes share evenly what is left, and not read the other images.

    Otherwise one would wait for another that has all the images of a machine that died.
    """
    if isinstance(getattr(loader, "dataset", None), MapDataset):  # Detectron2's
        records = loader.dataset._dataset
        left = [n for n in range(len(records)) if records[n].get("image_id") not in done]
        if left:
            loader.batch_sampler.sampler = [left[n] for n in InferenceSampler(len(left))]


def _remaining(
    loader: Loader, done: frozenset[ImageKey], sizes: list[int]
) -> Iterator[list[dict[str, Any]]]:
    """Yield the batches of a loader without the images that are done; append to `sizes`."""
    for batch in SIGNALS.interrupting(loader):
        if left := [record for record in batch if record.get("image_id") not in done]:
            sizes.append(len(left))
            yield left


@contextlib.contextmanager
def buffers_of_first_process(model: nn.Module) -> Iterator[None]:
    """Temporarily give all processes the buffers of the first one.

    As in Detectron2, each process has its own running statistics and a checkpoint holds those of
    the first, so a figure computed with others would describe no model that can be loaded.
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
    """Return a copy of a config with another MODEL.WEIGHTS, to name them in results."""
    changed: CfgNode = cfg.clone()
    changed.defrost()
    changed.MODEL.WEIGHTS = weights
    changed.freeze()
    return changed


def precision_of(model: nn.Module) -> str:
    """Return the precision of a model's layers: "fp32", "bf16", ..., or "stock" unaccelerated.

    A model that knows its own, such as an exported one, has it as `precision`.
    """
    known = getattr(model, "precision", None)
    if isinstance(known, str):
        return known
    words = {dtype: word for word, dtype in DTYPES.items()}
    layers = (each for each in model.modules() if isinstance(each, FastConv2d))
    return next((words[layer.compute_dtype] for layer in layers), STOCK)


def state_digest(model: nn.Module) -> str:
    """Return a digest of the names and values of all parameters and buffers, on any device."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_digest(cfg: CfgNode, model: nn.Module) -> str:
    """Return a digest of everything a prediction depends on except the image.

    That is weights, settings and software. A collective call.

    Raises:
        EvaluationError: the processes have different weights.
    """
    digests = comm.all_gather(state_digest(unwrap(model)))
    if len(set(digests)) > 1:
        raise EvaluationError(
            "the processes have different weights, so the figures would belong to no single model: "
            "load the same file in all of them."
        )
    settings = renamed(cfg, "")  # the weights themselves count, not their name
    proposals: list[Any] = [settings.MODEL.LOAD_PROPOSALS]
    if settings.MODEL.LOAD_PROPOSALS:
        files = settings.DATASETS.PROPOSAL_FILES_TEST
        proposals += [settings.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST, *files]
        proposals += [Path(file).stat().st_mtime_ns for file in files if Path(file).is_file()]
    content = {
        "weights": digests[0],
        "model": settings.MODEL,
        "input": settings.INPUT,
        "decoder": complete(settings).DATALOADER.DECODER,
        "augmentation": settings.TEST.AUG,
        "detections": settings.TEST.DETECTIONS_PER_IMAGE,
        "precision": [
            precision_of(model),
            settings.get("FLOAT32_PRECISION", ""),  # in newer versions of Detectron2
        ],
        "proposals": proposals,
        "versions": versions(),
        "commit": commit(),
    }
    found = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    # Git may time out in one of the processes, whose digest would differ.
    return str(comm.all_gather(found)[0])


def _identity(digest: str, evaluator: DetectionEvaluator) -> str:
    """Return a digest of a model and its evaluation data, as seen by the main process.

    Images count by name, size and time, since they may be gigabytes.
    """
    identity = hashlib.sha256(digest.encode())
    if comm.is_main_process():
        identity.update(file_digest(evaluator.annotations).encode())
        identity.update(evaluator.images.encode())
        for record in DatasetCatalog.get(evaluator.dataset):
            file = record.get("file_name", "")
            identity.update(f"{file};".encode(errors="surrogateescape"))
            with contextlib.suppress(OSError):  # a missing file: loading it reports that
                status = Path(file).stat()
                identity.update(f"{status.st_size} {status.st_mtime_ns};".encode())
    return str(comm.all_gather(identity.hexdigest())[0])
