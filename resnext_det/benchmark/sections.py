"""The sections of the benchmark: each returns tables of timed rows."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, BoxMode
from torch import Tensor

from resnext_det.benchmark.artifacts import artifacts
from resnext_det.benchmark.classification import classification
from resnext_det.benchmark.contenders import (
    AUTOCAST,
    BF16,
    BF16_CHECKPOINTED,
    FP16,
    FP32,
    FP32_CHECKPOINTED,
    STOCK,
    TORCHVISION,
    Agreement,
    Inputs,
    example,
    fitting,
    openvino_backbone,
    photograph,
    with_settings,
)
from resnext_det.benchmark.evaluation import evaluation
from resnext_det.benchmark.growth import growth
from resnext_det.benchmark.measure import Row, Setup, Table, alternate, apart
from resnext_det.benchmark.roofline import roofline
from resnext_det.console import progress_bar
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.errors import DatasetError, quoted
from resnext_det.images import read_header
from resnext_det.modeling.fast import accelerate


def inference(setup: Setup) -> list[Table]:
    """Measure one image by the whole detector, and by its backbone and pyramid alone."""
    cfg, (height, width) = setup.cfg, setup.sizes.image
    inputs: Inputs = [example(height, width)]
    contenders = fitting((STOCK, TORCHVISION, FP32, BF16, FP16), cfg)
    size = f"One generated image of {height} x {width} pixels."

    measured = apart(
        {each.name: partial(each.alone, "inference", cfg, inputs) for each in contenders},
        setup.rounds,
        "inference",
    )
    found = {name: each.result[0]["instances"] for name, each in measured.items()}
    rows = []
    for each in contenders:
        more: dict[str, Any] = {
            "memory, MiB": measured[each.name].memory,
            "detections": int((found[each.name].scores > 0.05).sum()),
        }
        if each is not TORCHVISION:
            difference = Agreement.of(found[STOCK.name], found[each.name])
            more["matched, %"] = 100 * difference.matched
            if difference.matched:
                more["boxes off by, px"] = difference.pixels
                more["scores off by"] = difference.score
        rows.append(Row("whole detector", each.name, measured[each.name].seconds, more))
    whole = Table(
        "Inference",
        f"{size} Each has a process of its own; ours keeps freed memory for the next pass, as this "
        "package's commands do. Memory is what a pass adds to a process that has built the model. "
        "Detections "
        "score over 0.05; they are matched with stock Detectron2's by class and an IoU of at least "
        "0.5, and the columns after it have the largest differences. torchvision's RoIAlign and "
        "weights are its own, so its detections are not compared. "
        + ("" if cfg.MODEL.WEIGHTS else "Random weights exaggerate what rounding changes."),
        rows,
    )

    runs: dict[str, Callable[[], dict[str, Tensor]]] = {
        each.name: each.backbone(cfg, inputs)
        for each in progress_bar(contenders, desc="building", unit="detector")
    }
    if importlib.util.find_spec("openvino") and cfg.MODEL.DEVICE == "cpu":
        for precision, label in (("f32", "fp32"), ("bf16", "bf16")):
            runs[f"OpenVINO {label}"] = openvino_backbone(cfg, inputs, precision)
    features = {name: run() for name, run in runs.items()}
    seconds = alternate(runs, setup.rounds, "backbone")
    rows = []
    for name, each_round in seconds.items():
        more = {}
        if name != TORCHVISION.name:
            more["features off by"] = _largest_difference(features[STOCK.name], features[name])
        rows.append(Row("backbone and FPN", name, each_round, more))
    alone = Table(
        "Backbone and FPN alone",
        f"{size} The last column is the largest difference of a feature map from stock "
        "Detectron2's, relative to the map's largest value. OpenVINO runs stock Detectron2's "
        "backbone and FPN, converted; it has no RPN, RoIAlign or heads here.",
        rows,
    )
    return [whole, alone]


def _largest_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    return max(
        float((found[name].float() - each).abs().max() / each.abs().max())
        for name, each in expected.items()
    )


def training(setup: Setup) -> list[Table]:
    """Measure a step: forward, backward, SGD."""
    cfg, (height, width) = setup.cfg, setup.sizes.training
    inputs: Inputs = [example(height, width, seed) for seed in (0, 1)]
    ours = (FP32, FP32_CHECKPOINTED, BF16, BF16_CHECKPOINTED)
    contenders = fitting((STOCK, AUTOCAST, TORCHVISION, *ours), cfg)
    measured = apart(
        {each.name: partial(each.alone, "training", cfg, inputs) for each in contenders},
        setup.rounds,
        "training",
    )
    rows = [
        Row(
            "a step",
            name,
            each.seconds,
            {
                "memory, MiB": each.memory,
                "memory, share": each.memory / measured[STOCK.name].memory,
                "loss": each.result,
            },
        )
        for name, each in measured.items()
    ]
    note = (
        f"Two generated images of {height} x {width} pixels with eight objects each: forward, "
        "backward and SGD with momentum. Memory is what two steps add to a process that has built "
        "the model: activations, gradients, momentum. The loss is that of the second step, with "
        "the same random samples of anchors and regions; torchvision has its own weights and "
        "samples. Checkpointed: with `MODEL.RESNEXT.CHECKPOINT_STAGES` res3 to res5 and "
        "`MODEL.RPN.HEAD_NAME` CheckpointedRPNHead, which recompute activations instead of keeping "
        "them."
    )
    return [Table("Training", note, rows)]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pooling(setup: Setup) -> list[Table]:
    """Measure RoIAlign alone, on one thread and on all, on the CPU."""
    height, width = setup.sizes.image
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(1, 256, math.ceil(height / s), math.ceil(width / s), generator=generator)
        for s in _STRIDES
    ]
    scales = [1 / stride for stride in _STRIDES]
    stock = ROIPooler((7, 7), scales, sampling_ratio=0, pooler_type="ROIAlignV2")
    ours: Any = accelerate(copy.deepcopy(stock))
    rows = []
    for count, threads in itertools.product(
        setup.sizes.regions, sorted({1, torch.get_num_threads()})
    ):
        boxes = _boxes(count, height, width, generator)
        passes = {
            "torchvision": _Pooling(stock, maps, boxes),
            "ours fp32": _Pooling(ours, [each.to(**_LAST) for each in maps], boxes),
            "ours bf16": _Pooling(ours, [m.to(torch.bfloat16, **_LAST) for m in maps], boxes),
        }
        with _threads(threads):
            for direction in ("forward", "backward"):
                runs: dict[str, Any] = {n: getattr(p, direction) for n, p in passes.items()}
                results = {name: run() for name, run in runs.items()}
                seconds = alternate(runs, setup.rounds, f"RoIAlign {direction}")
                case = f"{count:,} boxes, {direction}, {threads} thread{'s' * (threads > 1)}"
                for name, found in results.items():
                    off = max(map(_difference, results["torchvision"], found))
                    rows.append(Row(case, name, seconds[name], {"off by": off}))
    note = (
        f"Boxes of all sizes on the four levels of an image of {height} x {width} pixels, 256 "
        "channels, 7 x 7 bins, adaptive sampling, on the CPU, by Detectron2's ROIPooler as it is "
        "and accelerated. Ours includes building its index. "
        "The last column is the largest difference from torchvision, for values of deviation 1."
    )
    return [Table("RoIAlign", note, rows)]


_STRIDES = (4, 8, 16, 32)
_LAST: Any = {"memory_format": torch.channels_last}


def _boxes(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return boxes of all sizes, (K, 4)."""
    random = torch.rand(4, count, generator=generator)
    limit = torch.tensor([width, height])
    sides = 16 * (limit[:, None] / 20) ** random[:2]
    corners = random[2:] * (limit[:, None] - sides)
    return torch.cat([corners, corners + sides]).T


class _Pooling:
    """The pooling of boxes from a pyramid, and its backward pass."""

    def __init__(self, pooler: Any, maps: list[Tensor], boxes: Tensor) -> None:
        self._pooler, self._boxes = pooler, [Boxes(boxes)]
        self._maps = [each.detach().requires_grad_() for each in maps]
        self._pooled = pooler(self._maps, self._boxes)
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(self._pooled.shape, generator=generator)
        self._gradient = torch.empty_like(self._pooled).copy_(values)

    def forward(self) -> list[Tensor]:
        """Pool."""
        with torch.no_grad():
            return [self._pooler(self._maps, self._boxes)]

    def backward(self) -> Sequence[Tensor]:
        """Return the gradients of the maps."""
        return torch.autograd.grad(self._pooled, self._maps, self._gradient, retain_graph=True)


def _difference(expected: Tensor, found: Tensor) -> float:
    return float((found.float() - expected).abs().max()) if expected.numel() else 0.0


def loader(setup: Setup) -> list[Table]:
    """Measure the dataset mappers on one core: from a JPEG file to the input of a training."""
    with TemporaryDirectory() as name, _threads(1):
        folder = setup.images or _photographs(Path(name), setup.sizes.photographs)
        files = sorted(folder.glob("*.jpg"))[: setup.sizes.photographs]
        if not files:
            raise DatasetError(f"--images {quoted(folder)} holds no .jpg files.")
        records = [_record(file) for file in files]
        # Each worker of a data loader has one core; OpenCV would take all.
        cv2.setNumThreads(1)
        mappers: dict[str, Any] = {"Detectron2": DatasetMapper(setup.cfg, True)}
        for decoder in ("fast", "pillow"):
            cfg = with_settings(setup.cfg, {"DATALOADER.DECODER": decoder})
            mappers[f"ours, {decoder}"] = NamingDatasetMapper(cfg, True)
        runs = {name: partial(_read, mapper, records) for name, mapper in mappers.items()}
        seconds = alternate(runs, setup.rounds, "loader")
    rows = []
    for name, each_round in seconds.items():
        row = Row(f"{len(files)} images", name, each_round)
        rows.append(replace(row, more={"images/s": len(files) / row.median}))
    sides = setup.cfg.INPUT.MIN_SIZE_TRAIN
    source = f"of {quoted(setup.images.name)}" if setup.images else "generated, 640 x 480"
    note = (
        f"JPEG files {source}, with seven boxes each: decoded, resized to a shorter side of "
        f"{min(sides)} to {max(sides)} pixels and flipped, on one core."
    )
    return [Table("Loader", note, rows)]


def _photographs(folder: Path, count: int) -> Path:
    for number in range(count):
        picture = photograph(np.random.default_rng(number), 480, 640)
        picture.save(folder / f"{number:04}.jpg", quality=92)
    return folder


def _record(file: Path) -> dict[str, Any]:
    header = read_header(file)
    width, height = header.width, header.height
    boxes = [[n * width / 10, n * height / 10, width / 4, height / 4] for n in range(7)]
    objects = [
        {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
        for box in boxes
    ]
    return {"file_name": str(file), "height": height, "width": width, "annotations": objects}


def _read(mapper: Callable[[Any], Any], records: Sequence[dict[str, Any]]) -> None:
    for record in records:
        mapper(record)


SECTIONS: Mapping[str, Callable[[Setup], list[Table]]] = {
    "inference": inference,
    "training": training,
    "roi_align": pooling,
    "loader": loader,
    "classification": classification,
    "evaluation": evaluation,
    "artifacts": artifacts,
    "roofline": roofline,
    "growth": growth,
}
"""The sections, in the order of the page."""
