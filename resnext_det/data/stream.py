"""The training data as a function of place: seed and iteration tell images and augmentation.

Detectron2's loader begins its order anew when a training is resumed, and its workers draw their
augmentations from seeds that nobody keeps. Here every image of every update is known beforehand: a
resumed training, or one with another number of workers, goes on with the very same pixels, and one
process that accumulates gradients sees what several processes would have seen.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from torch.utils.data import DataLoader, Dataset, Sampler

from resnext_det.config import complete
from resnext_det.data.annotations import forget, serve
from resnext_det.data.workers import with_lasting_workers
from resnext_det.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Mapper = Callable[[Record], Record | None]
_TRIES = 100
_LEARN_STUFF = ("PanopticFPN", "SemanticSegmentor")


@dataclass(frozen=True)
class Share:
    """Which part of every update a process computes.

    Attributes:
        process: of this one, from 0.
        processes: of all.
        micro_batches: that each process computes, one after the other.
        images: of a micro-batch.
    """

    process: int
    processes: int
    micro_batches: int
    images: int

    @property
    def streams(self) -> range:
        """The micro-batches of this process, among those of all, in order."""
        first = self.process * self.micro_batches
        return range(first, first + self.micro_batches)


@dataclass(frozen=True)
class Draw:
    """One image of the stream.

    Attributes:
        position: of the draw in the stream of all processes, from 0.
        index: of the image in the data set.
    """

    position: int
    index: int


def seeds(*words: int) -> int:
    """Return a seed of 64 bits that depends on all words, and on each of them alone."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Make Python's, NumPy's and PyTorch's random numbers a function of some words, for a while."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_all(*words)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def seed_all(*words: int) -> None:
    """Seed Python's, NumPy's and PyTorch's random numbers, those of all GPUs included."""
    seed = seeds(*words)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class MicroBatches(Sampler[list[Draw]]):
    """The micro-batches of one process, without an end.

    The images of all processes come from one order, as in Detectron2: draw number p belongs to
    stream p modulo the number of streams. Each stream puts images of like orientation together.

    Args:
        order: gives the endless order of images anew with each call.
        share: of this process.
        start: updates that are left out, since they were done before.
        lying: for each image, whether it is wider than high; None groups nothing.
    """

    def __init__(
        self,
        order: Callable[[], Iterator[int]],
        share: Share,
        start: int = 0,
        lying: Sequence[bool] | None = None,
    ) -> None:
        self._order = order
        self._share = share
        self._start = start
        self._lying = lying

    def __iter__(self) -> Iterator[list[Draw]]:
        """Give the micro-batches of an update one after the other, then those of the next."""
        for number, batch in enumerate(self._batches()):
            if number >= self._start * self._share.micro_batches:
                yield batch

    def _batches(self) -> Iterator[list[Draw]]:
        share = self._share
        first = share.streams.start
        total = share.processes * share.micro_batches
        waiting: dict[tuple[int, bool], list[Draw]] = {}
        ready: list[deque[list[Draw]]] = [deque() for _ in share.streams]
        draws = (Draw(position, index) for position, index in enumerate(self._order()))
        while True:
            for queue in ready:
                while not queue:
                    draw = next(draws)
                    stream = draw.position % total - first
                    if not 0 <= stream < share.micro_batches:
                        continue
                    key = stream, self._lying is not None and self._lying[draw.index]
                    batch = waiting.setdefault(key, [])
                    batch.append(draw)
                    if len(batch) == share.images:
                        ready[stream].append(waiting.pop(key))
                yield queue.popleft()


class SeededDataset(Dataset[Record]):
    """Images as the model takes them, their augmentation a function of seed and position.

    Args:
        records: of the data set, in Detectron2's format.
        mapper: such as Detectron2's `DatasetMapper`.
        seed: of the training.
        skip: take another image where one cannot be read.
    """

    def __init__(
        self, records: Sequence[Record], mapper: Mapper, seed: int, *, skip: bool = False
    ) -> None:
        # Detectron2 keeps them as bytes, so that the workers share the memory.
        self._records = DatasetFromList(list(records), copy=True)
        self._mapper = mapper
        self._seed = seed
        self._skip = skip

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, draw: Draw) -> Record:
        """Read and augment an image.

        Returns:
            What the mapper gave; under "skipped" the errors of images this one stands for.

        Raises:
            DatasetError: the image cannot be read, and is not to be skipped.
        """
        errors: list[str] = []
        with seeded(self._seed, 0, draw.position):
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
            f"{_TRIES} images in a row are of no use{f', such as: {errors[0]}' if errors else ''}."
        )


def build_stream(
    cfg: CfgNode, mapper: Mapper, share: Share, seed: int, start: int = 0
) -> DataLoader[Record]:
    """Return the training data of a process: an endless loader of micro-batches.

    Args:
        cfg: DATASETS.TRAIN and DATALOADER are read.
        mapper: makes what the model takes out of a record.
        share: of this process.
        seed: of the training, the same for all processes.
        start: updates that were done before.

    Raises:
        ConfigError: a sampler that is not known here, or a wrong setting.
    """
    loader = complete(cfg).DATALOADER
    if loader.BAD_IMAGES not in ("stop", "skip"):
        raise ConfigError(
            f"DATALOADER.BAD_IMAGES is {loader.BAD_IMAGES!r}; it must be stop or skip."
        )
    records = training_records(cfg)
    forget()  # before there are workers, whose memory would be as large
    dataset = SeededDataset(records, mapper, seed, skip=loader.BAD_IMAGES == "skip")
    lying = None
    if loader.ASPECT_RATIO_GROUPING:
        lying = [record["width"] > record["height"] for record in records]
    order = _order(cfg, records, seed)
    return with_lasting_workers(
        DataLoader(
            dataset,
            batch_sampler=MicroBatches(order, share, start, lying),
            num_workers=loader.NUM_WORKERS,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else each loader would take a number from everybody's
        )
    )


def training_records(cfg: CfgNode) -> list[Record]:
    """Return the records of DATASETS.TRAIN, as Detectron2's own loader filters them.

    Raises:
        DatasetError: they lack what MODEL.META_ARCHITECTURE learns.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    serve(cfg.DATASETS.TRAIN)
    records: list[Record] = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints,
        proposal_files=proposals,
    )
    model = cfg.MODEL.META_ARCHITECTURE
    without = sum("sem_seg_file_name" not in record for record in records)
    if model in _LEARN_STUFF and without:
        raise DatasetError(
            f"{model} learns semantic segmentation, too, and {without} of {len(records)} images of "
            f"{', '.join(cfg.DATASETS.TRAIN)} have none (sem_seg_file_name): register the data set "
            "with Detectron2's register_coco_panoptic_separated, or train another "
            "MODEL.META_ARCHITECTURE, such as GeneralizedRCNN."
        )
    return _with_masks(cfg, records) if cfg.MODEL.MASK_ON else records


def _with_masks(cfg: CfgNode, records: list[Record]) -> list[Record]:
    """Leave out objects without a mask, at which Detectron2's mapper ends with a KeyError."""
    masked, before, packed = [], 0, 0
    for record in records:
        given = record.get("annotations", [])
        kept = [each for each in given if "segmentation" in each]
        before += len(given)
        packed += sum(
            isinstance(each["segmentation"], dict) and not each.get("iscrowd") for each in kept
        )
        if kept or not given:
            masked.append({**record, "annotations": kept})
    left_out = before - sum(len(record["annotations"]) for record in masked)
    if packed and cfg.INPUT.MASK_FORMAT != "bitmask":
        raise ConfigError(
            f"INPUT.MASK_FORMAT is {cfg.INPUT.MASK_FORMAT}, and the masks of {packed} objects are "
            "RLE. Set INPUT.MASK_FORMAT bitmask."
        )
    if before and left_out == before:
        raise DatasetError(
            f"MODEL.MASK_ON is True, and none of {before} objects of {cfg.DATASETS.TRAIN} has a "
            "mask. Set it False, or give annotations with segmentations."
        )
    if left_out:
        logger.warning("%d of %d objects have no mask and are left out", left_out, before)
    return masked


def _order(cfg: CfgNode, records: list[Record], seed: int) -> Callable[[], Iterator[int]]:
    """Return the order of Detectron2's own samplers, that of all processes together."""
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
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; it must be TrainingSampler or "
        "RepeatFactorTrainingSampler."
    )


def _as_it_is(batch: list[Record]) -> list[Record]:
    return batch
