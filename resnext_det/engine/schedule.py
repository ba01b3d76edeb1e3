"""The schedules that configs are named after, and what a config becomes on this machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from resnext_det.config import complete
from resnext_det.engine.plan import Plan, make_plan
from resnext_det.engine.solver import check_solver, shorten
from resnext_det.errors import ConfigError

# Above this, the numbers of processes that could share a batch are not listed.
_MANY_PROCESSES = 1024


@dataclass(frozen=True)
class Schedule:
    """How long a detector is trained, on how much, at which learning rate.

    Attributes:
        name: at the end of the names of its configs.
        images: per update, over all processes (SOLVER.IMS_PER_BATCH).
        processes: that it was written for, a GPU each (SOLVER.REFERENCE_WORLD_SIZE).
        base_lr: learning rate after the warm-up.
        steps: iterations from which on it is a tenth of what it was.
        max_iter: iterations.
        warmup_iters: iterations over which the learning rate grows to `base_lr`, linearly.
        warmup_factor: of `base_lr`, at the start.
        source: who says so.
    """

    name: str
    images: int
    processes: int
    base_lr: float
    steps: tuple[int, ...]
    max_iter: int
    warmup_iters: int
    warmup_factor: float
    source: str


_SCHEDULES = (
    # The paper trains RPN and Fast R-CNN apart; this is its RPN step, applied to both at once.
    Schedule(
        *("paper", 16, 8, 0.02, (120_000,), 180_000, 1000, 0.001),
        source="arXiv 1611.05431v2, appendix B (RPN step); the warm-up is Detectron2's default",
    ),
    # Detectron's, 8 GPUs of one image at 0.01 for twice the iterations, as Detectron2 writes them.
    Schedule(
        *("1x", 16, 8, 0.02, (60_000, 80_000), 90_000, 1000, 0.001),
        source="Detectron2, configs/Base-RCNN-FPN.yaml",
    ),
    Schedule(
        *("3x", 16, 8, 0.02, (210_000, 250_000), 270_000, 1000, 0.001),
        source="Detectron2, configs/COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
    ),
    # The notes that this package was asked for with say "8 GPUs, 128 mini-batch" of COCO. The paper
    # does not: its 128 is the mini-batch of CIFAR (appendix A), and on COCO it takes 16 images for
    # RPN and 8 for Fast R-CNN. Who wants 128 gets it by the linear rule: 8 times the images and the
    # learning rate, an eighth of the iterations. The warm-up keeps its 1000 iterations, 1.08 epochs
    # of 118,287 images instead of 0.14: the rule fails where the weights still change fast, so the
    # larger the rate, the longer it needs to get there (1706.02677, section 2.2).
    Schedule(
        *("128", 128, 8, 0.16, (15_000,), 22_500, 1000, 0.001),
        source="the paper's, scaled from 16 to 128 images by the linear rule (1706.02677)",
    ),
)

SCHEDULES = {schedule.name: schedule for schedule in _SCHEDULES}
"""By name."""


def scale(cfg: CfgNode, world_size: int) -> tuple[CfgNode, Plan]:
    """Return what a config becomes on this number of processes, and the plan of it.

    With SOLVER.REFERENCE_WORLD_SIZE the number of processes that the config was written for (0:
    those there are), SOLVER.SCALING says how it is repeated on another number:

    - "accumulate": the same images per update, learning rate and iterations. A process takes its
      share of the images one micro-batch after the other, the largest micro-batches that divide
      the share and hold no more images than a process of the reference had, so that they fit the
      same memory. 16 images of 8 processes are on 1 process 8 micro-batches of 2, on 16 processes
      a micro-batch of 1 image each.
    - "linear": `DefaultTrainer.auto_scale_workers`, with the same images per process: batch,
      learning rate, iterations and periods change. One micro-batch per update.
    - "none": unchanged, in one micro-batch per update.

    SOLVER.IMS_PER_MICRO_BATCH, where it is not 0, sets the size of the micro-batches. A schedule
    that is longer than SOLVER.MAX_ITER is shortened first, with a warning in the plan.

    Args:
        cfg: any Detectron2 config; it is not changed.
        world_size: processes that train.

    Returns:
        A frozen config and its plan. SOLVER.REFERENCE_WORLD_SIZE is 0 in it, so that neither
        Detectron2's trainer nor a second call scales it again; only the plan knows micro-batches.

    Raises:
        ConfigError: a value that `check_solver` refuses, before scaling or after, or images that
            cannot be shared by the processes.
    """
    if world_size < 1:
        raise ConfigError(f"{world_size} processes cannot train; there must be 1 or more.")
    cfg = complete(cfg)
    check_solver(cfg)
    cfg, warnings = shorten(cfg)
    scaled = _linear(cfg, world_size) if cfg.SOLVER.SCALING == "linear" else cfg.clone()
    scaled, more = shorten(scaled)
    solver = scaled.SOLVER
    if solver.IMS_PER_BATCH % world_size:
        raise ConfigError(_not_shared(cfg, world_size))
    share = most = solver.IMS_PER_BATCH // world_size
    if solver.SCALING == "accumulate":
        most = solver.IMS_PER_BATCH // (solver.REFERENCE_WORLD_SIZE or world_size)
    images = solver.IMS_PER_MICRO_BATCH or _largest_divisor(share, most)
    if share % images:
        raise ConfigError(
            f"SOLVER.IMS_PER_MICRO_BATCH {images} does not divide the {share} images of a process "
            f"(SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} over {world_size}). Set a divisor of "
            f"{share}, or 0."
        )
    scaled.defrost()
    solver.REFERENCE_WORLD_SIZE = 0
    scaled.freeze()
    warnings += [*more, *_unusual_rate(scaled)]
    return scaled, make_plan(cfg, scaled, world_size, images, share // images, warnings)


def _linear(cfg: CfgNode, world_size: int) -> CfgNode:
    """Return a copy, scaled by Detectron2's rule."""
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference and batch % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {batch} is no multiple of SOLVER.REFERENCE_WORLD_SIZE "
            f"{reference}, the processes that it was written for, so it cannot be scaled. Set "
            "SOLVER.REFERENCE_WORLD_SIZE 0 to take the batch as it is."
        )
    scaled: CfgNode = DefaultTrainer.auto_scale_workers(cfg.clone(), world_size)
    came = f"SOLVER.SCALING linear, from {reference} to {world_size} processes"
    try:
        check_solver(scaled)
    except ConfigError as error:
        raise ConfigError(f"{came}: {error}") from error
    if cfg.TEST.EVAL_PERIOD and not scaled.TEST.EVAL_PERIOD:
        raise ConfigError(
            f"{came}: TEST.EVAL_PERIOD {cfg.TEST.EVAL_PERIOD} becomes 0, which is no evaluation "
            "before the end. Set a longer period, or 0 if that is meant."
        )
    return scaled


def _largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor up to `most`, at least 1."""
    return next((size for size in range(min(number, most), 1, -1) if number % size == 0), 1)


def _not_shared(cfg: CfgNode, world_size: int) -> str:
    """Return why, which numbers of processes could share the batch, and what else helps."""
    solver = cfg.SOLVER
    batch, reference = solver.IMS_PER_BATCH, solver.REFERENCE_WORLD_SIZE
    most = min(batch, _MANY_PROCESSES)
    numbers = [str(number) for number in range(1, most + 1) if batch % number == 0]
    way_out = f"set SOLVER.IMS_PER_BATCH to a multiple of {world_size}"
    if reference and batch % reference == 0:
        way_out = (
            "set SOLVER.SCALING linear, which keeps the images of a process and scales batch, "
            "learning rate and iterations"
        )
    return (
        f"SOLVER.IMS_PER_BATCH {batch} cannot be shared by {world_size} processes; it can by "
        f"{', '.join(numbers)}. Start one of these numbers, or {way_out}."
    )


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
        f"SOLVER.BASE_LR {solver.BASE_LR:g} is {ratio:.3g} times what the linear rule gives for "
        f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}: {rule:g} (SOLVER.LR_PER_IMAGE "
        f"{solver.LR_PER_IMAGE:g} an image). If the losses grow, set SOLVER.BASE_LR {rule:g}."
    ]
