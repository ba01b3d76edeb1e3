"""The trainer's hooks besides Detectron2's: progress, evaluation and stopping on a signal."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

import torch
from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnext_det.console import SECONDS

logger = logging.getLogger(__name__)

# Exit code of a training that was stopped and can be resumed: EX_TEMPFAIL of sysexits.h.
STOPPED = 75
# Seconds within which a repeated signal counts as the first: `timeout` and some schedulers signal a
# process and then its group.
SAME_SIGNAL = 1.0

Item = TypeVar("Item")


class EarlyStop(BaseException):
    """Ends training before an iteration. Detectron2 logs a traceback for any `Exception`."""


class Interrupted(BaseException):
    """Raised in every process after one of them received a signal.

    Attributes:
        number: signal number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Records SIGTERM and SIGINT, for the training to stop when its state can be saved.

    Use the per-process instance `SIGNALS`.
    """

    def __init__(self) -> None:
        """Create an instance that handles no signals yet."""
        self.received = 0
        self._listening = False
        self._since = 0.0
        self._process = 0
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals; does nothing outside the main thread.

        An ignored signal stays ignored, such as SIGINT in a shell's background jobs. A second
        signal invokes the previous handler, or is left to the launcher if there is one.
        """
        self.received, self._process, self._listening = 0, os.getpid(), True
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            self._listening = False
            self._restore_handlers()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a freshly forked data loader worker
            return
        if self.received:
            if not is_started_by_another() and time.monotonic() - self._since > SAME_SIGNAL:
                self._restore_handlers()
                signal.raise_signal(number)
            return
        self.received, self._since = number, time.monotonic()
        logger.warning(
            "%s: saving after this iteration; a second signal stops at once and saves nothing",
            signal.Signals(number).name,
        )

    def _restore_handlers(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def agreed(self) -> int:
        """Return the signal received by any process, or 0.

        A collective call, skipped by processes that are not listening.
        """
        if not self._listening:
            return 0
        if comm.get_world_size() == 1:
            return self.received
        backend = torch.distributed.get_backend()
        flag = torch.tensor(self.received, device="cuda" if backend == "nccl" else "cpu")
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    def interrupting(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items such as the batches of an evaluation, until a signal arrives.

        Raises:
            Interrupted: in every process, after the last item, if one received a signal.
        """
        for item in items:
            if self._listening and self.received:
                break
            yield item
        if number := self.agreed():
            raise Interrupted(number)


SIGNALS = Signals()


def is_started_by_another() -> bool:
    """Return whether a launcher started this process and forwards signals to it.

    Such a process ignores repeated signals; its launcher decides when to kill it.
    """
    return multiprocessing.parent_process() is not None or "TORCHELASTIC_RUN_ID" in os.environ


class StopOnSignal(HookBase):
    """Raises `Interrupted` after an iteration in which any process received a signal.

    Must be the last hook, so that the others see a complete iteration.
    """

    def after_step(self) -> None:
        """Stop, unless this was the last iteration."""
        if self.trainer.iter + 1 < self.trainer.max_iter and (number := SIGNALS.agreed()):
            raise Interrupted(number)


class PreciseBN(hooks.PreciseBN):
    """Detectron2's hook, always on the same images, so that a resume does not change them."""

    def update_stats(self) -> None:
        """Compute the statistics, and end the loader's workers."""
        logger.info("computing batch norm statistics of %d batches", self._num_iter)
        super().update_stats()  # type: ignore[no-untyped-call]
        self._data_iter = None


class Throughput(HookBase):
    """Records images per second, besides Detectron2's own times."""

    def __init__(self, images: int) -> None:
        """Initialize the hook with the number of images per update, over all processes."""
        self._images = images

    def after_step(self) -> None:
        """Record the speed, if `IterationTimer` timed this iteration."""
        seconds, iteration = self.trainer.storage.latest().get("time", (0.0, -1))
        if iteration == self.trainer.iter:
            self.trainer.storage.put_scalar("images_per_second", self._images / seconds)


class Progress(HookBase):
    """Logs Detectron2's line of losses, speed and time left every 30 seconds.

    By time, as 20 iterations on a CPU may take an hour.
    """

    def __init__(self, max_iter: int, seconds: float = SECONDS) -> None:
        """Initialize the hook with the number of iterations and the seconds between two lines."""
        self._printer = CommonMetricPrinter(max_iter)
        self._printer.logger = logger  # information of Detectron2's own logger stays off terminals
        self._seconds = seconds
        self._last = -math.inf

    def after_step(self) -> None:
        """Log a line if one is due, and always after the first and last iteration."""
        now = time.monotonic()
        if now - self._last >= self._seconds or self.trainer.iter + 1 == self.trainer.max_iter:
            self._last = now
            self._printer.write()


class Evaluation(HookBase):
    """Evaluates periodically and at the end, keeps the best checkpoint, and stops early.

    Detectron2's EvalHook and BestCheckpointer forget the best when a training is resumed, and give
    the results to the main process alone. Must come after the checkpoints, so that a crash during
    an evaluation loses nothing, and before the writers.
    """

    def __init__(
        self,
        evaluate: Callable[[], Mapping[str, Any]],
        period: int,
        save_best: Callable[[], None],
        metric: str = "bbox/AP",
        patience: int = 0,
    ) -> None:
        """Initialize the hook.

        Args:
            evaluate: returns results such as {"bbox": {"AP": 37.0}}; called in all processes.
            period: iterations between evaluations; 0 for the end only.
            save_best: called in all processes after an evaluation better than all before.
            metric: decides what is best; higher is better, except for losses. "" for none.
            patience: evaluations without an improvement before training stops; 0 for no limit.
        """
        self._evaluate = evaluate
        self._period = period
        self._save_best = save_best
        self._metric = metric
        self._patience = patience
        self.last = -1  # iteration of the last evaluation
        self.best: float | None = None
        self.best_iteration = -1
        self.waited = 0  # evaluations since the best

    def before_train(self) -> None:
        """Evaluate the resumed checkpoint, if it was saved just before an evaluation.

        A finished training is always evaluated again, as by Detectron2.
        """
        done = self.trainer.start_iter - 1
        if done >= 0 and self._is_due(done) and (self.last < done or self._is_last(done)):
            self.trainer.iter = self.trainer.storage.iter = done
            self._evaluate_now(done)

    def before_step(self) -> None:
        """Stop early; not in after_step, where it would skip the hooks that follow this one."""
        if 0 < self._patience <= self.waited:
            raise EarlyStop(
                f"{self._metric} has not improved on {self.best} (iteration {self.best_iteration}) "
                f"in {self.waited} evaluations (TEST.BEST.PATIENCE)"
            )

    def after_step(self) -> None:
        """Evaluate if it is due."""
        if self._is_due(self.trainer.iter):
            self._evaluate_now(self.trainer.iter)

    def _is_last(self, iteration: int) -> bool:
        return iteration + 1 == self.trainer.max_iter

    def _is_due(self, iteration: int) -> bool:
        periodic = self._period > 0 and (iteration + 1) % self._period == 0
        return periodic or self._is_last(iteration)

    def _evaluate_now(self, iteration: int) -> None:
        model: nn.Module = self.trainer.model  # type: ignore[attr-defined]  # of every trainer
        training = model.training
        try:
            results = self._evaluate()
        finally:
            model.train(training)
        # Only the main process has results, but all must save and stop together.
        flat: dict[str, float] = comm.all_gather(flatten_results_dict(results))[0]
        self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
        self.last = iteration
        comm.synchronize()
        if not self._metric or not flat:
            return
        if self._metric not in flat:  # not worth ending a training after hours
            logger.warning(
                "TEST.BEST.METRIC is %r, but the evaluation gives only %s: no best checkpoint is "
                "kept. Set one of these, or ''.",
                self._metric,
                ", ".join(sorted(flat)),
            )
        elif self._is_better(flat[self._metric]):
            self.best, self.best_iteration, self.waited = flat[self._metric], iteration, 0
            self._save_best()
        else:
            self.waited += 1

    def _is_better(self, value: float) -> bool:
        if math.isnan(value) or self.best is None:
            return not math.isnan(value)
        return value < self.best if "loss" in self._metric else value > self.best

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training must know."""
        return {
            "metric": self._metric,
            "last": self.last,
            "best": self.best,
            "best_iteration": self.best_iteration,
            "waited": self.waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, without the best value of a different metric."""
        self.last = state["last"]
        if state.get("metric", self._metric) != self._metric:
            logger.warning("TEST.BEST.METRIC was %r: that best is forgotten", state["metric"])
            return
        self.best, self.waited = state["best"], state["waited"]
        self.best_iteration = state["best_iteration"]


@torch.no_grad()
def validation_losses(model: nn.Module, batches: Iterable[list[Any]]) -> dict[str, float]:
    """Return a detector's losses on annotated images, averaged over the images of all processes.

    Detectors compute losses only in training mode; batch norms stay in evaluation mode, so that
    nothing is learned.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in modes:
        if isinstance(module, _BatchNorm):
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
    names = sorted({name for part, _ in shares for name in part})
    means = {name: sum(part.get(name, 0.0) for part, _ in shares) / total for name in names}
    return {**means, "total_loss": sum(means.values())} if means else {}
