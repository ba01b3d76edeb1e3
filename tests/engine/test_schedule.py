"""Scaling, against Detectron2's rule and brute force; decays, against Detectron2's scheduler."""

from __future__ import annotations

import random
import re
from typing import Any

import detectron2.model_zoo
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.solver import build_lr_scheduler

from resnext_det import load_config, model_zoo
from resnext_det.config import recipe
from resnext_det.engine.schedule import Plan, _decays, check_solver, in_epochs, scale, shorten
from resnext_det.errors import ConfigError

PAPER = "faster_rcnn_X_50_32x4d_FPN_paper"
SHORT = ["SOLVER.MAX_ITER", 90, "SOLVER.STEPS", "(40,60)", "SOLVER.WARMUP_ITERS", 10]
COCO_IMAGES = 118_287  # of train2017

# Images per update, processes, learning rate, steps, iterations. "paper": arXiv 1611.05431v2,
# appendix B, its RPN step. "128": the same 2.88 million images by the linear rule (1706.02677).
SCHEDULES = {
    "paper": (16, 8, 0.02, (120_000,), 180_000),
    "1x": (16, 8, 0.02, (60_000, 80_000), 90_000),
    "3x": (16, 8, 0.02, (210_000, 250_000), 270_000),
    "128": (128, 8, 0.16, (15_000,), 22_500),
    "fast_rcnn": (8, 8, 0.005, (120_000,), 180_000),  # appendix B; its RPN is as "paper"
}


@pytest.mark.parametrize(
    ("recipe_name", "images", "expected"),
    [
        ("imagenet1k", 1_281_167, (500_455, 5005, 5005, 150_136, 300_273, 450_409)),
        ("cifar10", 50_000, (117_187, 3906, 391, 58_593, 87_890)),
    ],
)
def test_epochs_become_iterations(recipe_name: str, images: int, expected: tuple[Any, ...]) -> None:
    """Drops at 30, 60 and 90 of 100 epochs (section 4), and at 150 and 225 of 300 (appendix A)."""
    cfg = in_epochs(load_config(recipe(recipe_name)), images)
    found = cfg.SOLVER
    schedule = (found.MAX_ITER, found.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD, *found.STEPS)
    assert schedule == pytest.approx(expected, abs=2)
    epochs = [step * found.IMS_PER_BATCH / images for step in found.STEPS]
    assert epochs == pytest.approx([30, 60, 90] if len(epochs) == 3 else [150, 225], abs=0.01)
    assert in_epochs(cfg, images) == cfg  # of a resume


def test_a_period_is_an_epoch_or_more() -> None:
    words = ["SOLVER.MAX_EPOCHS", "2", "SOLVER.IMS_PER_BATCH", "50"]
    cfg = in_epochs(load_config(recipe("folder"), words), 1000)
    found = cfg.SOLVER
    assert (found.MAX_ITER, found.STEPS) == (40, (12, 24, 36))
    assert (found.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (20, 20)
    words = ["SOLVER.MAX_EPOCHS", "0", *words[2:]]
    cfg = load_config(recipe("folder"), words)
    assert in_epochs(cfg, 1000) is cfg


def config(*words: object) -> CfgNode:
    return load_config(PAPER, [str(word) for word in words])


def solver(cfg: CfgNode) -> tuple[Any, ...]:
    s = cfg.SOLVER
    return s.IMS_PER_BATCH, s.REFERENCE_WORLD_SIZE, s.BASE_LR, s.STEPS, s.MAX_ITER


def rates(cfg: CfgNode) -> list[float]:
    """Return the learning rate of every iteration, as set by Detectron2's scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", model_zoo.names())
def test_shipped_configs_have_the_schedule_in_their_name(name: str) -> None:
    cfg = model_zoo.get_config(name)
    for processes in (1, 2, 8):
        scaled, plan = scale(cfg, processes)
        assert plan.warnings == () and solver(scaled)[2:] == solver(cfg)[2:]
    if not name.endswith("_toy"):
        schedule = "fast_rcnn" if name.startswith("fast_rcnn") else name.rpartition("_")[2]
        assert solver(cfg) == SCHEDULES[schedule]
        assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR) == (1000, 0.001)
        assert (cfg.SOLVER.GAMMA, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY) == (0.1, 0.9, 1e-4)
        assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR"


@pytest.mark.parametrize("name", ["1x", "3x"])
def test_1x_and_3x_are_detectron2s(name: str) -> None:
    cfg = detectron2.model_zoo.get_config(f"COCO-Detection/faster_rcnn_R_50_FPN_{name}.yaml")
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    assert solver(cfg) == SCHEDULES[name]


@pytest.mark.parametrize(("batch", "reference"), [(16, 8), (16, 0), (24, 8), (12, 4), (4, 8)])
def test_accumulation_keeps_the_update(batch: int, reference: int) -> None:
    words = ["SOLVER.IMS_PER_BATCH", batch, "SOLVER.REFERENCE_WORLD_SIZE", reference]
    given = config(*SHORT, *words)
    for processes in range(1, batch + 1):
        cfg, plan = scale(given, processes)
        assert plan.micro_batches * plan.images_per_micro_batch == batch
        assert rates(cfg) == rates(given)
        # The largest size that fits in the memory of a process of the reference.
        most = min(batch // processes, max(1, batch // (reference or processes)))
        possible = [n for n in range(1, batch + 1) if batch % n == 0 and n <= most]
        assert plan.images_per_micro_batch == max(possible)
        alone = scale(given, 1)[1]
        assert plan.fixed == bool(reference and processes <= alone.micro_batches)
        if plan.fixed:
            assert (plan.micro_batches, plan.warnings) == (alone.micro_batches, alone.warnings)
        elif reference:
            assert (
                f"{processes} processes are more than the {alone.micro_batches} micro-batches"
                in plan.warnings[0]
            )
        # Scaling changes nothing else, and happens once.
        restored = cfg.clone()
        restored.defrost()
        restored.SOLVER.REFERENCE_WORLD_SIZE = reference
        assert restored.dump() == given.dump() and cfg.is_frozen()
        assert scale(cfg, processes)[0].dump() == cfg.dump()
        assert DefaultTrainer.auto_scale_workers(cfg, processes + 1).dump() == cfg.dump()


@pytest.mark.parametrize("processes", [1, 3, 4, 8, 16])
def test_linear_is_detectron2s_rule(processes: int) -> None:
    given = config("SOLVER.SCALING", "linear", "TEST.EVAL_PERIOD", 5000)
    cfg, plan = scale(given, processes)
    rule = DefaultTrainer.auto_scale_workers(given, processes).clone()
    rule.defrost()
    rule.SOLVER.REFERENCE_WORLD_SIZE = 0
    assert cfg.dump() == rule.dump()
    assert (plan.images_per_micro_batch, plan.micro_batches) == (2, processes)
    assert plan.warnings == () and not plan.fixed
    assert abs(cfg.SOLVER.MAX_ITER * processes * 2 - 180_000 * 16) <= processes
    described = plan.describe(COCO_IMAGES)
    assert f"linear, from 8 to {processes} processes" in described
    changed = f"SOLVER.IMS_PER_BATCH 16 -> {2 * processes}"
    assert (changed in described) == (processes != 8)


@pytest.mark.parametrize(
    ("words", "processes", "images", "shares", "fixed"),
    [
        (["none"], 2, 8, "1", False),
        (["none", "SOLVER.IMS_PER_MICRO_BATCH", 4], 3, 4, "1 or 2", True),
        (["linear", "SOLVER.REFERENCE_WORLD_SIZE", 0], 2, 8, "1", False),
        (["accumulate"], 3, 2, "2 or 3", True),
        (["accumulate", "SOLVER.IMS_PER_MICRO_BATCH", 1], 2, 1, "8", True),
        (["accumulate", "SOLVER.IMS_PER_MICRO_BATCH", 16], 1, 16, "1", True),
        (["linear", "SOLVER.IMS_PER_MICRO_BATCH", 1], 2, 1, "2", False),
    ],
)
def test_micro_batches(
    words: list[Any], processes: int, images: int, shares: str, fixed: bool
) -> None:
    _, plan = scale(config("SOLVER.SCALING", *words), processes)
    assert (plan.images_per_micro_batch, plan.fixed) == (images, fixed)
    assert f"{shares} on each of {processes} processes" in plan.describe(COCO_IMAGES)


@pytest.mark.parametrize(
    ("words", "processes", "message"),
    [
        ([], 32, "SOLVER.IMS_PER_BATCH 16 is too small for 32 processes"),
        (["SOLVER.IMS_PER_MICRO_BATCH", 8], 3, "SOLVER.IMS_PER_MICRO_BATCH 8 does not split"),
        ([], 0, "0 processes"),
        (["SOLVER.IMS_PER_MICRO_BATCH", 3], 1, "SOLVER.IMS_PER_MICRO_BATCH 3 does not split"),
        (["SOLVER.EXACT_SUM", True], 9, "a divisor of 16 up to 1, and SOLVER.SCALING accumulate"),
        (
            ["SOLVER.EXACT_SUM", True, "SOLVER.REFERENCE_WORLD_SIZE", 0],
            *(2, "SOLVER.EXACT_SUM needs micro-batches that do not depend"),
        ),
        (
            ["SOLVER.EXACT_SUM", True, "SOLVER.MICRO_BATCHES_PER_PASS", 4],
            *(1, "SOLVER.MICRO_BATCHES_PER_PASS is 4"),
        ),
        (["SOLVER.SCALING", "cosine"], 1, "'cosine'; it must be one of accumulate, linear, none"),
        (
            ["SOLVER.SCALING", "linear", "SOLVER.IMS_PER_BATCH", 12],
            *(4, "12 is not a multiple of SOLVER.REFERENCE_WORLD_SIZE 8"),
        ),
        (
            ["SOLVER.SCALING", "linear", "TEST.EVAL_PERIOD", 1],
            *(64, "TEST.EVAL_PERIOD 1 becomes 0"),
        ),
        (
            ["SOLVER.SCALING", "linear", *SHORT, "SOLVER.STEPS", "(40,41)"],
            *(64, "8 to 64 processes: SOLVER.STEPS is (5, 5)"),
        ),
    ],
)
def test_refuses_impossible_batches(words: list[Any], processes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        scale(config(*words), processes)


def test_an_exact_sum_is_not_exact_on_gpus() -> None:
    cpu, cuda = ({"SOLVER.EXACT_SUM": True, "MODEL.DEVICE": device} for device in ("cpu", "cuda"))
    assert scale(with_values(cpu), 3)[1].warnings == ()
    (warning,) = scale(with_values(cuda), 3)[1].warnings
    assert "no fixed order on a GPU" in warning


@pytest.mark.parametrize("batch", [1, 3, 35])
def test_warns_of_twice_the_linear_rule(batch: int) -> None:
    words = ["SOLVER.IMS_PER_BATCH", batch, "SOLVER.REFERENCE_WORLD_SIZE", 0, "SOLVER.BASE_LR"]
    assert scale(config(*words, 0.0025 * batch * 0.999), 1)[1].warnings == ()
    for factor in (1, 1.5, 10):
        (warning,) = scale(config(*words, round(0.0025 * batch * factor, 9)), 1)[1].warnings
        assert f"is {2 * factor:g} times" in warning
        assert f"set SOLVER.BASE_LR {0.00125 * batch:g}." in warning


def with_values(values: dict[str, Any]) -> CfgNode:
    cfg = config().clone()
    cfg.defrost()
    for key, value in values.items():
        section, *path, name = key.split(".")
        node = cfg[section]
        for part in path:
            node = node[part]
        node[name] = value
    return cfg


BRAIN = {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.PRECISION": "bfloat16"}
HALF = {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.PRECISION": "float16"}
COSINE = {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"SOLVER.BASE_LR": 1e-9}, {"SOLVER.BASE_LR": 0.0}),
        ({"SOLVER.GAMMA": 1.0}, {"SOLVER.GAMMA": float("nan")}),
        (COSINE, {"SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR"}),
        ({"SOLVER.MOMENTUM": 0.0}, {"SOLVER.MOMENTUM": 1.0}),
        ({"SOLVER.WARMUP_ITERS": 0}, {"SOLVER.WARMUP_ITERS": 1000.0}),
        ({"SOLVER.STEPS": ()}, {"SOLVER.STEPS": (80_000, 60_000)}),
        ({"SOLVER.STEPS": (60_000, 200_000)}, {"SOLVER.STEPS": (True,)}),
        ({"SOLVER.CHECKPOINT_PERIOD": 1}, {"SOLVER.CHECKPOINT_PERIOD": 0}),
        ({"SOLVER.KEEP_LAST": 0}, {"SOLVER.KEEP_LAST": -1}),
        ({"TEST.BEST.PATIENCE": 0}, {"TEST.BEST.PATIENCE": 0.5}),
        ({**COSINE, "SOLVER.BASE_LR_END": 0.02}, {**COSINE, "SOLVER.BASE_LR_END": 0.03}),
        ({"SOLVER.BASE_LR_END": 0.03}, {**COSINE, "SOLVER.BASE_LR_END": -0.1}),
        (
            {**BRAIN, "MODEL.RESNEXT.PRECISION": "fp32"},
            {**BRAIN, "MODEL.RESNEXT.PRECISION": "bf16"},
        ),
        ({**HALF, "MODEL.DEVICE": "cuda"}, {"MODEL.DEVICE": "cpu", **HALF}),
    ],
)
def test_refuses_wrong_values_by_name(right: dict[str, Any], wrong: dict[str, Any]) -> None:
    check_solver(with_values(right))
    with pytest.raises(ConfigError, match=list(wrong)[-1]):
        check_solver(with_values(wrong))


def test_refuses_all_wrong_values_at_once() -> None:
    cfg = with_values({"SOLVER.GAMMA": 2.0, "SOLVER.BASE_LR": -1.0, "TEST.EVAL_PERIOD": -3})
    with pytest.raises(ConfigError, match="3 settings are wrong") as refused:
        scale(cfg, 1)
    for part in ("SOLVER.GAMMA is 2.0", "SOLVER.BASE_LR is -1.0", "TEST.EVAL_PERIOD is -3"):
        assert part in str(refused.value)


@pytest.mark.parametrize("scaling", ["accumulate", "linear"])
@pytest.mark.parametrize(("end", "warmup"), [(1, 1000), (3, 50), (40, 50), (600, 1000), (600, 50)])
def test_a_short_training_reaches_its_learning_rate(end: int, warmup: int, scaling: str) -> None:
    given = config("SOLVER.MAX_ITER", end, "SOLVER.WARMUP_ITERS", warmup, "SOLVER.SCALING", scaling)
    cfg, plan = scale(given, 8)
    start = cfg.SOLVER.WARMUP_ITERS
    assert rates(cfg)[start:] == pytest.approx([0.02] * (end - start))
    said = " ".join(plan.warnings)
    assert "SOLVER.STEPS (120000,) is shortened to ()" in said
    assert (f"SOLVER.WARMUP_ITERS {warmup} is shortened to {end // 2}" in said) == (warmup >= end)


@pytest.mark.parametrize("rescaled", [False, True])
def test_decays_are_detectron2s(rescaled: bool) -> None:
    """Of random solvers: each reaches BASE_LR, and decays when the plan says so."""
    choose = random.Random(1)
    for _ in range(25):
        end = choose.randint(1, 60)
        cfg = with_values(
            {
                "SOLVER.MAX_ITER": end,
                "SOLVER.STEPS": tuple(sorted({choose.randint(1, end) for _ in range(3)})),
                "SOLVER.WARMUP_ITERS": choose.randint(0, end // 3),
                "SOLVER.GAMMA": 0.5,
                "SOLVER.RESCALE_INTERVAL": rescaled,
            }
        )
        check_solver(cfg)
        cfg, _ = shorten(cfg)
        expected = [0.02] * end
        for number, iteration in enumerate(_decays(cfg), start=1):
            expected[iteration:] = [0.02 / 2**number] * (end - iteration)
        warmup = cfg.SOLVER.WARMUP_ITERS
        assert rates(cfg)[warmup:] == pytest.approx(expected[warmup:])
        assert rates(cfg)[warmup] == pytest.approx(0.02)


def plan_of(*words: object) -> Plan:
    return scale(config(*words), 1)[1]


def test_describes_the_papers_plan() -> None:
    """24.35 epochs with a decay at 16.23: 16 of 118,287 images per iteration."""
    described = plan_of().describe(COCO_IMAGES)
    lines = {line[:20].strip(): line[20:] for line in described.splitlines()}
    assert lines["Images per update"].startswith("16 = 8 x 2 (micro-batches x images), 8 on each")
    assert lines["Images to train on"] == "118,287"
    assert lines["Warm-up"] == "from 2e-05, until iteration 1,000 (0.14 epochs)"
    assert lines["Decay"] == "to 0.002 at iteration 120,000 (16.23 epochs)"
    assert lines["End"] == "iteration 180,000 (24.35 epochs)"
    assert lines["Checkpoints"] == "every 5,000 iterations, of which the last 5 are kept"
    assert lines["Evaluations"] == "at the end, on coco_2014_minival"
    cosine = plan_of(*("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "DATASETS.TEST", "()"))
    described = cosine.describe(1000)
    assert "cosine, to 0 at the end" in described and "Evaluations         none" in described
