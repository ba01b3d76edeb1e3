"""From a folder of data to a training: every choice, its reason, and what changes it."""

from __future__ import annotations

import argparse
import ast
import contextlib
import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from tabulate import tabulate

from resnext_det.backbones import build_detector
from resnext_det.config import load_config, locate_config
from resnext_det.config_rules import MULTI_STEP
from resnext_det.data.anchors import Anchors
from resnext_det.data.annotations import read_annotations
from resnext_det.data.dividing import with_validation, write_parts
from resnext_det.data.folder import OURS, Folder, read_folder
from resnext_det.data.records import is_image
from resnext_det.data.survey import Survey, survey
from resnext_det.engine.setup import check_folder
from resnext_det.errors import ConfigError, DatasetError, named, plain, quoted
from resnext_det.weights.catalog import ENTRIES, SCHEME, Entry
from resnext_det.weights.fetching import cache_folder

MODELS = {
    "x50": "faster_rcnn_X_50_32x4d_FPN_1x",
    "x101": "faster_rcnn_X_101_32x4d_FPN_1x",
}
"""The config of each --model."""

_DEPTHS = {"x50": 50, "x101": 101}
_UPDATES = 5000  # that a training should have
_EPOCHS = 12, 100  # the fewest, those of COCO's 1x schedule, and the most
_FEW_IMAGES = 1000
_SHORTER = 320, 800  # sides of images
_LONGER = 1333 / 800  # Detectron2's ratio of the longest side to the shorter
_EVALUATIONS = 10
_WARMUP = 1000  # updates, as Detectron2's; a shorter one may diverge
_MARGIN = 0.85  # of a GPU's memory that a micro-batch may take


@dataclass(frozen=True)
class Choice:
    """A setting, why it is so, and what changes it."""

    what: str
    value: str
    why: str
    change: str


def take_folder(arguments: argparse.Namespace, world_size: int, *, alone: bool = True) -> str:
    """Turn --data, --model, --epochs and --output into a config, overrides and annotation files.

    With --dry-run, nothing is written, and the arguments stay as they are.

    Args:
        arguments: of `train`; the rest of the command finds what follows from the folder in them.
        world_size: number of processes.
        alone: whether all processes follow from this call; those of torchrun and of other machines
            make their own plans, which must be the same.

    Returns:
        The plan as text.

    Raises:
        DatasetError: see `read_folder` and `with_validation`, or a resume would validate with
            images that were trained on.
        ConfigError: an override is refused, or the output folder holds a training or is inside the
            data's.
    """
    given = dict(zip(arguments.opts[::2], arguments.opts[1::2]))
    folder = read_folder(arguments.data, arguments.layout)
    seed = max(int(_number(given.get("SEED"), 0)), 0)
    folder, divided = with_validation(folder, seed=seed)
    output = str(arguments.output or Path("output") / folder.path.name)
    choices = _data(folder, divided)
    overrides = {"OUTPUT_DIR": given.get("OUTPUT_DIR", output)}
    config = arguments.config_file or MODELS[arguments.model]
    if not arguments.config_file:
        workers = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
        overrides |= {
            "SOLVER.REFERENCE_WORLD_SIZE": "0",
            "SEED": str(seed),
            "DATALOADER.NUM_WORKERS": str(workers),  # PyTorch warns of more than there are cores
        }
        choices += _network(arguments.model, given, overrides)
        choices += _images(folder, given, overrides)
    config = str(locate_config(config))
    cfg = load_config(config, _words(overrides | given))
    if not arguments.config_file or arguments.epochs:
        choices += _schedule(folder, cfg, given, overrides, arguments.epochs, world_size)
    cfg = load_config(config, _words(overrides | given))
    if not arguments.config_file:
        choices.append(_micro_batch(cfg, given, overrides, world_size, alone))
    choices.append(Choice("Run", quoted(Path(cfg.OUTPUT_DIR)), "", "--output"))
    rows = [(each.what, each.value, each.why, each.change) for each in choices]
    text: str = tabulate(
        rows,
        headers=["", "choice", "why", "change it with"],
        maxcolwidths=[None, 38, 38, 36],
        disable_numparse=True,
    )
    if Path(cfg.OUTPUT_DIR).resolve().is_relative_to(folder.path.resolve()):
        raise ConfigError(
            f"--output {quoted(Path(cfg.OUTPUT_DIR))} is inside --data, where nothing is written: "
            "name another folder."
        )
    if arguments.dry_run:
        return text
    check_folder(cfg, resume=arguments.resume, overwrite=arguments.overwrite)
    target = folder.path / OURS if arguments.write else Path(cfg.OUTPUT_DIR) / "data"
    if arguments.resume and (Path(cfg.OUTPUT_DIR) / "last_checkpoint").is_file():
        _check_split(folder, target)
    files = write_parts(folder, target)
    for split, flag in (("train", "train"), ("val", "test")):
        setattr(arguments, f"{flag}_json", str(files[split]))
        setattr(arguments, f"{flag}_images", str(folder.parts[split].images))
    arguments.config_file = config
    arguments.opts = _words(overrides | given)
    return text


def _check_split(folder: Folder, written: Path) -> None:
    """Refuse a division by which images that a training has seen would now validate it."""
    before, val = written / "train.json", folder.parts["val"]
    if val.file is not None or not before.is_file():
        return
    trained = {each["file_name"] for each in read_annotations(before)["images"] if is_image(each)}
    moved = [each for each in val.document["images"] if each["file_name"] in trained]
    if moved:
        raise DatasetError(
            f"--data has changed since the training began: {len(moved):,} of the "
            f"{len(val.files):,} images to validate with, such as {quoted(moved[0]['file_name'])}, "
            "were trained on. Continue with --resume --config-file RUN/config.yaml, which keeps "
            "the split, or begin another run with --output."
        )


def survey_folder(
    path: Path, layout: str | None, config: str | None, given: Mapping[str, str]
) -> tuple[Folder, Survey]:
    """Examine a folder for the detector that `take_folder` would train.

    Args:
        path: the folder.
        layout: see `read_folder`.
        config: a config file, or None for x50's.
        given: overrides.

    Raises:
        DatasetError: see `read_folder`.
        ConfigError: the config is refused.
    """
    folder = read_folder(path, layout)
    overrides: dict[str, str] = {}
    if config is None:
        _images(folder, given, overrides)
    cfg = load_config(config or MODELS["x50"], _words(overrides | dict(given)))
    sizes = sorted(cfg.INPUT.MIN_SIZE_TRAIN)
    size = sizes[len(sizes) // 2], cfg.INPUT.MAX_SIZE_TRAIN
    return folder, survey(folder, _anchors(cfg), size)


def _anchors(cfg: CfgNode) -> Anchors | None:
    """Return the anchors of an RPN or of RetinaNet; None if their strides are unknown."""
    one_stage = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    features = (cfg.MODEL.RETINANET if one_stage else cfg.MODEL.RPN).IN_FEATURES
    known = {f"p{level}": 2**level for level in range(2, 8)}
    known |= {f"res{level}": 2**level for level in range(2, 6)}
    generator = cfg.MODEL.ANCHOR_GENERATOR
    if generator.NAME != "DefaultAnchorGenerator" or not set(features) <= set(known):
        return None
    sizes, ratios = (tuple(map(tuple, each)) for each in (generator.SIZES, generator.ASPECT_RATIOS))
    strides = tuple(known[each] for each in features)
    return Anchors(sizes, ratios, strides, generator.OFFSET)


def _words(overrides: Mapping[str, str]) -> list[str]:
    return [word for pair in overrides.items() for word in pair]


def _number(text: str | None, default: float) -> float:
    """Return a number of the command line; the config refuses others."""
    with contextlib.suppress(ValueError, SyntaxError, TypeError):
        number = float(ast.literal_eval(text or ""))
        return number if math.isfinite(number) else default
    return default


def _data(folder: Folder, divided: str) -> list[Choice]:
    choices = [
        Choice("Data", f"{folder.layout}, in {quoted(folder.path)}", "recognised", "--layout")
    ]
    for split, part in folder.parts.items():
        images, objects = len(part.document["images"]), len(part.document["annotations"])
        value, why = f"{images:,} images, {objects:,} objects", ""
        if split == "train" and part.annotated < images:
            why = f"{images - part.annotated:,} images without objects are left out of the training"
        if split == "val":
            why = divided or "given"
        if split == "test":
            why = "not used: the score threshold and the best checkpoint come from val"
        change = {
            "train": "DATALOADER.FILTER_EMPTY_ANNOTATIONS False" if why else "",
            "val": "SEED N; --write keeps it in the folder" if divided else "",
        }
        choices.append(Choice(split, value, why, change.get(split, "")))
    classes = [each["name"] for each in folder.parts["train"].document["categories"]]
    choices.append(Choice("Classes", f"{len(classes):,}: {named(classes, 8)}", "in this order", ""))
    choices += [Choice("Note", plain(note, 300), "", "") for note in folder.notes]
    return choices


def _network(model: str, given: Mapping[str, str], overrides: dict[str, str]) -> list[Choice]:
    other = "x101: slower, more accurate" if model == "x50" else "x50: faster, less accurate"
    depth = _DEPTHS[model]
    name = f"Faster R-CNN, FPN, ResNeXt-{depth} 32x4d"
    choices = [Choice("Model", name, f"--model {model}", f"--model ({other})")]
    key = "MODEL.WEIGHTS"
    if key in given:
        return [*choices, Choice("Weights", quoted(Path(given[key] or "none")), "given", key)]
    best, why = best_weights(depth, cache_folder())
    overrides[key] = f"{SCHEME}{best.name}"
    return [*choices, Choice("Weights", overrides[key], why, key)]


def best_weights(depth: int, cache: Path) -> tuple[Entry, str]:
    """Return the most accurate weights that may be used commercially, and why they were chosen.

    Those in the cache come first. All were trained on ImageNet-1K alone.
    """
    licensed = [
        each
        for each in ENTRIES.values()
        if each.depth == depth and str(each.template) == "32x4d" and each.commercial
        if each.imagenet_1k_only and each.accuracy is not None
    ]
    here = [each for each in licensed if any((cache / each.name).glob("*.pth"))]
    best = max(here or licensed, key=lambda each: each.accuracy.top1 if each.accuracy else 0)
    assert best.accuracy is not None
    where = "in the cache" if here else "downloaded at the start"
    return best, (
        f"{where}; {best.accuracy.top1:.1f} % on ImageNet-1K, the best "
        f"{'there ' if here else ''}for commercial use ({best.licence})"
    )


def _images(folder: Folder, given: Mapping[str, str], overrides: dict[str, str]) -> list[Choice]:
    """Choose the size of the images: their own, between 320 and 800, as Detectron2 scales them."""
    records = folder.parts["train"].document["images"]
    sides = [min(each["width"], each["height"]) for each in records]
    median = statistics.median(sides)
    shorter = min(max(32 * round(median / 32), _SHORTER[0]), _SHORTER[1])
    longest = round(shorter * _LONGER)
    steps = sorted({32 * round(shorter * (0.8 + 0.04 * step) / 32) for step in range(6)})
    values = {
        "INPUT.MIN_SIZE_TRAIN": f"({', '.join(map(str, steps))})",
        "INPUT.MIN_SIZE_TEST": str(shorter),
        "INPUT.MAX_SIZE_TRAIN": str(longest),
        "INPUT.MAX_SIZE_TEST": str(longest),
    }
    overrides.update(values)
    shown = values | {key: given[key] for key in values if key in given}
    value = (
        f"shorter side {shown['INPUT.MIN_SIZE_TRAIN']}, tested at {shown['INPUT.MIN_SIZE_TEST']}; "
        f"longer up to {shown['INPUT.MAX_SIZE_TRAIN']}"
    )
    why = f"half of the images have a shorter side of {median:g} pixels or more"
    if any(key in given for key in values):
        why = "given in part"
    return [Choice("Image size", value, why, ", ".join(values))]


def _schedule(
    folder: Folder,
    cfg: CfgNode,
    given: Mapping[str, str],
    overrides: dict[str, str],
    epochs: float | None,
    world_size: int,
) -> list[Choice]:
    """Choose batch, learning rate and length; with a config of the user's, only the length."""
    part = folder.parts["train"]
    images = part.annotated if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS else len(part.files)
    images = max(images, 1)
    choices = []
    chosen = "SOLVER.REFERENCE_WORLD_SIZE" in overrides
    if chosen:
        batch = 8 if images < _FEW_IMAGES else 16
        batch = world_size * math.ceil(batch / world_size)
        why = f"{'fewer than' if images < _FEW_IMAGES else 'at least'} {_FEW_IMAGES:,} images"
        batch = int(_take("SOLVER.IMS_PER_BATCH", batch, given, overrides))
        choices.append(
            _choice("Images per update", f"{batch:g}", why, "SOLVER.IMS_PER_BATCH", given)
        )
        rate = cfg.SOLVER.LR_PER_IMAGE * batch
        rate = _take("SOLVER.BASE_LR", rate, given, overrides)
        why = f"the linear rule: {cfg.SOLVER.LR_PER_IMAGE:g} for each image of an update"
        choices.append(_choice("Learning rate", f"{rate:g}", why, "SOLVER.BASE_LR", given))
    else:
        batch = cfg.SOLVER.IMS_PER_BATCH
    usual = math.ceil(_UPDATES * batch / images)
    passes = epochs or min(max(usual, _EPOCHS[0]), _EPOCHS[1])
    length = max(1, math.ceil(passes * images / batch))
    length = int(_take("SOLVER.MAX_ITER", length, given, overrides))
    epoch = math.ceil(images / batch)
    period = max(epoch, length // _EVALUATIONS)
    if chosen:  # a config has its own
        overrides["SOLVER.WARMUP_ITERS"] = str(min(_WARMUP, length // 4))
    steps = sorted({length * 2 // 3, length * 8 // 9} - {0})
    overrides |= {
        "SOLVER.STEPS": str(tuple(steps)),
        "SOLVER.CHECKPOINT_PERIOD": str(period),
        "TEST.EVAL_PERIOD": str(period),
    }
    why = (
        "--epochs"
        if epochs
        else f"about {_UPDATES:,} updates, in {_EPOCHS[0]} to {_EPOCHS[1]} epochs"
    )
    value = f"{length * batch / images:.3g} epochs of {images:,} images: {length:,} updates"
    choices.append(_choice("Length", value, why, "SOLVER.MAX_ITER", given, "--epochs or "))
    if cfg.SOLVER.LR_SCHEDULER_NAME == MULTI_STEP:
        at = given.get("SOLVER.STEPS", overrides["SOLVER.STEPS"])
        why = "2/3 and 8/9, as in the 1x schedule"
        value = f"times {cfg.SOLVER.GAMMA:g} at {at}"
        choices.append(_choice("Decay", value, why, "SOLVER.STEPS", given))
    value = f"every {given.get('TEST.EVAL_PERIOD', period)} updates and at the end"
    why = "ten times, at most once an epoch; the best checkpoint is kept"
    choices.append(_choice("Evaluations", value, why, "TEST.EVAL_PERIOD", given))
    return choices


def _take(key: str, value: float, given: Mapping[str, str], overrides: dict[str, str]) -> float:
    """Set a key unless the command line does; return its value."""
    overrides[key] = f"{value:g}" if isinstance(value, float) else str(value)
    return _number(given.get(key), value)


def _choice(
    what: str, value: str, why: str, key: str, given: Mapping[str, str], flag: str = ""
) -> Choice:
    return Choice(what, value, "given" if key in given else why, f"{flag}{key}")


def _micro_batch(
    cfg: CfgNode,
    given: Mapping[str, str],
    overrides: dict[str, str],
    world_size: int,
    alone: bool,
) -> Choice:
    """Choose how many images a process handles at once: the most that a GPU has memory for."""
    key = "SOLVER.IMS_PER_MICRO_BATCH"
    share = max(1, cfg.SOLVER.IMS_PER_BATCH // world_size)
    if key in given:
        return Choice("Micro-batch", given[key], "given", key)
    if not str(cfg.MODEL.DEVICE).startswith("cuda"):
        size, why = 1, "on a CPU, more images at once need more memory and gain little"
    elif not alone:
        raise ConfigError(
            f"processes that are started separately must agree on the micro-batch: set {key} N, "
            "such as the one that --dry-run finds on one GPU."
        )
    else:
        size, peak, total = _largest(cfg, share)
        why = (
            f"tried: {peak / 2**30:.1f} of {total / 2**30:.0f} GiB, and {1 - _MARGIN:.0%} stay free"
        )
    overrides[key] = str(size)
    return Choice("Micro-batch", f"{size} of {share} images of a process", why, key)


def _largest(cfg: CfgNode, share: int) -> tuple[int, int, int]:
    """Train on the largest images, in ever smaller micro-batches, until the memory is enough.

    Returns:
        Images, bytes at most, and bytes of the GPU.

    Raises:
        ConfigError: not even one image fits.
    """
    free, total = torch.cuda.mem_get_info()
    peak = 0
    model = build_detector(cfg).train()
    try:
        batch = cfg.SOLVER.IMS_PER_BATCH
        for size in (n for n in range(share, 0, -1) if share % n == batch % n == 0):
            torch.cuda.reset_peak_memory_stats()
            with contextlib.suppress(torch.OutOfMemoryError):
                sum(model(_batch(cfg, size)).values()).backward()
                peak = torch.cuda.max_memory_reserved()
                if peak <= _MARGIN * free:
                    return size, peak, total
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    finally:
        del model
        torch.cuda.empty_cache()
    raise ConfigError(
        f"one image of {max(cfg.INPUT.MIN_SIZE_TRAIN)} x {cfg.INPUT.MAX_SIZE_TRAIN} pixels needs "
        f"more than the {free / 2**30:.1f} GiB that are free on the GPU: set INPUT.MIN_SIZE_TRAIN "
        "and INPUT.MAX_SIZE_TRAIN lower, or MODEL.RESNEXT.CHECKPOINT_STAGES."
    )


def _batch(cfg: CfgNode, size: int) -> list[dict[str, Any]]:
    height, width = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    corners = torch.rand(50, 2) * torch.tensor([width, height]) * 0.8
    boxes = torch.cat([corners, corners + 16 + torch.rand(50, 2) * min(height, width) * 0.2], 1)
    objects = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=torch.zeros(50).long())
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return [{"image": image, "instances": objects} for _ in range(size)]
