"""SOLVER: which values are refused, what a short training shortens, and when the rate falls."""

from __future__ import annotations

import itertools
import math

from detectron2.config import CfgNode

from resnext_det.config_rules import (
    COSINE,
    FIXED_GAMMA,
    MULTI_STEP,
    RULES,
    refuse,
    value_of,
    wrong,
)


def check_solver(cfg: CfgNode) -> None:
    """Refuse values that cannot be meant, or of which Detectron2 would make something else.

    Whether the batch can be shared by the processes is checked in `resnext_det.engine.schedule`.

    Args:
        cfg: with the keys of `resnext_det.add_resnext_config`.

    Raises:
        ConfigError: it names every such key, its value and what is allowed.
    """
    keys = [key for key in RULES if key.startswith(("SOLVER.", "TEST."))]
    refuse(*(wrong(key, value_of(cfg, key)) for key in keys))
    solver = cfg.SOLVER
    end_rate = None
    if solver.LR_SCHEDULER_NAME == COSINE and not 0 <= solver.BASE_LR_END <= solver.BASE_LR:
        end_rate = (
            f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}; it must be from 0 to SOLVER.BASE_LR, "
            f"{solver.BASE_LR}."
        )
    half = None
    on_cpu = str(cfg.MODEL.DEVICE).startswith("cpu")
    if solver.AMP.ENABLED and solver.AMP.PRECISION == "float16" and on_cpu:
        half = (
            f"SOLVER.AMP.PRECISION float16 needs a GPU, and MODEL.DEVICE is {cfg.MODEL.DEVICE}. "
            "Set SOLVER.AMP.PRECISION bfloat16, or SOLVER.AMP.ENABLED False."
        )
    refuse(_wrong_steps(cfg), end_rate, half)


def _wrong_steps(cfg: CfgNode) -> str | None:
    """Return what is wrong with the order of steps and warm-up, or None."""
    solver = cfg.SOLVER
    steps = solver.STEPS
    if solver.LR_SCHEDULER_NAME == MULTI_STEP and any(b <= a for a, b in itertools.pairwise(steps)):
        return f"SOLVER.STEPS is {steps!r}; each must be greater than the one before."
    return None


def shorten(cfg: CfgNode) -> tuple[CfgNode, list[str]]:
    """Make the schedule of a long training fit a short one: SOLVER.MAX_ITER is what counts.

    Steps beyond the end are dropped, as Detectron2 does. A warm-up that would not be over when the
    learning rate first falls, or at the end, takes half of that time.

    Args:
        cfg: with a SOLVER that `check_solver` lets through; it is not changed.

    Returns:
        The config, a frozen copy where something was shortened, and a warning for each change.
    """
    fitted = cfg.clone()
    fitted.defrost()
    solver, warnings = fitted.SOLVER, []
    end = solver.MAX_ITER
    if solver.LR_SCHEDULER_NAME == MULTI_STEP and any(step >= end for step in solver.STEPS):
        solver.STEPS = tuple(step for step in solver.STEPS if step < end)
        warnings.append(
            f"SOLVER.STEPS {tuple(cfg.SOLVER.STEPS)} is shortened to {solver.STEPS}, as the "
            f"training ends at SOLVER.MAX_ITER {end}."
        )
    first = end
    if not solver.RESCALE_INTERVAL:  # else the decays follow the warm-up, however long it is
        first = min((iteration for iteration, _ in decay_points(fitted)), default=end)
    if first <= solver.WARMUP_ITERS:
        warmup = solver.WARMUP_ITERS = first // 2
        when = f"ends at SOLVER.MAX_ITER {end}" if first >= end else f"decays at iteration {first}"
        warnings.append(
            f"SOLVER.WARMUP_ITERS {cfg.SOLVER.WARMUP_ITERS} is shortened to {warmup}: the learning "
            f"rate {when}, and would never reach SOLVER.BASE_LR."
        )
    if not warnings:
        return cfg, []
    fitted.freeze()
    return fitted, warnings


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
