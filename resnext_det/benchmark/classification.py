"""Training a classifier: `resnext-det pretrain` beside torchvision's network in a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det.benchmark.contenders import BLOCKS, photograph, with_settings
from resnext_det.benchmark.measure import Row, Run, Setup, Table, alternate, apart
from resnext_det.benchmark.roofline import matrix_products, operators, peaks_of
from resnext_det.config import load_config, recipe
from resnext_det.engine.classifier import ClassifierTrainer
from resnext_det.environment import keep_freed_memory
from resnext_det.modeling.complexity import network_complexity

_PLAIN = "torchvision, a plain loop"
_HEIGHT, _WIDTH = 375, 500  # of most images of ImageNet

transforms: Any = torchvision.transforms  # untyped


def classification(setup: Setup) -> list[Table]:
    """Measure updates of images in memory and in files, and the limit of the machine."""
    images, side = setup.sizes.classified
    depth, cardinality, width = setup.sizes.networks[0]
    builds: dict[str, Callable[[CfgNode, bool], Run]] = {_PLAIN: _plain}
    builds |= {f"ours {precision}": partial(_ours, precision) for precision in ("fp32", "bf16")}
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        _write_images(Path(folder), images)
        settings: dict[str, object] = {
            "MODEL.DEVICE": setup.cfg.MODEL.DEVICE,
            "MODEL.RESNETS.DEPTH": depth,
            "MODEL.RESNETS.NUM_GROUPS": cardinality,
            "MODEL.RESNETS.WIDTH_PER_GROUP": width,
            "CLASSIFICATION.DATA": folder,
            "CLASSIFICATION.CROP": side,
            "CLASSIFICATION.LIGHTING": 0.0,  # torchvision has none
            "SOLVER.IMS_PER_BATCH": images,
            # Workers would take from the updates' cores what they save.
            "DATALOADER.NUM_WORKERS": 0,
        }
        cfg = with_settings(load_config(recipe("imagenet1k")), settings)
        for case, reading in (("images in memory", False), ("JPEG files", True)):
            apiece = {name: partial(build, cfg, reading) for name, build in builds.items()}
            measured = apart(apiece, setup.rounds, f"classification, {case}")
            rows += [
                Row(case, name, each.seconds, {"memory, MiB": each.memory})
                for name, each in measured.items()
            ]
        readers: dict[str, Run] = {
            _PLAIN: partial(next, _plain_batches(cfg)),
            "ours": partial(next, _batches(cfg)),
        }
        seconds = alternate(readers, setup.rounds, "reading")
        rows += [Row("reading alone", name, times) for name, times in seconds.items()]
        top = []
        for name in (_PLAIN, "ours fp32"):
            run = builds[name](cfg, False)
            run()
            top += operators(name, run)
    # The backward pass multiplies twice as often as the forward pass.
    forward = network_complexity(depth, f"{cardinality}x{width}d", side, side).total.multiply_adds
    total, peak = 3 * images * forward, peaks_of(matrix_products(setup))["fp32"]
    rows.insert(len(builds), Row("images in memory", "limit of fp32", [total / peak]))
    note = (
        f"Updates of {images} images, {depth} {cardinality}x{width}d, crops of {side} pixels: "
        "forward, backward and SGD. The files are "
        f"generated, {_WIDTH} x {_HEIGHT}, and read in the same process: decoded, cropped at "
        "random, flipped and jittered. Each runs in its own process; memory is what two updates "
        f"add. The limit is that of {total / 1e9:.0f} G multiply-adds at the peak of a matrix "
        "product, and nothing else: batch norms in training cannot be folded."
    )
    rows = [replace(row, more={"images/s": images / row.median, **row.more}) for row in rows]
    profile = "The operators that take the most time of an update of images in memory."
    return [
        Table("Classification", note, rows),
        Table("Classification, profile", profile, top, compared=False),
    ]


def _write_images(folder: Path, count: int) -> None:
    for number in range(count):
        file = folder / "train" / str(number % 2) / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph(np.random.default_rng(number), _HEIGHT, _WIDTH).save(file, quality=92)


def _plain_batches(cfg: CfgNode) -> Iterator[Any]:
    """Read as torchvision's training script does, with the augmentation of a recipe."""
    steps = [
        transforms.RandomResizedCrop(
            cfg.CLASSIFICATION.CROP, interpolation=transforms.InterpolationMode.BICUBIC
        ),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(*[cfg.CLASSIFICATION.COLOR_JITTER] * 3),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    folder = str(Path(cfg.CLASSIFICATION.DATA, "train"))
    images = torchvision.datasets.ImageFolder(folder, transforms.Compose(steps))
    while True:
        yield from DataLoader(images, cfg.SOLVER.IMS_PER_BATCH, shuffle=True)


def _plain(cfg: CfgNode, reading: bool) -> Run:
    """Return an update of torchvision's network, of new images if `reading`."""
    resnets, device = cfg.MODEL.RESNETS, cfg.MODEL.DEVICE
    groups = {"groups": resnets.NUM_GROUPS, "width_per_group": resnets.WIDTH_PER_GROUP}
    model = ResNet(Bottleneck, list(BLOCKS[resnets.DEPTH]), **groups).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    batches = _plain_batches(cfg)
    first = next(batches)

    def run() -> float:
        images, labels = (each.to(device) for each in (next(batches) if reading else first))
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return run


def _batches(cfg: CfgNode) -> Iterator[Any]:
    return iter(ClassifierTrainer.build_train_loader(cfg))


def _ours(precision: str, cfg: CfgNode, reading: bool) -> Run:
    """Return an update as `resnext-det pretrain` makes it, of new images if `reading`."""
    keep_freed_memory()
    words = {"MODEL.RESNEXT.PRECISION": precision, "SOLVER.BASE_LR": 0.01}
    cfg = with_settings(cfg, words)
    model = ClassifierTrainer.build_model(cfg).train()
    optimizer = ClassifierTrainer.build_optimizer(cfg, model)
    batches = _batches(cfg)
    first = next(batches)

    def run() -> float:
        with EventStorage():
            loss = model(next(batches) if reading else first)["loss_cls"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run
