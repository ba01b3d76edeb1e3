"""The schedule: what a config becomes on this number of processes, checked and described."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from tabulate import tabulate

from resnext_det.config import complete
from resnext_det.config_rules import COSINE, MULTI_STEP, RULES, refuse, value_of, wrong
from resnext_det.errors import ConfigError

# The keys that `DefaultTrainer.auto_scale_workers` changes.
_SCALED = (
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.BASE_LR",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
)


@dataclass(frozen=True)
class Plan:
    """What a training will do on this number of processes.

    Attributes:
        cfg: the scaled config.
        processes: number of processes.
        micro_batches: micro-batches per update, which the processes share, evenly or not.
        images_per_micro_batch: images of each.
        fixed: whether another number of processes would have the same micro-batches.
        scaling: SOLVER.SCALING and what it changed, in words.
        warnings: about settings that were shortened or are unusual.
    """

    cfg: CfgNode
    processes: int
    micro_batches: int
    images_per_micro_batch: int
    fixed: bool
    scaling: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def describe(self, images: int) -> str:
        """Return the plan for this number of training images, as lines to print."""
        solver, test, tested = self.cfg.SOLVER, self.cfg.TEST, self.cfg.DATASETS.TEST

        def at(iteration: int) -> str:
            epochs = iteration * solver.IMS_PER_BATCH / images
            return f"iteration {iteration:,} ({epochs:.2f} epochs)"

        if solver.LR_SCHEDULER_NAME == COSINE:
            decay = [f"cosine, to {solver.BASE_LR_END:g} at the end"]
        else:
            decay = [
                f"to {solver.BASE_LR * solver.GAMMA**number:g} at {at(iteration)}"
                for number, iteration in enumerate(_decays(self.cfg), start=1)
            ]
        warmup = "none"
        if solver.WARMUP_ITERS:
            start = solver.BASE_LR * solver.WARMUP_FACTOR
            warmup = f"from {start:g}, until {at(solver.WARMUP_ITERS)}"
        evaluations = "none"
        if tested:
            periodic = f"every {test.EVAL_PERIOD:,} iterations and " if test.EVAL_PERIOD else ""
            evaluations = f"{periodic}at the end, on {', '.join(tested)}"
            if test.BEST.PATIENCE and test.BEST.METRIC:
                evaluations += f"; stops after {test.BEST.PATIENCE:,} without improvement"
        checkpoints = f"every {solver.CHECKPOINT_PERIOD:,} iterations"
        if solver.KEEP_LAST:
            checkpoints += f", of which the last {solver.KEEP_LAST:,} are kept"
        precision = complete(self.cfg).MODEL.RESNEXT.PRECISION
        if solver.AMP.ENABLED:
            precision += f", autocast to {solver.AMP.PRECISION}"
        rows = [
            (
                "Images per update",
                f"{solver.IMS_PER_BATCH:,} = {self.micro_batches} x {self.images_per_micro_batch} "
                f"(micro-batches x images), {self._shares()}",
            ),
            ("Scaling", "\n".join(self.scaling)),
            ("Images to train on", f"{images:,}"),
            ("Learning rate", f"{solver.BASE_LR:g}"),
            ("Warm-up", warmup),
            ("Decay", "\n".join(decay) or "none"),
            ("End", at(solver.MAX_ITER)),
            ("Evaluations", evaluations),
            ("Checkpoints", checkpoints),
            ("Precision", precision),
        ]
        text: str = tabulate(rows, tablefmt="plain", disable_numparse=True)
        return text

    def _shares(self) -> str:
        fewest, more = divmod(self.micro_batches, self.processes)
        each = f"{fewest} or {fewest + 1}" if more else f"{fewest}"
        return f"{each} on each of {self.processes} processes"


def in_epochs(cfg: CfgNode, images: int) -> CfgNode:
    """Stretch a schedule to end after SOLVER.MAX_EPOCHS passes over this number of images.

    Steps, warm-up and periods keep their proportion to SOLVER.MAX_ITER, but a period is at least
    one pass.

    Returns:
        A frozen copy, which a second call leaves alone; the config itself if MAX_EPOCHS is 0.
    """
    if not cfg.SOLVER.MAX_EPOCHS:
        return cfg
    stretched: CfgNode = cfg.clone()
    stretched.defrost()
    solver, test = stretched.SOLVER, stretched.TEST
    solver.MAX_ITER = max(1, int(solver.MAX_EPOCHS * images / solver.IMS_PER_BATCH))
    ratio = solver.MAX_ITER / cfg.SOLVER.MAX_ITER
    steps = (round(step * ratio) for step in solver.STEPS)
    solver.STEPS = tuple(dict.fromkeys(step for step in steps if step > 0))
    solver.WARMUP_ITERS = round(solver.WARMUP_ITERS * ratio)
    epoch = math.ceil(images / solver.IMS_PER_BATCH)
    solver.CHECKPOINT_PERIOD = max(epoch, round(solver.CHECKPOINT_PERIOD * ratio))
    if test.EVAL_PERIOD:
        test.EVAL_PERIOD = max(epoch, round(test.EVAL_PERIOD * ratio))
    stretched.freeze()
    return stretched


def scale(cfg: CfgNode, world_size: int) -> tuple[CfgNode, Plan]:
    """Return what a config becomes on this number of processes, and the plan for it.

    SOLVER.REFERENCE_WORLD_SIZE is the number of processes that the config was written for, or 0 for
    any. SOLVER.SCALING decides how another number repeats it:

    - "accumulate": the same images per update, learning rate and iterations. The micro-batches are
      those of the reference: its 16 images on 8 processes are 8 micro-batches of 2, on any number
      of processes up to 8. If the reference cannot share the batch evenly, micro-batches are the
      largest that divide the batch and do not exceed a process's share, to fit in the same memory.
      More processes than micro-batches get smaller ones, with a warning.
    - "linear": `DefaultTrainer.auto_scale_workers`: the same images per process; batch, learning
      rate, iterations and periods change in proportion.
    - "none": unchanged.

    SOLVER.IMS_PER_MICRO_BATCH sets the size of micro-batches, unless it is 0.

    Micro-batches have their own images and random numbers. Their number does not follow from that
    of the processes if the plan is `fixed`, so that any number of processes repeats the training.

    Returns:
        A frozen config with SOLVER.REFERENCE_WORLD_SIZE 0, so that it is not scaled again, and its
        plan.

    Raises:
        ConfigError: a value is out of range, before or after scaling, or the processes cannot share
            the batch.
    """
    if world_size < 1:
        raise ConfigError(f"{world_size} processes cannot train; start 1 or more.")
    cfg = complete(cfg)
    check_solver(cfg)
    cfg, warnings = shorten(cfg)
    scaled = _linear(cfg, world_size) if cfg.SOLVER.SCALING == "linear" else cfg
    scaled, more = shorten(scaled)
    solver, reference = scaled.SOLVER, cfg.SOLVER.REFERENCE_WORLD_SIZE
    batch, images = solver.IMS_PER_BATCH, solver.IMS_PER_MICRO_BATCH
    if batch < world_size:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {batch} is too small for {world_size} processes: start "
            f"{batch} or fewer, or set SOLVER.IMS_PER_BATCH {world_size} or more, or "
            "SOLVER.SCALING linear."
        )
    follows = bool(reference) and solver.SCALING == "accumulate"
    if not images:
        images = usual = _largest_divisor(batch, batch // (reference if follows else world_size))
        if batch // images < world_size:
            images = _largest_divisor(batch, batch // world_size)
            more.append(
                f"{world_size} processes are more than the {batch // usual} micro-batches that "
                f"{reference} have (SOLVER.REFERENCE_WORLD_SIZE). An update is split into "
                f"{batch // images} instead, with other images than on fewer processes."
            )
            follows = False
    elif batch % images or batch // images < world_size:
        raise ConfigError(
            f"SOLVER.IMS_PER_MICRO_BATCH {images} does not split SOLVER.IMS_PER_BATCH {batch} into "
            f"{world_size} micro-batches or more, one for each process: set a divisor of {batch} "
            f"up to {batch // world_size}, or 0."
        )
    fixed = solver.SCALING != "linear" and (bool(solver.IMS_PER_MICRO_BATCH) or follows)
    if solver.EXACT_SUM and not fixed:
        raise ConfigError(
            "SOLVER.EXACT_SUM needs micro-batches that do not depend on the number of processes: "
            f"set SOLVER.IMS_PER_MICRO_BATCH to a divisor of {batch} up to {batch // world_size}, "
            "and SOLVER.SCALING accumulate."
        )
    if solver.EXACT_SUM and not scaled.MODEL.DEVICE.startswith("cpu"):
        more.append(
            "SOLVER.EXACT_SUM adds up micro-batches in order, but some of PyTorch's sums within "
            "one have no fixed order on a GPU."
        )
    scaled = scaled.clone()
    scaled.defrost()
    scaled.SOLVER.REFERENCE_WORLD_SIZE = 0
    scaled.freeze()
    changes = [
        f"{key} {value_of(cfg, key)} -> {value_of(scaled, key)}"
        for key in _SCALED
        if value_of(cfg, key) != value_of(scaled, key)
    ]
    how = f"{solver.SCALING}, from {reference or world_size} to {world_size} processes"
    warnings += [*more, *_unusual_rate(scaled)]
    plan = Plan(
        scaled, world_size, batch // images, images, fixed, (how, *changes), tuple(warnings)
    )
    return scaled, plan


def _largest_divisor(number: int, most: int) -> int:
    return next((size for size in range(most, 1, -1) if number % size == 0), 1)


def _linear(cfg: CfgNode, world_size: int) -> CfgNode:
    """Return a copy, scaled by Detectron2's rule."""
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference and batch % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {batch} is not a multiple of SOLVER.REFERENCE_WORLD_SIZE "
            f"{reference}, so it cannot be scaled. Set SOLVER.REFERENCE_WORLD_SIZE 0 to keep it."
        )
    scaled: CfgNode = DefaultTrainer.auto_scale_workers(cfg.clone(), world_size)
    origin = f"SOLVER.SCALING linear, from {reference} to {world_size} processes"
    try:
        check_solver(scaled)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    if cfg.TEST.EVAL_PERIOD and not scaled.TEST.EVAL_PERIOD:
        raise ConfigError(
            f"{origin}: TEST.EVAL_PERIOD {cfg.TEST.EVAL_PERIOD} becomes 0, which means no "
            "evaluation before the end. Set a longer period, or 0."
        )
    return scaled


def check_solver(cfg: CfgNode) -> None:
    """Refuse values of SOLVER and TEST that are out of range, or that Detectron2 would reinterpret.

    Raises:
        ConfigError: it names every such key, its value and what is allowed.
    """
    keys = [key for key in RULES if key.startswith(("SOLVER.", "TEST."))]
    refuse(*(wrong(key, value_of(cfg, key)) for key in keys))
    solver = cfg.SOLVER
    steps, end_rate, half, twice, inexact = None, None, None, None, None
    if solver.LR_SCHEDULER_NAME == MULTI_STEP and any(
        later <= earlier for earlier, later in itertools.pairwise(solver.STEPS)
    ):
        steps = f"SOLVER.STEPS is {solver.STEPS!r}; each must be greater than the one before."
    if solver.LR_SCHEDULER_NAME == COSINE and not 0 <= solver.BASE_LR_END <= solver.BASE_LR:
        end_rate = (
            f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}; it must be from 0 to SOLVER.BASE_LR, "
            f"{solver.BASE_LR}."
        )
    on_cpu = str(cfg.MODEL.DEVICE).startswith("cpu")
    if solver.AMP.ENABLED and solver.AMP.PRECISION == "float16" and on_cpu:
        half = (
            f"SOLVER.AMP.PRECISION float16 needs a GPU, and MODEL.DEVICE is {cfg.MODEL.DEVICE}. "
            "Set SOLVER.AMP.PRECISION bfloat16, or SOLVER.AMP.ENABLED False."
        )
    precision = complete(cfg).MODEL.RESNEXT.PRECISION
    if solver.AMP.ENABLED and precision in ("bf16", "fp16"):
        twice = (
            f"SOLVER.AMP.ENABLED is True and MODEL.RESNEXT.PRECISION is {precision}, and both set "
            "the precision of the training. Set SOLVER.AMP.ENABLED False, or MODEL.RESNEXT."
            "PRECISION fp32."
        )
    solver = complete(cfg).SOLVER
    if solver.EXACT_SUM and solver.MICRO_BATCHES_PER_PASS > 1:
        inexact = (
            f"SOLVER.MICRO_BATCHES_PER_PASS is {solver.MICRO_BATCHES_PER_PASS}, and SOLVER."
            "EXACT_SUM True, which takes them one by one. Set one of them back (1, or False)."
        )
    refuse(steps, end_rate, half, twice, inexact)


def shorten(cfg: CfgNode) -> tuple[CfgNode, list[str]]:
    """Make the schedule of a long training fit a short SOLVER.MAX_ITER.

    Steps beyond the end are dropped, as by Detectron2. A warm-up that would outlast the time until
    the first decay, or the end, takes half of that time.

    Returns:
        The config, a frozen copy if something changed, and a warning for each change.
    """
    fitted = cfg.clone()
    fitted.defrost()
    solver, warnings = fitted.SOLVER, []
    end = solver.MAX_ITER
    if solver.LR_SCHEDULER_NAME == MULTI_STEP and any(step >= end for step in solver.STEPS):
        solver.STEPS = tuple(step for step in solver.STEPS if step < end)
        warnings.append(
            f"SOLVER.STEPS {tuple(cfg.SOLVER.STEPS)} is shortened to {solver.STEPS}, as training "
            f"ends at SOLVER.MAX_ITER {end}."
        )
    # With RESCALE_INTERVAL the decays follow the warm-up, however long it is.
    decays = [] if solver.RESCALE_INTERVAL else _decays(fitted)
    first = min(decays, default=end)
    if first <= solver.WARMUP_ITERS:
        solver.WARMUP_ITERS = first // 2
        warnings.append(
            f"SOLVER.WARMUP_ITERS {cfg.SOLVER.WARMUP_ITERS} is shortened to {first // 2}, to reach "
            f"SOLVER.BASE_LR before the {'end' if first >= end else 'decay'} at iteration {first}."
        )
    if not warnings:
        return cfg, []
    fitted.freeze()
    return fitted, warnings


def _decays(cfg: CfgNode) -> list[int]:
    """Return the iterations from which on the learning rate is lower by SOLVER.GAMMA."""
    solver = cfg.SOLVER
    end, warmup = solver.MAX_ITER, solver.WARMUP_ITERS
    if solver.LR_SCHEDULER_NAME == COSINE:
        return []
    if solver.RESCALE_INTERVAL:  # the schedule is squeezed into what the warm-up leaves
        return [math.ceil(warmup + step * (end - warmup) / end) for step in solver.STEPS]
    return list(solver.STEPS)


def _unusual_rate(cfg: CfgNode) -> list[str]:
    """Return a warning about a learning rate of twice the linear rule's or more.

    The rule is SOLVER.LR_PER_IMAGE times SOLVER.IMS_PER_BATCH (1706.02677, section 2.1).
    """
    solver = cfg.SOLVER
    rule = solver.LR_PER_IMAGE * solver.IMS_PER_BATCH
    ratio = solver.BASE_LR / rule
    if ratio < 2 and not math.isclose(ratio, 2):
        return []
    return [
        f"SOLVER.BASE_LR {solver.BASE_LR:g} is {ratio:.3g} times the linear rule's for "
        f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} (SOLVER.LR_PER_IMAGE {solver.LR_PER_IMAGE:g} "
        f"per image). If the losses diverge, set SOLVER.BASE_LR {rule:g}."
    ]
