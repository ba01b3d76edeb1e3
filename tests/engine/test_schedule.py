"""What a config becomes on other numbers of processes, by brute force and by Detectron2's rule."""

from __future__ import annotations

import re
from typing import Any

import detectron2.model_zoo
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.solver import build_lr_scheduler

from resnext_det import load_config, model_zoo
from resnext_det.engine.plan import Change, Plan
from resnext_det.engine.schedule import SCHEDULES, Schedule, scale
from resnext_det.errors import ConfigError

PAPER = "faster_rcnn_X_50_32x4d_FPN_paper"
TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
SHORT = ["SOLVER.MAX_ITER", "90", "SOLVER.STEPS", "(40,60)", "SOLVER.WARMUP_ITERS", "10"]
COCO_IMAGES = 118_287  # of train2017, which are those of train2014 and valminusminival


def config(*words: object) -> CfgNode:
    return load_config(PAPER, [str(word) for word in words])


def solver(cfg: CfgNode) -> tuple[Any, ...]:
    s = cfg.SOLVER
    return s.IMS_PER_BATCH, s.REFERENCE_WORLD_SIZE, s.BASE_LR, s.STEPS, s.MAX_ITER


def warmup(cfg: CfgNode) -> tuple[int, float]:
    return cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR


def written(schedule: Schedule) -> tuple[Any, ...]:
    s = schedule
    return s.images, s.processes, s.base_lr, s.steps, s.max_iter


def rates(cfg: CfgNode) -> list[float]:
    """Return the learning rate of every iteration."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def trained_on(plan: Plan, updates: int) -> list[list[int]]:
    """Hand out images one micro-batch after the other, and return those of each update."""
    following, found = 0, []
    for _ in range(updates):
        update: list[int] = []
        for _process in range(plan.processes):
            for _micro_batch in range(plan.micro_batches):
                batch = range(following, following + plan.images_per_micro_batch)
                following = batch.stop
                update += batch
        found.append(update)
    return found


@pytest.mark.parametrize("name", [name for name in model_zoo.names() if name != TOY])
def test_a_config_has_the_schedule_of_its_name(name: str) -> None:
    cfg, schedule = model_zoo.get_config(name), SCHEDULES[name.rpartition("_")[2]]
    assert solver(cfg) == written(schedule)
    assert warmup(cfg) == (schedule.warmup_iters, schedule.warmup_factor)
    assert (cfg.SOLVER.GAMMA, cfg.SOLVER.MOMENTUM) == (0.1, 0.9)
    assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR"


def test_every_schedule_has_a_config_of_few_lines() -> None:
    names = {name.rpartition("_")[2] for name in model_zoo.names()}
    assert names == {*SCHEDULES, "toy"}
    for name in set(model_zoo.names()) - {TOY}:
        assert len(model_zoo.get_config_file(name).read_text().splitlines()) < 10


@pytest.mark.parametrize("name", ["1x", "3x"])
def test_detectrons_schedules_are_detectron2s(name: str) -> None:
    cfg = detectron2.model_zoo.get_config(f"COCO-Detection/faster_rcnn_R_50_FPN_{name}.yaml")
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8  # Detectron2 does not say, but in its README
    assert solver(cfg) == written(SCHEDULES[name])
    assert warmup(cfg) == (SCHEDULES[name].warmup_iters, SCHEDULES[name].warmup_factor)


def test_128_images_are_the_papers_schedule_by_the_linear_rule() -> None:
    """2 images on 64 GPUs are 128, too; but for the warm-up, which is longer."""
    rule = DefaultTrainer.auto_scale_workers(model_zoo.get_config(PAPER), 64)
    ours = model_zoo.get_config("faster_rcnn_X_50_32x4d_FPN_128")
    assert (solver(ours)[0], *solver(ours)[2:]) == (solver(rule)[0], *solver(rule)[2:])
    assert ours.SOLVER.CHECKPOINT_PERIOD == rule.SOLVER.CHECKPOINT_PERIOD
    _, plan = scale(ours, 8)
    assert plan.epochs(plan.warmup_iters, COCO_IMAGES) == pytest.approx(1.08, abs=0.005)


@pytest.mark.parametrize(("batch", "reference"), [(16, 8), (16, 0), (24, 8), (12, 4), (16, 3)])
def test_accumulation_changes_nothing_but_who_does_it(batch: int, reference: int) -> None:
    """On every number of processes: the same images in each update, at the same learning rate."""
    words = ["SOLVER.IMS_PER_BATCH", batch, "SOLVER.REFERENCE_WORLD_SIZE", reference]
    given = config(*SHORT, *words)
    expected_rates = rates(given)
    for processes in range(1, batch + 1):
        if batch % processes:
            with pytest.raises(ConfigError, match=f"cannot be shared by {processes} processes"):
                scale(given, processes)
            continue
        cfg, plan = scale(given, processes)
        assert plan.processes == processes
        updates = trained_on(plan, 3)
        assert updates == [list(range(n * batch, (n + 1) * batch)) for n in range(3)]
        assert plan.images_per_update == batch
        assert rates(cfg) == expected_rates
        # As large as memory allows, which is known to hold what a process of the reference had.
        share = batch // processes
        most = batch // (reference or processes)
        possible = [n for n in range(1, share + 1) if share % n == 0 and n <= most]
        assert plan.images_per_micro_batch == max(possible)
        assert plan.images_per_process == share
        assert plan.changes == ()


@pytest.mark.parametrize(
    ("processes", "images", "micro_batches"), [(1, 2, 8), (4, 2, 2), (8, 2, 1), (16, 1, 1)]
)
def test_the_papers_16_images(processes: int, images: int, micro_batches: int) -> None:
    _, plan = scale(model_zoo.get_config(PAPER), processes)
    assert (plan.images_per_micro_batch, plan.micro_batches) == (images, micro_batches)


def test_fewer_images_than_the_reference_had_processes() -> None:
    _, plan = scale(config("SOLVER.IMS_PER_BATCH", 4), 2)
    assert (plan.images_per_micro_batch, plan.micro_batches) == (1, 2)


@pytest.mark.parametrize("scaling", ["accumulate", "linear", "none"])
@pytest.mark.parametrize("processes", [1, 4, 8, 16])
def test_the_config_given_stays_and_the_new_one_is_not_scaled_again(
    scaling: str, processes: int
) -> None:
    given = config("SOLVER.SCALING", scaling)
    before = given.dump()
    cfg, _ = scale(given, processes)
    assert (given.dump(), given.is_frozen(), cfg.is_frozen()) == (before, True, True)
    assert cfg is not given
    for number in (1, 2, processes):
        assert DefaultTrainer.auto_scale_workers(cfg, number).dump() == cfg.dump()
    assert scale(cfg, processes)[0].dump() == cfg.dump()
    if scaling != "linear":  # but for the reference, all is as it was
        same = given.clone()
        same.defrost()
        same.SOLVER.REFERENCE_WORLD_SIZE = 0
        assert cfg.dump() == same.dump()


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7, 8, 16])
def test_linear_is_detectron2s_rule(processes: int) -> None:
    given = config("SOLVER.SCALING", "linear", "TEST.EVAL_PERIOD", 5000)
    cfg, plan = scale(given, processes)
    rule = DefaultTrainer.auto_scale_workers(given, processes).clone()
    rule.defrost()
    rule.SOLVER.REFERENCE_WORLD_SIZE = 0
    assert cfg.dump() == rule.dump()
    assert (plan.images_per_micro_batch, plan.micro_batches) == (2, 1)
    assert (plan.base_lr, plan.max_iter) == (rule.SOLVER.BASE_LR, rule.SOLVER.MAX_ITER)
    assert (plan.warmup_iters, plan.checkpoint_period, plan.eval_period) == (
        *(rule.SOLVER.WARMUP_ITERS, rule.SOLVER.CHECKPOINT_PERIOD, rule.TEST.EVAL_PERIOD),
    )
    assert plan.decays == ((rule.SOLVER.STEPS[0], pytest.approx(rule.SOLVER.BASE_LR / 10)),)
    # As many images in all, to half an iteration.
    seen = plan.max_iter * plan.images_per_update
    assert abs(seen - 180_000 * 16) <= plan.images_per_update / 2
    assert plan.warnings == ()
    if processes != 8:
        assert Change("SOLVER.IMS_PER_BATCH", 16, 2 * processes) in plan.changes
        assert len(plan.changes) == 7
        assert f"linear, from 8 to {processes} processes" in plan.describe()
    else:
        assert plan.changes == ()


def test_linear_has_the_learning_rates_of_the_reference_stretched() -> None:
    given = config(*SHORT, "SOLVER.SCALING", "linear")
    cfg, _ = scale(given, 4)
    assert rates(cfg)[::2] == pytest.approx([rate / 2 for rate in rates(given)])


def test_linear_without_a_reference_and_none_leave_all_as_it_is() -> None:
    for words in (["linear", "SOLVER.REFERENCE_WORLD_SIZE", 0], ["none"]):
        given = config("SOLVER.SCALING", *words)
        cfg, plan = scale(given, 2)
        assert solver(cfg) == (16, 0, 0.02, (120_000,), 180_000)
        assert (plan.images_per_micro_batch, plan.micro_batches, plan.changes) == (8, 1, ())
        with pytest.raises(ConfigError, match="shared by 3 processes"):
            scale(given, 3)


@pytest.mark.parametrize(
    ("scaling", "images", "processes", "micro_batches"),
    [("accumulate", 1, 2, 8), ("accumulate", 16, 1, 1), ("none", 4, 2, 2), ("linear", 1, 2, 2)],
)
def test_micro_batches_of_a_given_size(
    scaling: str, images: int, processes: int, micro_batches: int
) -> None:
    words = ["SOLVER.SCALING", scaling, "SOLVER.IMS_PER_MICRO_BATCH", images]
    _, plan = scale(config(*words), processes)
    assert (plan.images_per_micro_batch, plan.micro_batches) == (images, micro_batches)


@pytest.mark.parametrize(
    ("words", "processes", "said"),
    [
        ([], 3, "16 cannot be shared by 3 processes; it can by 1, 2, 4, 8, 16."),
        ([], 3, "SOLVER.SCALING linear"),
        ([], 32, "shared by 32"),
        ([], 0, "0 processes"),
        (["SOLVER.REFERENCE_WORLD_SIZE", 0], 3, "a multiple of 3"),
        (["SOLVER.IMS_PER_MICRO_BATCH", 3], 1, "SOLVER.IMS_PER_MICRO_BATCH 3 does not divide the"),
        (["SOLVER.IMS_PER_MICRO_BATCH", 4], 8, "the 2 images of a process (SOLVER.IMS_PER_BATCH"),
        (["SOLVER.SCALING", "cosine"], 1, "'cosine'; it must be one of accumulate, linear, none"),
        (["SOLVER.IMS_PER_BATCH", 0], 1, "SOLVER.IMS_PER_BATCH is 0"),
    ],
)
def test_what_cannot_be_shared_is_refused(words: list[Any], processes: int, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        scale(config(*words), processes)


@pytest.mark.parametrize(
    ("words", "processes", "said"),
    [
        (["SOLVER.IMS_PER_BATCH", 12], 4, "12 is no multiple of SOLVER.REFERENCE_WORLD_SIZE 8"),
        (["TEST.EVAL_PERIOD", 1], 64, "TEST.EVAL_PERIOD 1 becomes 0"),
        (["SOLVER.CHECKPOINT_PERIOD", 1], 64, "8 to 64 processes: SOLVER.CHECKPOINT_PERIOD is 0"),
        ([*SHORT, "SOLVER.STEPS", "(40,41)"], 64, "8 to 64 processes: SOLVER.STEPS is (5, 5)"),
    ],
)
def test_what_linear_scaling_would_break_is_refused(
    words: list[Any], processes: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        scale(config("SOLVER.SCALING", "linear", *words), processes)


@pytest.mark.parametrize("batch", [1, 3, 16, 35])  # 0.0875 / (0.00125 * 35) is below 2
def test_twice_the_linear_rule_is_warned_about(batch: int) -> None:
    words = ["SOLVER.IMS_PER_BATCH", batch, "SOLVER.REFERENCE_WORLD_SIZE", 0, "SOLVER.BASE_LR"]
    assert scale(config(*words, 0.0025 * batch * 0.999), 1)[1].warnings == ()
    for factor in (1, 1.001, 10):
        cfg = config(*words, round(0.0025 * batch * factor, 9))
        (warning,) = scale(cfg, 1)[1].warnings
        assert f"set SOLVER.BASE_LR {0.00125 * batch:g}." in warning
        assert f"is {2 * factor:.3g} times" in warning


@pytest.mark.parametrize("name", model_zoo.names())
def test_shipped_configs_pass(name: str) -> None:
    for processes in (1, 2, 8):
        cfg, plan = scale(model_zoo.get_config(name), processes)
        assert plan.warnings == ()
        assert plan.images_per_update == cfg.SOLVER.IMS_PER_BATCH


def test_the_toys_own_rule_is_needed() -> None:
    """Its learning rate is four times what COCO's rule gives for 8 images, as its comment says."""
    (warning,) = scale(load_config(TOY, ["SOLVER.LR_PER_IMAGE", "0.00125"]), 1)[1].warnings
    assert "4 times" in warning


@pytest.mark.parametrize("scaling", ["accumulate", "linear"])
@pytest.mark.parametrize("warmup", [50, 1000])
@pytest.mark.parametrize("end", [1, 2, 3, 10, 40, 600])
def test_a_short_trial_runs(end: int, warmup: int, scaling: str) -> None:
    """With nothing but SOLVER.MAX_ITER set: it reaches its learning rate before it ends."""
    given = config("SOLVER.MAX_ITER", end, "SOLVER.WARMUP_ITERS", warmup, "SOLVER.SCALING", scaling)
    cfg, plan = scale(given, 8)
    found = rates(cfg)
    assert len(found) == end
    assert found[plan.warmup_iters :] == pytest.approx([0.02] * (end - plan.warmup_iters))
    said = " ".join(plan.warnings)
    assert "SOLVER.STEPS (120000,) is shortened to ()" in said
    shortened = f"SOLVER.WARMUP_ITERS {warmup} is shortened to {end // 2}"
    assert (shortened in said) == (warmup >= end)
    assert warmup == given.SOLVER.WARMUP_ITERS


def test_a_warm_up_ends_before_the_first_decay() -> None:
    words = ["SOLVER.MAX_ITER", 100, "SOLVER.STEPS", "(20, 100, 200)", "SOLVER.WARMUP_ITERS", 20]
    cfg, plan = scale(config(*words), 8)
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == ((20,), 10)
    assert rates(cfg)[10:] == pytest.approx([0.02] * 10 + [0.002] * 80)
    assert any("decays at iteration 20" in warning for warning in plan.warnings)
    # One that follows the warm-up is as long as was asked for.
    cfg, _ = scale(config(*words, "SOLVER.RESCALE_INTERVAL", True), 8)
    assert cfg.SOLVER.WARMUP_ITERS == 20


def test_all_that_is_wrong_is_said_at_once() -> None:
    cfg = config().clone()
    cfg.defrost()
    cfg.SOLVER.GAMMA, cfg.SOLVER.BASE_LR, cfg.TEST.EVAL_PERIOD = 2.0, -1.0, -3
    with pytest.raises(ConfigError, match="3 settings are wrong") as refused:
        scale(cfg, 1)
    for part in ("SOLVER.GAMMA is 2.0", "SOLVER.BASE_LR is -1.0", "TEST.EVAL_PERIOD is -3"):
        assert part in str(refused.value)
