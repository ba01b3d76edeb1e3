"""What a training will do, in numbers and in words, before its first iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode
from tabulate import tabulate

from resnext_det.config_rules import COSINE
from resnext_det.engine.solver import decay_points
from resnext_det.files import size_text

Row = tuple[str, str]

_SCALED = (
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.BASE_LR",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
)
"""The keys that `DefaultTrainer.auto_scale_workers` changes."""


@dataclass(frozen=True)
class Change:
    """A value of the config that was scaled.

    Attributes:
        key: in the config.
        before: as the config has it.
        after: as the training takes it.
    """

    key: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.key} {self.before} -> {self.after}"


@dataclass(frozen=True)
class Plan:
    """What the training does on this machine.

    Attributes:
        scaling: SOLVER.SCALING.
        reference: processes that the config was written for; 0 where it does not say.
        processes: that train.
        images_per_update: of all processes and micro-batches together.
        images_per_micro_batch: that a process handles at once.
        micro_batches: of a process in each update; above 1, gradients are accumulated.
        base_lr: learning rate after the warm-up.
        warmup_iters: iterations of the warm-up, 0 for none.
        warmup_factor: of `base_lr`, at the start of the warm-up.
        decays: (iteration, learning rate from there on).
        final_lr: where a cosine ends, None for a rate that falls in steps.
        max_iter: iterations.
        changes: what was scaled; none under "accumulate".
        test_sets: data sets that are evaluated.
        eval_period: iterations, 0 for the end alone.
        patience: evaluations without a better one that end the training; 0 for none.
        checkpoint_period: iterations.
        keep_last: checkpoints that are kept beside the best and the final one; 0 for all.
        keeps_best: whether the best checkpoint is kept.
        warnings: about settings that were changed or that are unusual.
    """

    scaling: str
    reference: int
    processes: int
    images_per_update: int
    images_per_micro_batch: int
    micro_batches: int
    base_lr: float
    warmup_iters: int
    warmup_factor: float
    decays: tuple[tuple[int, float], ...]
    final_lr: float | None
    max_iter: int
    changes: tuple[Change, ...]
    test_sets: int
    eval_period: int
    patience: int
    checkpoint_period: int
    keep_last: int
    keeps_best: bool
    warnings: tuple[str, ...] = ()

    @property
    def images_per_process(self) -> int:
        """Images that one process handles in each update."""
        return self.images_per_micro_batch * self.micro_batches

    @property
    def evaluations(self) -> int:
        """How often all data sets are evaluated: every so often, and after the last iteration."""
        if not self.test_sets:
            return 0
        return 1 + ((self.max_iter - 1) // self.eval_period if self.eval_period else 0)

    @property
    def checkpoints_written(self) -> int:
        """How many checkpoints are written: every so often, and the final one; without the best."""
        return (self.max_iter - 1) // self.checkpoint_period + 1

    @property
    def checkpoints_kept(self) -> int:
        """How many checkpoints are there at the end, the best and the final one among them."""
        periodic = self.checkpoints_written - 1
        last = min(periodic, self.keep_last) if self.keep_last else periodic
        return last + 1 + self.keeps_best

    def epochs(self, iterations: int, images: int) -> float:
        """Return how often each image was seen on average.

        Args:
            iterations: of the training.
            images: to train on.
        """
        return iterations * self.images_per_update / images

    def disk_bytes(self, checkpoint_bytes: int) -> int:
        """Return the disk space needed: a file is written before it takes another one's place.

        Args:
            checkpoint_bytes: of one, see `resnext_det.engine.checkpoints.checkpoint_bytes`.
        """
        return (self.checkpoints_kept + 1) * checkpoint_bytes

    def shortage(self, checkpoint_bytes: int, free_bytes: int) -> str | None:
        """Return a warning where the disk cannot hold the checkpoints, else None.

        Args:
            checkpoint_bytes: of one, see `resnext_det.engine.checkpoints.checkpoint_bytes`.
            free_bytes: of the disk, see `resnext_det.files.free_bytes`.
        """
        needed = self.disk_bytes(checkpoint_bytes)
        if needed <= free_bytes:
            return None
        return (
            f"the checkpoints need {size_text(needed)} of disk space, and {size_text(free_bytes)} "
            "are free. Keep fewer of them (SOLVER.KEEP_LAST, where 0 keeps all, and "
            "SOLVER.CHECKPOINT_PERIOD), or name another OUTPUT_DIR."
        )

    def describe(
        self,
        images: int | None = None,
        checkpoint_bytes: int | None = None,
        free_bytes: int | None = None,
    ) -> str:
        """Return the plan as lines to print; `shortage` is a warning apart.

        Args:
            images: to train on, for the number of epochs.
            checkpoint_bytes: of one, for the disk space needed.
            free_bytes: of the disk.
        """
        rows = [
            *self._images(images),
            *self._rates(images),
            *self._outputs(checkpoint_bytes, free_bytes),
        ]
        text: str = tabulate(rows, tablefmt="plain", disable_numparse=True)
        return text

    def _images(self, images: int | None) -> list[Row]:
        parts = (
            f"{_count(self.processes, 'process', 'es')} x "
            f"{_count(self.micro_batches, 'micro-batch', 'es')} x "
            f"{_count(self.images_per_micro_batch, 'image')}"
        )
        rows = [
            ("Images per update", f"{self.images_per_update:,} = {parts}"),
            ("Images per process", f"{self.images_per_process:,}"),
        ]
        if self.micro_batches > 1:
            rows.append(
                (
                    "Faster",
                    f"with memory for more: SOLVER.IMS_PER_MICRO_BATCH {self.images_per_process} "
                    "or a divisor of it; as many images per update, but other ones",
                )
            )
        if images is not None:
            rows.append(("Images to train on", f"{images:,}"))
        scaling = [f"{self.scaling}, nothing changed", *map(str, self.changes)]
        if self.changes:
            scaling[0] = f"{self.scaling}, from {self.reference} to {self.processes} processes"
        elif self.reference not in (0, self.processes):
            scaling[0] += f"; written for {self.reference} processes"
        return [*rows, ("Scaling", scaling[0]), *(("", each) for each in scaling[1:])]

    def _rates(self, images: int | None) -> list[Row]:
        warmup = "none"
        if self.warmup_iters:
            length = _iterations(self.warmup_iters) + self._epoch(self.warmup_iters, images)
            warmup = f"{length}, from {self.base_lr * self.warmup_factor:g}"
        decays = [
            f"to {rate:g} at iteration {iteration:,}{self._epoch(iteration, images)}"
            for iteration, rate in self.decays
        ]
        if self.final_lr is not None:
            decays = [f"to {self.final_lr:g} at the end, as a cosine"]
        first, *others = decays or ["none"]
        return [
            ("Learning rate", f"{self.base_lr:g}"),
            ("Warm-up", warmup),
            ("Decay", first),
            *(("", each) for each in others),
            ("End", f"iteration {self.max_iter:,}{self._epoch(self.max_iter, images)}"),
        ]

    def _epoch(self, iteration: int, images: int | None) -> str:
        return f" ({self.epochs(iteration, images):.2f} epochs)" if images else ""

    def _outputs(self, checkpoint_bytes: int | None, free_bytes: int | None) -> list[Row]:
        evaluations = "none, as DATASETS.TEST is empty"
        if self.test_sets:
            period = f"every {_iterations(self.eval_period)} and " if self.eval_period else ""
            evaluations = f"{self.evaluations:,}, {period}at the end"
            if self.test_sets > 1:
                evaluations += f", each of {self.test_sets} data sets"
            if self.patience:
                evaluations += f"; training stops after {self.patience:,} without a better one"
        kept = "the best and the final one" if self.keeps_best else "the final one"
        rows = [
            ("Evaluations", evaluations),
            (
                "Checkpoints",
                f"{self.checkpoints_written:,}, every {_iterations(self.checkpoint_period)} and at "
                f"the end; {self.checkpoints_kept:,} kept, {kept} among them",
            ),
        ]
        if checkpoint_bytes is None:
            return rows
        needed = size_text(self.disk_bytes(checkpoint_bytes))
        disk = f"{needed} needed, {size_text(checkpoint_bytes)} a checkpoint"
        if free_bytes is not None:
            disk += f"; {size_text(free_bytes)} free"
        return [*rows, ("Disk", disk)]


def make_plan(
    given: CfgNode,
    scaled: CfgNode,
    processes: int,
    images: int,
    micro_batches: int,
    warnings: Sequence[str] = (),
) -> Plan:
    """Return the plan of a config that was scaled; see `resnext_det.engine.schedule.scale`.

    Args:
        given: the config as it was read.
        scaled: the config that the training takes.
        processes: that train.
        images: of a micro-batch.
        micro_batches: of a process in each update.
        warnings: to go with it.
    """
    solver, test_sets = scaled.SOLVER, len(scaled.DATASETS.TEST)
    return Plan(
        scaling=given.SOLVER.SCALING,
        reference=given.SOLVER.REFERENCE_WORLD_SIZE,
        processes=processes,
        images_per_update=solver.IMS_PER_BATCH,
        images_per_micro_batch=images,
        micro_batches=micro_batches,
        base_lr=solver.BASE_LR,
        warmup_iters=solver.WARMUP_ITERS,
        warmup_factor=solver.WARMUP_FACTOR,
        decays=decay_points(scaled),
        final_lr=solver.BASE_LR_END if solver.LR_SCHEDULER_NAME == COSINE else None,
        max_iter=solver.MAX_ITER,
        changes=_changes(given, scaled),
        test_sets=test_sets,
        eval_period=scaled.TEST.EVAL_PERIOD,
        patience=scaled.TEST.BEST.PATIENCE if scaled.TEST.BEST.METRIC else 0,
        checkpoint_period=solver.CHECKPOINT_PERIOD,
        keep_last=solver.KEEP_LAST,
        keeps_best=bool(test_sets and scaled.TEST.BEST.METRIC),
        warnings=tuple(warnings),
    )


def _changes(given: CfgNode, scaled: CfgNode) -> tuple[Change, ...]:
    pairs = []
    for key in _SCALED:
        node, name = key.split(".")
        pairs.append(Change(key, given[node][name], scaled[node][name]))
    return tuple(change for change in pairs if change.before != change.after)


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _iterations(number: int) -> str:
    return _count(number, "iteration")
