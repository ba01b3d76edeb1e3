"""Refusals, one by one; and decays, against the learning rates that Detectron2 computes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler

from resnext_det import model_zoo
from resnext_det.engine.solver import check_solver, decay_points, shorten
from resnext_det.errors import ConfigError

BASE = model_zoo.get_config("faster_rcnn_X_50_32x4d_FPN_1x")
NAN, INFINITY = float("nan"), float("inf")


def config(**values: Any) -> CfgNode:
    """Return a config with these values, of whatever type; dots are double underscores."""
    cfg = BASE.clone()
    cfg.defrost()
    for key, value in values.items():
        node = cfg
        *path, name = key.split("__")
        for part in path:
            node = node[part]
        node[name] = value
    return cfg


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("SOLVER__SCALING", ["", "Linear", None], ["accumulate", "linear", "none"]),
        ("SOLVER__IMS_PER_BATCH", [0, -16, 16.0, True, "16"], [1, 128]),
        ("SOLVER__IMS_PER_MICRO_BATCH", [-1, 0.5], [0, 1]),
        ("SOLVER__REFERENCE_WORLD_SIZE", [-8, 8.0], [0, 8]),
        ("SOLVER__MAX_ITER", [0, -1, 90_000.0, NAN], [80_001]),
        ("SOLVER__BASE_LR", [0, 0.0, -0.02, NAN, INFINITY, "0.02", True], [0.02, 1]),
        ("SOLVER__LR_PER_IMAGE", [0.0, -1.0, NAN], [0.005]),
        ("SOLVER__MOMENTUM", [-0.1, 1.0, 1, NAN], [0, 0.0, 0.999]),
        ("SOLVER__WEIGHT_DECAY", [-0.0001, NAN], [0.0, 0.1]),
        ("SOLVER__LR_SCHEDULER_NAME", ["MultiStepLR", ""], ["WarmupMultiStepLR"]),
        ("SOLVER__GAMMA", [0.0, -0.1, 1.1, NAN], [1.0, 0.5]),
        ("SOLVER__NUM_DECAYS", [0], [1]),
        ("SOLVER__WARMUP_ITERS", [-1, 1000.0], [0, 59_999, 60_000, 90_000]),
        ("SOLVER__WARMUP_FACTOR", [-0.1, 1.1, NAN], [0.0, 1.0]),
        ("SOLVER__WARMUP_METHOD", ["burnin"], ["constant", "linear"]),
        ("SOLVER__CHECKPOINT_PERIOD", [0, -1, 2.5], [1]),
        ("SOLVER__KEEP_LAST", [-1], [0]),
        ("SOLVER__SKIP_BAD_UPDATES", [-1], [0]),
        ("SOLVER__AMP__PRECISION", ["float32", "fp16"], ["float16", "bfloat16"]),
        ("SOLVER__EMA__DECAY", [0.0, 1.0, -1, NAN], [0.5]),
        ("TEST__EVAL_PERIOD", [-1, 0.5], [0, 1]),
        ("TEST__BEST__PATIENCE", [-1], [0]),
        (
            "SOLVER__STEPS",
            [
                *[60_000, (60_000.0,), ("60000",), (True,), (0,), (-1,)],
                *[(80_000, 60_000), (60_000, 60_000)],
            ],
            [(), (89_999,), [1001, 1002], (60_000, 90_000), (90_001,), (1000,)],
        ),
    ],
)
def test_a_wrong_value_is_named(key: str, wrong: list[Any], right: list[Any]) -> None:
    name = key.replace("__", ".")
    for value in wrong:
        with pytest.raises(ConfigError, match=name) as refused:
            check_solver(config(**{key: value}))
        assert repr(value) in str(refused.value)
    for value in right:
        check_solver(config(**{key: value}))


def test_a_cosine_has_an_end_and_no_steps() -> None:
    cosine = {"SOLVER__LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER__STEPS": (100_000,)}
    for end in (-0.001, 0.03, NAN):
        with pytest.raises(ConfigError, match="BASE_LR_END"):
            check_solver(config(**cosine, SOLVER__BASE_LR_END=end))
    for end in (0.0, 0.02):
        cfg = config(**cosine, SOLVER__BASE_LR_END=end)
        check_solver(cfg)
        assert decay_points(cfg) == ()
    check_solver(config(SOLVER__BASE_LR_END=0.03))  # which only a cosine reads


def test_float16_needs_a_gpu() -> None:
    float16 = {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__PRECISION": "float16"}
    with pytest.raises(ConfigError, match=r"float16 needs a GPU.*cpu.*bfloat16"):
        check_solver(config(**float16, MODEL__DEVICE="cpu"))
    check_solver(config(**float16, MODEL__DEVICE="cuda"))
    bfloat16 = {**float16, "SOLVER__AMP__PRECISION": "bfloat16"}
    check_solver(config(**bfloat16, MODEL__DEVICE="cpu"))
    check_solver(config(SOLVER__AMP__ENABLED=False, MODEL__DEVICE="cpu"))


def multipliers(cfg: CfgNode) -> list[float]:
    """Return the learning rate of every iteration, as Detectron2's scheduler sets it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for iteration in range(cfg.SOLVER.MAX_ITER):
        scheduler.last_epoch = iteration
        found += scheduler.get_lr()
    return found


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupStepWithFixedGammaLR"])
def test_decays_are_where_detectron2_lets_the_rate_fall(name: str, rescaled: bool) -> None:
    """Of random solvers, those that are not refused: each reaches BASE_LR, and falls as said."""
    choose = random.Random(1)
    accepted = 0
    for _ in range(60):
        end = choose.randint(1, 60)
        steps = [choose.randint(1, end) for _ in range(choose.randint(0, 3))]
        cfg = config(
            SOLVER__LR_SCHEDULER_NAME=name,
            SOLVER__MAX_ITER=end,
            SOLVER__STEPS=tuple(sorted(steps)),
            SOLVER__NUM_DECAYS=choose.randint(1, 3),
            SOLVER__WARMUP_ITERS=choose.randint(0, end // 3),
            SOLVER__GAMMA=0.5,
            SOLVER__RESCALE_INTERVAL=rescaled,
        )
        try:
            check_solver(cfg)
        except ConfigError:
            continue
        accepted += 1
        cfg, _ = shorten(cfg)
        found, warmup = multipliers(cfg), cfg.SOLVER.WARMUP_ITERS
        expected = [0.02] * end
        for iteration, rate in decay_points(cfg):
            expected[iteration:] = [rate] * (end - iteration)
        assert found[warmup:] == pytest.approx(expected[warmup:])
        assert found[warmup] == pytest.approx(0.02)
    assert accepted > 15
