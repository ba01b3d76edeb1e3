"""Deterministic training data: the seed and the iteration determine images and augmentation.

Detectron2's loader restarts its order when a training resumes, and does not save the seeds of its
workers. Here a resumed training, or one with another number of workers, sees the same pixels, and
one process that accumulates gradients sees the same images as several processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import multiprocessing.util
import os
import random
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from torch.utils.data import DataLoader, Dataset, Sampler

from resnext_det.config import complete
from resnext_det.data.annotations import serve
from resnext_det.data.proposals import records_of_test, records_with_proposals
from resnext_det.data.records import Record
from resnext_det.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)

Mapper = Callable[[Record], Record | None]
Loader = TypeVar("Loader", bound=DataLoader[Any])

_TRIES = 100  # to replace an image that cannot be used
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


@dataclass(frozen=True)
class Share:
    """The part of each update that one process computes.

    Attributes:
        process: rank of this process.
        processes: world size.
        total: micro-batches per update, over all processes.
        images: images per micro-batch.
    """

    process: int
    processes: int
    total: int
    images: int

    @property
    def streams(self) -> range:
        """The indices of this process's micro-batches: of 8 for 3 processes, 3, 3 and 2."""
        return self.of(self.process)

    def of(self, process: int) -> range:
        """The indices of any process's micro-batches."""
        first, end = (-(-rank * self.total // self.processes) for rank in (process, process + 1))
        return range(first, end)


@dataclass(frozen=True)
class Draw:
    """One image of the stream: its position, shared by all processes, and its index in the data."""

    position: int
    index: int


def seeds(*words: int) -> int:
    """Hash integers into a 64-bit seed."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Seed Python, NumPy and PyTorch on the CPU; restore their states on exit."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed(*words)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def seed_all(*words: int) -> None:
    """Seed Python, NumPy and PyTorch, including all GPUs."""
    torch.manual_seed(_seed(*words))


def _seed(*words: int) -> int:
    seed = seeds(*words)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed also seeds GPUs, and formats a stack trace for those not yet in use.
    torch.default_generator.manual_seed(seed)
    return seed


class MicroBatches(Sampler[list[Draw]]):
    """An infinite batch sampler for the micro-batches of one process.

    All processes share one order of images, as in Detectron2: draw p belongs to stream p modulo the
    number of streams. With `is_landscape`, one flag per image, a batch holds images of the same
    orientation. Sampling starts at update `start`.
    """

    def __init__(
        self,
        order: Callable[[], Iterator[int]],
        share: Share,
        start: int = 0,
        is_landscape: Sequence[bool] | None = None,
    ) -> None:
        self._order = order
        self._share = share
        self._start = start
        self._is_landscape = is_landscape

    def __iter__(self) -> Iterator[list[Draw]]:
        for number, batch in enumerate(self._batches()):
            if number >= self._start * len(self._share.streams):
                yield batch

    def _batches(self) -> Iterator[list[Draw]]:
        share = self._share
        waiting: dict[tuple[int, bool], list[Draw]] = {}
        ready: dict[int, deque[list[Draw]]] = {stream: deque() for stream in share.streams}
        draws = (Draw(position, index) for position, index in enumerate(self._order()))
        while True:
            for queue in ready.values():
                while not queue:
                    draw = next(draws)
                    stream = draw.position % share.total
                    if stream not in ready:
                        continue
                    key = stream, self._is_landscape is not None and self._is_landscape[draw.index]
                    batch = waiting.setdefault(key, [])
                    batch.append(draw)
                    if len(batch) == share.images:
                        ready[stream].append(waiting.pop(key))
                yield queue.popleft()


class SeededDataset(Dataset[Record]):
    """Mapped training images, augmented as a function of seed and position.

    With `skip`, a random image replaces one that cannot be read.
    """

    def __init__(
        self, records: Sequence[Record], mapper: Mapper, seed: int, *, skip: bool = False
    ) -> None:
        # Serialized to bytes, so that workers share the memory.
        self._records = DatasetFromList(list(records), copy=True)
        self._mapper = mapper
        self._seed = seed
        self._skip = skip

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, draw: Draw) -> Record:
        """Return the mapper's output; "skipped" lists the errors of images that it replaces.

        Raises:
            DatasetError: the image cannot be read and `skip` is false.
        """
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[Draw]) -> list[Record]:
        """Return a batch; torch's loaders call this."""
        with seeded(self._seed):
            return [self._mapped(draw) for draw in draws]

    def _mapped(self, draw: Draw) -> Record:
        _seed(self._seed, 0, draw.position)
        errors: list[str] = []
        index = draw.index
        for _ in range(_TRIES):
            try:
                mapped = self._mapper(self._records[index])
            except DatasetError as error:
                if not self._skip:
                    raise
                errors.append(str(error))
                mapped = None
            if mapped is not None:
                return {**mapped, "skipped": errors} if errors else mapped
            index = random.randrange(len(self))
        raise DatasetError(
            f"{_TRIES} images in a row cannot be used{f', such as: {errors[0]}' if errors else ''}."
        )


def build_stream(
    cfg: CfgNode,
    mapper: Mapper,
    share: Share,
    seed: int,
    start: int = 0,
    records: list[Record] | None = None,
) -> DataLoader[Record]:
    """Return an infinite loader of one process's micro-batches.

    Args:
        cfg: DATALOADER is read and, without records, DATASETS.TRAIN.
        mapper: of the records.
        share: what this process computes.
        seed: the same on all processes.
        start: the number of updates already done.
        records: by default those of DATASETS.TRAIN. Their parsed annotations stay in memory: call
            `forget` before workers start and inherit them.

    Raises:
        ConfigError: a setting of DATALOADER is unknown.
        DatasetError: see `training_records`.
    """
    loader = complete(cfg).DATALOADER
    if loader.BAD_IMAGES not in ("stop", "skip"):
        raise ConfigError(
            f"DATALOADER.BAD_IMAGES is {loader.BAD_IMAGES!r}: it must be stop or skip."
        )
    records = training_records(cfg) if records is None else records
    dataset = SeededDataset(records, mapper, seed, skip=loader.BAD_IMAGES == "skip")
    is_landscape = None
    if loader.ASPECT_RATIO_GROUPING:
        is_landscape = [record["width"] > record["height"] for record in records]
    order = _order(cfg, records, seed)
    return with_lasting_workers(
        DataLoader(
            dataset,
            batch_sampler=MicroBatches(order, share, start, is_landscape),
            num_workers=loader.NUM_WORKERS,
            collate_fn=_uncollated,
            generator=torch.Generator(),  # leaves the global generator untouched
            pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
        )
    )


def training_records(cfg: CfgNode) -> list[Record]:
    """Return the records of DATASETS.TRAIN, filtered as in Detectron2's own loader.

    Raises:
        ConfigError: INPUT.MASK_FORMAT does not support the masks.
        DatasetError: no object has a mask, or an image has no semantic labels, if the model learns
            these.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    serve(cfg.DATASETS.TRAIN)
    settings = {
        "filter_empty": cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        "min_keypoints": keypoints,
    }
    records: list[Record]
    if cfg.MODEL.LOAD_PROPOSALS:
        files = cfg.DATASETS.PROPOSAL_FILES_TRAIN
        records = records_with_proposals(cfg.DATASETS.TRAIN, files, **settings)
    else:
        records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, **settings)
    model = cfg.MODEL.META_ARCHITECTURE
    unlabelled = sum("sem_seg_file_name" not in record for record in records)
    if model in ("PanopticFPN", "SemanticSegmentor") and unlabelled:
        raise DatasetError(
            f"{model} also learns semantic segmentation, but {unlabelled} of {len(records)} images "
            f"of {', '.join(cfg.DATASETS.TRAIN)} have no sem_seg_file_name. Register the data set "
            "with Detectron2's register_coco_panoptic_separated, or train another "
            "MODEL.META_ARCHITECTURE."
        )
    return _with_masks(cfg, records) if cfg.MODEL.MASK_ON else records


def _with_masks(cfg: CfgNode, records: list[Record]) -> list[Record]:
    """Drop objects without a mask, for which Detectron2's mapper raises KeyError."""
    masked, total, packed = [], 0, 0
    for record in records:
        given = record.get("annotations", [])
        kept = [each for each in given if "segmentation" in each]
        total += len(given)
        packed += sum(
            isinstance(each["segmentation"], dict) and not each.get("iscrowd") for each in kept
        )
        if kept or not given:
            masked.append({**record, "annotations": kept})
    dropped = total - sum(len(record["annotations"]) for record in masked)
    if packed and cfg.INPUT.MASK_FORMAT != "bitmask":
        raise ConfigError(
            f"INPUT.MASK_FORMAT is {cfg.INPUT.MASK_FORMAT}, but the masks of {packed} objects are "
            "RLE: set INPUT.MASK_FORMAT bitmask."
        )
    if total and dropped == total:
        raise DatasetError(
            f"MODEL.MASK_ON is True, but none of the {total} objects of {cfg.DATASETS.TRAIN} has a "
            "mask: set it False, or add segmentations to the annotations."
        )
    if dropped:
        logger.warning("%d of %d objects have no mask and are left out", dropped, total)
    return masked


def build_test_stream(cfg: CfgNode, name: str, mapper: Mapper) -> DataLoader[Record]:
    """Return Detectron2's loader of a data set of DATASETS.TEST.

    Raises:
        DatasetError: its proposals cannot be read, or are of other images.
    """
    serve([name])
    if cfg.MODEL.LOAD_PROPOSALS:
        records, workers = records_of_test(cfg, name), cfg.DATALOADER.NUM_WORKERS
        loader = build_detection_test_loader(records, mapper=mapper, num_workers=workers)
    else:
        loader = build_detection_test_loader(cfg, name, mapper=mapper)
    loader.pin_memory = cfg.MODEL.DEVICE.startswith("cuda")
    return with_lasting_workers(loader)


def _order(cfg: CfgNode, records: list[Record], seed: int) -> Callable[[], Iterator[int]]:
    """Return the image order of Detectron2's sampler, before it is split among processes."""
    loader, name = cfg.DATALOADER, cfg.DATALOADER.SAMPLER_TRAIN
    seed %= 2**32
    if name == "TrainingSampler":
        return TrainingSampler(len(records), seed=seed)._infinite_indices
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, loader.REPEAT_THRESHOLD, sqrt=loader.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)._infinite_indices
    raise ConfigError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}: it must be TrainingSampler or "
        "RepeatFactorTrainingSampler."
    )


def _uncollated(batch: list[Record]) -> list[Record]:
    return batch


def end_with_parent(number: int) -> None:
    """Let the kernel send this process a signal when its parent dies (Linux only).

    Otherwise the children of a killed process keep its sockets open, and the other processes of the
    job don't notice its death.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, number)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), number)


def obey_parent_alone(worker: int) -> None:
    """Ignore signals to the process group; a `worker_init_fn`.

    The parent may need the worker's images to finish an iteration, and shuts it down itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def with_lasting_workers(loader: Loader) -> Loader:
    """Let a loader's workers survive signals to the process group, and die with this process."""
    loader.worker_init_fn = obey_parent_alone
    # At exit Python sends SIGTERM to daemons and waits for them. These workers ignore it, so an
    # unclosed loader would hang the process.
    multiprocessing.util.Finalize(None, _kill_daemons, exitpriority=0)
    return loader


def _kill_daemons() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
