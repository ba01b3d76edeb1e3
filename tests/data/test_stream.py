from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from PIL import Image

from resnext_det import load_config
from resnext_det.data.stream import (
    Draw,
    MicroBatches,
    SeededDataset,
    Share,
    build_stream,
    seed_all,
    seeded,
    seeds,
    training_records,
)
from resnext_det.errors import ConfigError, DatasetError

SIZE = 23
IS_LANDSCAPE = [index % 3 != 0 for index in range(SIZE)]


def order() -> Iterator[int]:
    return TrainingSampler(SIZE, seed=5)._infinite_indices()


def updates(processes: int, total: int, count: int, **more: Any) -> list[list[list[Draw]]]:
    """The micro-batches of all processes, by update; in the order of their streams."""
    shares = [Share(process, processes, total, 2) for process in range(processes)]
    each = [iter(MicroBatches(order, share, **more)) for share in shares]
    return [
        [next(batches) for share, batches in zip(shares, each) for _ in share.streams]
        for _ in range(count)
    ]


@pytest.mark.parametrize("is_landscape", [None, IS_LANDSCAPE], ids=["mixed", "grouped"])
def test_processes_and_accumulation_see_the_same_images(is_landscape: list[bool] | None) -> None:
    expected = updates(8, 8, 12, is_landscape=is_landscape)
    for processes in range(1, 8):
        assert updates(processes, 8, 12, is_landscape=is_landscape) == expected


@pytest.mark.parametrize("is_landscape", [None, IS_LANDSCAPE], ids=["mixed", "grouped"])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_a_stream_continues_where_it_stopped(start: int, is_landscape: list[bool] | None) -> None:
    whole = updates(2, 6, 12, is_landscape=is_landscape)
    assert updates(4, 6, 12 - start, is_landscape=is_landscape, start=start) == whole[start:]


def test_every_image_comes_once_per_epoch_with_others_of_its_orientation() -> None:
    batches = [batch for update in updates(2, 4, 23) for batch in update]
    ordered = sorted((draw for batch in batches for draw in batch), key=lambda draw: draw.position)
    assert [draw.position for draw in ordered] == list(range(len(ordered)))
    assert sorted(draw.index for draw in ordered[:SIZE]) == list(range(SIZE))
    for update in updates(2, 4, 20, is_landscape=IS_LANDSCAPE):
        for batch in update:
            assert len({IS_LANDSCAPE[draw.index] for draw in batch}) == 1


def test_processes_share_micro_batches_evenly_or_not() -> None:
    for total in range(1, 20):
        for processes in range(1, total + 1):
            shares = [Share(process, processes, total, 2).streams for process in range(processes)]
            assert [stream for share in shares for stream in share] == list(range(total))
            assert {len(share) for share in shares} <= {total // processes, -(-total // processes)}
    assert [len(Share(process, 3, 8, 2).streams) for process in range(3)] == [3, 3, 2]


def test_the_order_is_detectron2s() -> None:
    """As two processes of stock Detectron2 take them, image by image."""
    for process in range(2):
        sampler = TrainingSampler(SIZE, seed=5)
        sampler._rank, sampler._world_size = process, 2
        stock = list(itertools.islice(iter(sampler), 20))
        ours = itertools.islice(MicroBatches(order, Share(process, 2, 2, 2)), 10)
        assert [draw.index for batch in ours for draw in batch] == stock


def test_seeded_restores_the_random_state() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    found = [draw()]
    with seeded(3, 4):
        inside = draw()
    found.append(draw())
    assert found == expected
    with seeded(3, 4):
        assert draw() == inside
    seed_all(3, 4)
    assert draw() == inside
    with seeded(3, 5):
        assert all(one != two for one, two in zip(draw(), inside))
    assert len({seeds(*words) for words in itertools.product(range(4), repeat=3)}) == 4**3


def unreadable(record: dict[str, Any]) -> dict[str, Any]:
    if record["id"] % 2:
        raise DatasetError(f"the image {record['id']} cannot be read")
    return record


def test_stops_at_or_skips_unreadable_images() -> None:
    records = [{"id": number} for number in range(6)]
    with pytest.raises(DatasetError, match="the image 3 cannot be read"):
        SeededDataset(records, unreadable, 0)[Draw(0, 3)]
    found = SeededDataset(records, unreadable, 0, skip=True)[Draw(0, 3)]
    assert found["id"] % 2 == 0 and "the image 3 cannot be read" in found["skipped"][0]
    assert found == SeededDataset(records, unreadable, 0, skip=True)[Draw(0, 3)]
    skipping = SeededDataset(records, unreadable, 0, skip=True)
    draws = [Draw(position, 3) for position in range(20)]
    assert {skipping[draw]["id"] for draw in draws} == {0, 2, 4}
    assert skipping.__getitems__(draws) == [skipping[draw] for draw in draws]
    assert SeededDataset(records, unreadable, 0, skip=True)[Draw(0, 2)] == {"id": 2}
    with pytest.raises(DatasetError, match="in a row cannot be used, such as: the image"):
        SeededDataset([{"id": 1}], unreadable, 0, skip=True)[Draw(0, 0)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A data set of six images of noise, in Detectron2's format."""
    folder = tmp_path_factory.mktemp("images")
    name = "stream_test"
    records = [record(folder, number) for number in range(6)]
    DatasetCatalog.register(name, lambda: records)
    yield name
    DatasetCatalog.remove(name)


def record(folder: Path, number: int) -> dict[str, Any]:
    width, height = (48, 32) if number % 2 else (32, 48)
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file = folder / f"{number}.png"
    Image.fromarray(pixels).save(file)
    box = {"bbox": [4, 4, 20, 20], "bbox_mode": 0, "category_id": 0, "iscrowd": 0}
    size = {"width": width, "height": height}
    return {"file_name": str(file), "image_id": number, **size, "annotations": [box]}


def config(name: str, *more: Any) -> CfgNode:
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy").clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = (name,)
    cfg.INPUT.MIN_SIZE_TRAIN = (24, 32, 40)
    cfg.merge_from_list(list(more))
    return cfg


def test_workers_and_resumes_change_no_pixel(photographs: str) -> None:
    def pixels(workers: int, start: int, count: int) -> list[tuple[str, torch.Tensor]]:
        cfg = config(photographs, "DATALOADER.NUM_WORKERS", workers)
        stream = build_stream(cfg, DatasetMapper(cfg, True), Share(0, 1, 2, 2), 9, start)
        batches = itertools.islice(stream, 2 * count)
        return [(each["file_name"], each["image"]) for batch in batches for each in batch]

    whole = pixels(0, 0, 5)
    assert len({tuple(image.shape) for _, image in whole}) > 2  # sizes are drawn
    for found, expected in ((pixels(2, 0, 5), whole), (pixels(2, 3, 2), whole[12:])):
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert all(torch.equal(one, two) for (_, one), (_, two) in zip(found, expected))


def test_refuses_wrong_settings(photographs: str) -> None:
    share = Share(0, 1, 1, 2)
    for key, value, said in (
        ("DATALOADER.BAD_IMAGES", "ignore", "must be stop or skip"),
        ("DATALOADER.SAMPLER_TRAIN", "Mine", "must be TrainingSampler or Repeat"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_stream(config(photographs, key, value), lambda record: record, share, 1)
    cfg = config(photographs, "MODEL.META_ARCHITECTURE", "PanopticFPN")
    with pytest.raises(DatasetError, match=r"6 of 6 images of .* have no sem_seg_file_name"):
        training_records(cfg)


def test_records_are_those_of_detectron2s_loader(photographs: str) -> None:
    cfg = config(photographs)
    stock = next(iter(build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, False))))
    ours = next(iter(build_stream(cfg, DatasetMapper(cfg, False), Share(0, 1, 1, 2), 1)))
    assert {type(each) for each in ours} == {dict} and ours[0].keys() == stock[0].keys()


def test_repeats_rare_classes_by_seed(photographs: str) -> None:
    words = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    cfg = config(photographs, *words, "DATALOADER.REPEAT_THRESHOLD", 0.1)

    def images(seed: int) -> list[str]:
        stream = build_stream(cfg, lambda record: record, Share(0, 1, 1, 1), seed)
        return [batch[0]["file_name"] for batch in itertools.islice(stream, 30)]

    assert images(1) == images(1) != images(2)
