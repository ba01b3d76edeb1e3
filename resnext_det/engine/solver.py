"""SOLVER and TEST.EVAL_PERIOD: which values are refused, and when the learning rate falls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from resnext_det.errors import ConfigError

SCALINGS = ("accumulate", "linear", "none")
PRECISIONS = ("float16", "bfloat16")
# Detectron2's, see detectron2.solver.build_lr_scheduler.
MULTI_STEP, COSINE, FIXED_GAMMA = (
    "WarmupMultiStepLR",
    "WarmupCosineLR",
    "WarmupStepWithFixedGammaLR",
)


@dataclass(frozen=True)
class Rule:
    """What one key may hold.

    Attributes:
        key: in the config.
        holds: whether a value is allowed.
        allowed: what is, in words.
    """

    key: str
    holds: Callable[[Any], bool]
    allowed: str


def _whole(key: str, least: int, meaning: str = "") -> Rule:
    def holds(value: Any) -> bool:
        # True is an int to Python.
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return Rule(key, holds, f"a whole number, {least}{meaning} or more")


def _number(key: str, fits: Callable[[float], bool], allowed: str) -> Rule:
    def holds(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value) and fits(value)

    return Rule(key, holds, f"a number {allowed}")


def _word(key: str, words: tuple[str, ...]) -> Rule:
    return Rule(key, lambda value: value in words, f"one of {', '.join(words)}")


_RULES = (
    _word("SOLVER.SCALING", SCALINGS),
    _whole("SOLVER.IMS_PER_BATCH", 1),
    _whole("SOLVER.IMS_PER_MICRO_BATCH", 0, " (as SOLVER.SCALING has it)"),
    _whole("SOLVER.REFERENCE_WORLD_SIZE", 0, " (for any number of processes)"),
    _whole("SOLVER.MAX_ITER", 1),
    _number("SOLVER.BASE_LR", lambda rate: rate > 0, "above 0"),
    _number("SOLVER.LR_PER_IMAGE", lambda rate: rate > 0, "above 0"),
    _number("SOLVER.MOMENTUM", lambda momentum: 0 <= momentum < 1, "from 0 to below 1"),
    _number("SOLVER.WEIGHT_DECAY", lambda decay: decay >= 0, "from 0 on"),
    _word("SOLVER.LR_SCHEDULER_NAME", (MULTI_STEP, COSINE, FIXED_GAMMA)),
    _number("SOLVER.GAMMA", lambda gamma: 0 < gamma <= 1, "above 0 and up to 1"),
    _whole("SOLVER.NUM_DECAYS", 1),
    _whole("SOLVER.WARMUP_ITERS", 0, " (for no warm-up)"),
    _number("SOLVER.WARMUP_FACTOR", lambda factor: 0 <= factor <= 1, "from 0 to 1"),
    _word("SOLVER.WARMUP_METHOD", ("linear", "constant")),
    _whole("SOLVER.CHECKPOINT_PERIOD", 1),
    _whole("SOLVER.KEEP_LAST", 0, " (for all)"),
    _whole("SOLVER.SKIP_BAD_UPDATES", 0),
    _word("SOLVER.AMP.PRECISION", PRECISIONS),
    _number("SOLVER.EMA.DECAY", lambda decay: 0 < decay < 1, "between 0 and 1"),
    _whole("TEST.EVAL_PERIOD", 0, " (for the end alone)"),
    _whole("TEST.BEST.PATIENCE", 0, " (for never)"),
)


def check_solver(cfg: CfgNode) -> None:
    """Refuse values that cannot be meant, or of which Detectron2 would make something else.

    Whether the batch can be shared by the processes, and whether the learning rate fits it, is
    checked in `resnext_det.engine.schedule`.

    Args:
        cfg: with the keys of `resnext_det.add_resnext_config`.

    Raises:
        ConfigError: it names the key, its value and what is allowed.
    """
    for rule in _RULES:
        value: Any = cfg
        for name in rule.key.split("."):
            value = value[name]
        if not rule.holds(value):
            raise ConfigError(f"{rule.key} is {value!r}; it must be {rule.allowed}.")
    _check_iterations(cfg)
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == COSINE and not 0 <= solver.BASE_LR_END <= solver.BASE_LR:
        raise ConfigError(
            f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}; it must be from 0 to SOLVER.BASE_LR, "
            f"{solver.BASE_LR}."
        )
    on_cpu = str(cfg.MODEL.DEVICE).startswith("cpu")
    if solver.AMP.ENABLED and solver.AMP.PRECISION == "float16" and on_cpu:
        raise ConfigError(
            f"SOLVER.AMP.PRECISION float16 needs a GPU, and MODEL.DEVICE is {cfg.MODEL.DEVICE}. "
            "Set SOLVER.AMP.PRECISION bfloat16, or SOLVER.AMP.ENABLED False."
        )


def _check_iterations(cfg: CfgNode) -> None:
    """Refuse decays and a warm-up that do not lie within the training, one after the other."""
    solver = cfg.SOLVER
    end, warmup = solver.MAX_ITER, solver.WARMUP_ITERS
    if warmup >= end:
        raise ConfigError(
            f"SOLVER.WARMUP_ITERS is {warmup}; it must be below SOLVER.MAX_ITER, {end}. Set it to "
            "fewer iterations, or to 0 for no warm-up."
        )
    if solver.LR_SCHEDULER_NAME == MULTI_STEP:
        _check_steps(solver.STEPS, end)
    points = decay_points(cfg)
    if points and points[0][0] <= warmup:
        key = "STEPS" if solver.LR_SCHEDULER_NAME == MULTI_STEP else "NUM_DECAYS"
        raise ConfigError(
            f"SOLVER.{key} {solver[key]!r} lets the learning rate fall at iteration "
            f"{points[0][0]}, before the warm-up of SOLVER.WARMUP_ITERS {warmup} is over: it would "
            f"never reach SOLVER.BASE_LR. Set SOLVER.WARMUP_ITERS below {points[0][0]}, or a later "
            "decay."
        )


def _check_steps(steps: Any, end: int) -> None:
    whole = isinstance(steps, tuple | list) and all(type(step) is int for step in steps)
    if not whole or any(step < 1 for step in steps):
        raise ConfigError(
            f"SOLVER.STEPS is {steps!r}; it must be iterations, whole numbers from 1 on, such as "
            "(60000, 80000), or () for no decay."
        )
    if any(later <= step for step, later in itertools.pairwise(steps)):
        raise ConfigError(f"SOLVER.STEPS is {steps!r}; each must be greater than the one before.")
    if steps and steps[-1] >= end:
        raise ConfigError(
            f"SOLVER.STEPS {steps!r} goes beyond the last iteration: SOLVER.MAX_ITER is {end}. Set "
            f"steps below {end}, or () for no decay."
        )


def decay_points(cfg: CfgNode) -> tuple[tuple[int, float], ...]:
    """Return where the learning rate falls by SOLVER.GAMMA.

    Args:
        cfg: with a SOLVER that `check_solver` lets through.

    Returns:
        (the first iteration, from 0, with the new rate; the rate), none for WarmupCosineLR. As
        Detectron2 compares with a tolerance of a millionth of SOLVER.MAX_ITER, its rate can fall
        one iteration earlier in a training of more than a million, or between two of them.
    """
    solver = cfg.SOLVER
    end = solver.MAX_ITER
    if solver.LR_SCHEDULER_NAME == COSINE:
        return ()
    if solver.LR_SCHEDULER_NAME == FIXED_GAMMA:
        parts = solver.NUM_DECAYS + 1
        steps = [end * number / parts for number in range(1, parts)]
    else:
        steps = list(solver.STEPS)
    if solver.RESCALE_INTERVAL:  # the schedule is squeezed into what the warm-up leaves
        warmup = solver.WARMUP_ITERS
        steps = [warmup + step * (end - warmup) / end for step in steps]
    return tuple(
        (math.ceil(step), solver.BASE_LR * solver.GAMMA**number)
        for number, step in enumerate(steps, start=1)
    )
