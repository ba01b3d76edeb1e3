from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase, TrainerBase
from torch import Tensor, nn

from resnext_det.engine.evaluation_hook import Evaluation, Goal, validation_losses
from resnext_det.engine.stopping import Stop


class Counting(TrainerBase):
    """A training that only counts."""

    def __init__(self, *hooks: HookBase, start: int = 0, end: int = 12) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1)
        self.start_iter, self.max_iter = start, end
        self.register_hooks(hooks)

    def run_step(self) -> None:
        pass

    def go(self) -> None:
        self.train(self.start_iter, self.max_iter)


class EndAfter(HookBase):
    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise Stop("killed")


def evaluation(
    values: dict[int, float], period: int = 3, goal: Goal = Goal(), **training: int
) -> tuple[Counting, Evaluation, list[int], list[int]]:
    """A training whose AP is known beforehand, and when it was evaluated and found best."""
    evaluated: list[int] = []
    saved: list[int] = []

    def evaluate() -> dict[str, Any]:
        evaluated.append(trainer.iter)
        return {"bbox": {"AP": values[trainer.iter]}}

    hook = Evaluation(evaluate, period, goal, lambda: saved.append(trainer.iter))
    trainer = Counting(hook, **training)
    return trainer, hook, evaluated, saved


def test_it_evaluates_every_so_often_and_at_the_end() -> None:
    trainer, hook, evaluated, saved = evaluation({2: 1, 5: 3, 8: 2, 10: 4}, end=11)
    trainer.go()
    assert evaluated == [2, 5, 8, 10]
    assert saved == [2, 5, 10]
    assert (hook.best, hook.best_iteration) == (4, 10)
    assert trainer.storage.history("bbox/AP").values() == [(1, 2), (3, 5), (2, 8), (4, 10)]


def test_the_end_alone() -> None:
    trainer, _, evaluated, _ = evaluation({6: 1}, period=0, end=7)
    trainer.go()
    assert evaluated == [6]


@pytest.mark.parametrize(
    ("values", "end", "best"),
    [
        ({2: 5, 5: 4, 8: 4, 11: 4}, 8, 5),
        ({2: 5, 5: 4, 8: 6, 11: 6, 14: 5}, 14, 6),  # as good is not better
        ({2: 5, 5: math.nan, 8: math.nan}, 8, 5),
        ({2: math.nan, 5: 1, 8: 0, 11: 0}, 11, 1),
    ],
)
def test_patience(values: dict[int, float], end: int, best: float) -> None:
    trainer, hook, _, _ = evaluation(values, goal=Goal(patience=2), end=100)
    with pytest.raises(Stop, match=r"TEST\.BEST\.PATIENCE"):
        trainer.go()
    assert (trainer.iter, hook.best) == (end, best)


def test_patience_and_best_survive_a_resume() -> None:
    values = {2: 5.0, 5: 4.0, 8: 4.5, 11: 4.0}
    straight, hook, _, _ = evaluation(values, goal=Goal(patience=3), end=100)
    with pytest.raises(Stop):
        straight.go()
    first, before, _, _ = evaluation(values, goal=Goal(patience=3), end=100)
    first.register_hooks([EndAfter(6)])
    with pytest.raises(Stop, match="killed"):
        first.go()
    second, after, evaluated, _ = evaluation(values, goal=Goal(patience=3), start=7, end=100)
    after.load_state_dict(before.state_dict())
    with pytest.raises(Stop):
        second.go()
    assert evaluated == [8, 11]
    assert (second.iter, after.state_dict()) == (straight.iter, hook.state_dict())


def test_what_a_killed_training_did_not_evaluate_is_made_up_for() -> None:
    """Checkpoints come before evaluations: one of iteration 5 knows of the evaluation at 2."""
    trainer, hook, evaluated, saved = evaluation({5: 3, 8: 2}, start=6, end=9)
    hook.load_state_dict({"last": 2, "best": 1.0, "best_iteration": 2, "waited": 0})
    trainer.go()
    assert evaluated == [5, 8] and saved == [5]
    again, hook, evaluated, _ = evaluation({8: 2}, start=6, end=9)
    hook.load_state_dict({"last": 5, "best": 3.0, "best_iteration": 5, "waited": 0})
    again.go()
    assert evaluated == [8]


def test_a_training_that_is_over_is_only_evaluated() -> None:
    trainer, _, evaluated, _ = evaluation({8: 2}, start=9, end=9)
    trainer.go()
    assert evaluated == [8]


@pytest.mark.parametrize(("metric", "best"), [("bbox/loss", 1.0), ("bbox/AP", 3.0)])
def test_less_is_better_for_losses(metric: str, best: float) -> None:
    values = iter([2.0, 1.0, 3.0])
    hook = Evaluation(
        lambda: {"bbox": {metric.partition("/")[2]: next(values)}}, 1, Goal(metric), lambda: None
    )
    Counting(hook, end=3).go()
    assert hook.best == best


@pytest.mark.parametrize("metric", ["", "segm/AP"])
def test_a_training_does_not_die_of_a_metric(metric: str, caplog: pytest.LogCaptureFixture) -> None:
    trainer, hook, evaluated, saved = evaluation({2: 1, 5: 1}, goal=Goal(metric), end=6)
    with caplog.at_level(logging.WARNING):
        trainer.go()
    assert evaluated == [2, 5] and not saved and hook.best is None
    assert ("segm/AP" in caplog.text) == bool(metric)


class Detector(nn.Module):
    """One loss, the mean of its images, and a batch norm that would learn."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert self.training
        images = torch.stack([each["image"] for each in batch])
        return {"loss_a": self.norm(images).mean(), "loss_b": images.mean() * 2}


@pytest.mark.parametrize("training", [True, False])
def test_validation_losses_are_means_over_images_and_teach_nothing(training: bool) -> None:
    model = Detector().train(training)
    images = torch.rand(5, 1, 4, 4)
    batches = [[{"image": image} for image in part] for part in (images[:4], images[4:])]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = validation_losses(model, batches)
    assert found["loss_b"] == pytest.approx(float(images.mean() * 2))
    assert found["total_loss"] == pytest.approx(found["loss_a"] + found["loss_b"])
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training is training and model.norm.training is training


def test_no_images_have_no_losses() -> None:
    assert validation_losses(Detector(), []) == {}
