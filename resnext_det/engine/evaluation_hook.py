"""Evaluations during a training: when, of what, which was the best, and when to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn

from resnext_det.engine.stopping import Stop

logger = logging.getLogger(__name__)

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """What a training is judged by.

    Attributes:
        metric: such as "bbox/AP"; higher is better, except for losses. "" for none.
        patience: evaluations without a better value after which the training ends; 0 for never.
    """

    metric: str = "bbox/AP"
    patience: int = 0

    def better(self, value: float, than: float | None) -> bool:
        """Tell whether a value is better than the best one so far; NaN never is."""
        if value != value:
            return False
        if than is None:
            return True
        return value < than if "loss" in self.metric else value > than


class Evaluation(HookBase):
    """Evaluates every so often and at the end, keeps the best, and ends a training that is done.

    Comes after the checkpoints: a crash in an evaluation loses nothing. A training that was killed
    during an evaluation repeats it when it is resumed.
    """

    def __init__(
        self,
        evaluate: Callable[[], Results],
        period: int,
        goal: Goal,
        save_best: Callable[[], None],
        results_needed: bool = False,
    ) -> None:
        """Prepare.

        Args:
            evaluate: gives results such as {"bbox": {"AP": 37.0}}; called in all processes.
            period: iterations from one evaluation to the next; 0 for the end alone.
            goal: what is the best, and when to end.
            save_best: called in all processes when there is a new best.
            results_needed: at the end of a training, one that was at its end already included.
        """
        self._evaluate = evaluate
        self._period = period
        self._goal = goal
        self._save_best = save_best
        self._results_needed = results_needed
        self.last = -1  # iteration of the last evaluation
        self.best: float | None = None
        self.best_iteration = -1
        self.waited = 0  # evaluations since the best
        self.results: Results = {}

    def before_train(self) -> None:
        """Do the evaluation that a killed training did not come to."""
        done = self.trainer.start_iter - 1
        again = self._results_needed and done + 1 == self.trainer.max_iter
        if done >= 0 and self._due(done) and (self.last < done or again):
            self.trainer.iter = self.trainer.storage.iter = done
            logger.info("evaluating iteration %d, as the training was ended before that", done)
            self._evaluate_now(done)
        self._end_if_waited_enough()

    def after_step(self) -> None:
        """Evaluate where it is time."""
        if self._due(self.trainer.iter):
            self._evaluate_now(self.trainer.iter)
            self._end_if_waited_enough()

    def _due(self, iteration: int) -> bool:
        number = iteration + 1
        return number == self.trainer.max_iter or (self._period > 0 and number % self._period == 0)

    def _evaluate_now(self, iteration: int) -> None:
        model: nn.Module = self.trainer.model  # type: ignore[attr-defined]  # of every trainer
        training = model.training
        try:
            self.results = self._evaluate()
        finally:
            model.train(training)
        # Shared, as the main process alone has results: all must stop at the same iteration.
        flat: dict[str, float] = comm.all_gather(flatten_results_dict(self.results))[0]
        self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
        self.last = iteration
        comm.synchronize()
        if self._goal.metric and flat:
            self._compare(flat, iteration)

    def _compare(self, flat: Mapping[str, float], iteration: int) -> None:
        value = flat.get(self._goal.metric)
        if value is None:  # no reason to end a training, hours after it began
            logger.warning(
                "TEST.BEST.METRIC is %r, and an evaluation gives %s: there will be no best "
                "checkpoint, and no early end. Name one of these, or '' for none.",
                self._goal.metric,
                ", ".join(sorted(flat)),
            )
            return
        if not self._goal.better(value, self.best):
            self.waited += 1
            return
        self.best, self.best_iteration, self.waited = value, iteration, 0
        self._save_best()

    def _end_if_waited_enough(self) -> None:
        patience = self._goal.patience
        if patience and self.waited >= patience and self.trainer.iter + 1 < self.trainer.max_iter:
            raise Stop(
                f"{self._goal.metric} was not better than {self.best:.3f} (iteration "
                f"{self.best_iteration}) in {self.waited} evaluations (TEST.BEST.PATIENCE)"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training must know."""
        return {
            "metric": self._goal.metric,
            "last": self.last,
            "best": self.best,
            "best_iteration": self.best_iteration,
            "waited": self.waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the best of another metric is forgotten."""
        self.last = state["last"]
        metric = state.get("metric", self._goal.metric)
        if metric != self._goal.metric:
            logger.warning(
                "TEST.BEST.METRIC was %r and is %r: the best checkpoint so far is forgotten.",
                metric,
                self._goal.metric,
            )
            return
        self.best = state["best"]
        self.best_iteration, self.waited = state["best_iteration"], state["waited"]


@torch.no_grad()
def validation_losses(model: nn.Module, batches: Any) -> dict[str, float]:
    """Return the mean losses of a detector on images that it is not trained on.

    The detector is put into training mode, since only then it computes losses; batch norms are
    kept from learning by evaluating them.

    Args:
        model: a Detectron2 detector, left in the mode it was in.
        batches: of records with annotations, the share of this process.

    Returns:
        The losses by name and "total_loss", averaged over the images of all processes.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    sums: dict[str, float] = {}
    images = 0
    for batch in batches:
        for name, loss in model(batch).items():
            sums[name] = sums.get(name, 0.0) + float(loss) * len(batch)
        images += len(batch)
    for module, mode in modes.items():
        module.training = mode
    shares = comm.all_gather((sums, images))
    total = sum(count for _, count in shares)
    if total == 0:
        return {}
    names = {name for part, _ in shares for name in part}
    means = {name: sum(part.get(name, 0.0) for part, _ in shares) / total for name in sorted(names)}
    return {**means, "total_loss": sum(means.values())}
