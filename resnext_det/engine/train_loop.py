"""One update: gradients accumulated over micro-batches, in any precision, with numbers watched."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.engine.defaults import create_ddp_model
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from resnext_det.config import complete
from resnext_det.data.stream import Share, seed_all
from resnext_det.engine.bad_numbers import BadUpdate, decide
from resnext_det.engine.stopping import SIGNALS, Abandoned, Interrupted
from resnext_det.errors import ConfigError

logger = logging.getLogger(__name__)

# Detectron2's RetinaNet and FCOS keep a moving average of positive anchors in this attribute, and
# in no state dict (DenseDetector._ema_update), so that a resumed training would begin it anew.
# It is also why their updates depend on the number of processes: each averages its own images.
_NORMALIZER = "loss_normalizer"

Batch = list[dict[str, Any]]
Data = Callable[[int, int], Iterable[Batch]]
"""Gives the micro-batches of a process: (seed, updates done before) -> an endless iterable."""


GLOBAL_NORM = "global_norm"
"""SOLVER.CLIP_GRADIENTS.CLIP_TYPE for the norm of all gradients together, beside Detectron2's."""


@dataclass(frozen=True)
class Arithmetic:
    """How an update is computed.

    Attributes:
        precision: of autocast; None for the weights' own.
        largest_norm: the norm of all gradients together is clipped to it; None for no clipping.
        ema_decay: of a moving average of the weights; None for no average.
        skipped: updates with a loss that is not finite which are left out before giving up.
    """

    precision: torch.dtype | None = None
    largest_norm: float | None = None
    ema_decay: float | None = None
    skipped: int = 0

    @classmethod
    def of(cls, cfg: CfgNode) -> Arithmetic:
        """Return what a config asks for."""
        solver = complete(cfg).SOLVER
        clip = solver.CLIP_GRADIENTS
        clipped = clip.ENABLED and clip.CLIP_TYPE == GLOBAL_NORM
        return cls(
            precision=getattr(torch, solver.AMP.PRECISION) if solver.AMP.ENABLED else None,
            largest_norm=clip.CLIP_VALUE if clipped else None,
            ema_decay=solver.EMA.DECAY if solver.EMA.ENABLED else None,
            skipped=solver.SKIP_BAD_UPDATES,
        )


@dataclass
class Update:
    """What one process has computed of an update so far.

    Attributes:
        losses: by name, one mapping for each micro-batch.
        batches: the micro-batches.
        data_time: seconds spent waiting for them.
        last: the loss of the newest one, whose backward pass may be yet to come.
    """

    losses: list[dict[str, Tensor]]
    batches: list[Batch]
    data_time: float = 0.0
    last: Tensor = field(default_factory=lambda: torch.zeros(()))

    def mean(self) -> dict[str, Tensor]:
        """Return the losses by name, averaged over the micro-batches."""
        names = self.losses[0]
        return {name: torch.stack([part[name] for part in self.losses]).mean() for name in names}


@dataclass(frozen=True)
class Touched:
    """What a forward pass changes, as it was before.

    Attributes:
        buffers: of the model, with copies of what they held.
        random: states of the random numbers.
        normalizer: of `_NORMALIZER`; None if the model has none.
        skipped_images: so far.
    """

    buffers: list[tuple[Tensor, Tensor]]
    random: dict[str, Any]
    normalizer: Any
    skipped_images: int


class TrainLoop(SimpleTrainer):
    """Detectron2's training loop, whose updates do not depend on how they are shared out.

    Before each micro-batch all random numbers are seeded with seed, iteration and stream: so an
    update is a function of weights and iteration, whether it is computed by eight processes or
    one, in one go or after a resume. Losses are averages over an update, as with several processes
    in Detectron2; batch norms that are trained see a micro-batch at a time (FrozenBN none).

    float16 and GPUs were not run: there was none where this was written.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        optimizer: Optimizer,
        share: Share,
        seed: int,
        folder: Path,
        arithmetic: Arithmetic = Arithmetic(),
    ) -> None:
        """Prepare.

        Args:
            model: takes a batch and returns losses by name; in a DistributedDataParallel with
                several processes.
            data: gives the micro-batches of this process.
            optimizer: of the model's parameters.
            share: of this process.
            seed: of everything that is random, the same for all processes.
            folder: of the run, where images with bad losses are saved.
            arithmetic: how updates are computed.
        """
        super().__init__(model, None, optimizer)  # type: ignore[no-untyped-call]
        self._data = data
        self.share = share
        self.seed = seed
        self._folder = folder
        self.arithmetic = arithmetic
        self.skipped_updates = 0
        self.skipped_images = 0
        device = next(model.parameters()).device.type
        self._device = device
        self._scaler = torch.GradScaler(
            device, enabled=device == "cuda" and arithmetic.precision == torch.float16
        )
        self.ema: AveragedModel | None = None
        if arithmetic.ema_decay is not None:
            average = get_ema_multi_avg_fn(arithmetic.ema_decay)  # type: ignore[no-untyped-call]
            self.ema = AveragedModel(bare(model), multi_avg_fn=average)
        modules = list(model.modules())
        # Statistics shared by the processes are exchanges within a forward pass, which one process
        # cannot drop alone.
        self._is_local = not any(
            isinstance(module, nn.SyncBatchNorm | NaiveSyncBatchNorm) for module in modules
        )
        self._buffers = [
            buffer
            for module in modules
            if not isinstance(module, FrozenBatchNorm2d)
            for buffer in module.buffers(recurse=False)
        ]
        # A backward pass is one call to Python, which sees no signal meanwhile, unless it is called
        # back.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    _let_signals_in
                )

    @property
    def _data_loader_iter(self) -> Iterator[Batch]:
        if self._data_loader_iter_obj is None:
            self._data_loader_iter_obj = iter(self._data(self.seed, self.iter))
        found: Iterator[Batch] = self._data_loader_iter_obj
        return found

    def close(self) -> None:
        """Let the workers of the data loader end, also where an error still refers to it."""
        iterator, self._data_loader_iter_obj = self._data_loader_iter_obj, None
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()  # what its __del__ does; there is no public way

    def run_step(self) -> None:
        """Compute and apply one update.

        Raises:
            TrainingError: a loss that is not finite, once too often.
            Abandoned: a process was told to stop, and all dropped the update: model and random
                numbers are as before.
        """
        assert self.model.training, "the model was changed to eval mode"
        self.optimizer.zero_grad()
        alone = self.share.processes == 1
        if isinstance(self.model, DistributedDataParallel):
            # An exchange that it would put into the forward pass of the second update.
            self.model.reducer._rebuild_buckets()
        iterator = self._data_loader_iter
        before = self._touched_by_forward()
        update = Update([], [])
        interrupted = False
        try:
            with SIGNALS.obeyed_at_once() if self._is_local else contextlib.nullcontext():
                self._compute(update, iterator)
                if alone and self._all_finite(update):
                    self._backward(update.last)
        except Interrupted:
            interrupted = True
        # Asked before the processes exchange gradients: else some would wait for ever.
        verdict = self._verdict(update, interrupted)
        if verdict < 0:
            self.optimizer.zero_grad()
            self._restore(before)
            raise Abandoned(-verdict)
        if verdict == 0:
            self._leave_out(update)
            return
        if not alone:
            self._backward(update.last)
        self.after_backward()  # type: ignore[no-untyped-call]
        self._write_metrics(update.mean(), update.data_time)
        self._apply()

    def _compute(self, update: Update, iterator: Iterator[Batch]) -> None:
        """Run the micro-batches of this process, but for the backward pass of the last one."""
        for stream in self.share.streams:
            began = time.perf_counter()
            batch = next(iterator)
            update.data_time += time.perf_counter() - began
            self._count_skipped(batch)
            seed_all(self.seed, 1, self.iter, stream)
            last = stream == self.share.streams[-1]
            with self._gathered_at_the_end(last):
                found = self._losses(batch)
                update.losses.append({name: loss.detach() for name, loss in found.items()})
                update.batches.append(batch)
                update.last = sum(found.values(), torch.zeros(())) / self.share.micro_batches
                if not last:
                    self._backward(update.last)

    def _backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        precision = self.arithmetic.precision
        try:
            with torch.autocast(self._device, precision, enabled=precision is not None):
                found: dict[str, Tensor] = self.model(batch)
        except FloatingPointError as error:  # of Detectron2's RPN, when boxes are not finite
            logger.debug("%s", error)
            return {"total_loss": torch.tensor(float("nan"), requires_grad=True)}
        return {"total_loss": found} if isinstance(found, Tensor) else found

    def _gathered_at_the_end(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Let processes exchange gradients in the last micro-batch alone."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _all_finite(self, update: Update) -> bool:
        every = [loss.double() for part in update.losses for loss in part.values()]
        return bool(torch.stack(every).isfinite().all())

    def _verdict(self, update: Update, interrupted: bool) -> int:
        """Return what all processes do: 1 for apply, 0 for leave out, -N for stop by signal N."""
        own = -SIGNALS.received if interrupted else int(self._all_finite(update))
        if self.share.processes == 1:
            return own
        flag = torch.tensor(own, device=self._device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return int(flag)

    def _touched_by_forward(self) -> Touched:
        """Return what an update that is dropped would change."""
        kept = [(buffer, buffer.clone()) for buffer in self._buffers]
        normalizer = getattr(bare(self.model), _NORMALIZER, None)
        return Touched(kept, _random_states(), normalizer, self.skipped_images)

    def _restore(self, before: Touched) -> None:
        for buffer, value in before.buffers:
            buffer.copy_(value)
        _restore_random(before.random)
        if before.normalizer is not None:
            setattr(bare(self.model), _NORMALIZER, before.normalizer)
        self.skipped_images = before.skipped_images

    def _leave_out(self, update: Update) -> None:
        """Leave an update out, or stop, in all processes alike."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        bad = BadUpdate.of(self.iter, self.share.process, rate, update.losses, update.batches)
        self.optimizer.zero_grad()
        self.skipped_updates += 1
        decide(bad, self._folder, self.skipped_updates, self.arithmetic.skipped)

    def _apply(self) -> None:
        if self.arithmetic.largest_norm is not None:
            self._scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self.arithmetic.largest_norm)
            get_event_storage().put_scalar("gradient_norm", float(norm))
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(bare(self.model))

    def _count_skipped(self, batch: Batch) -> None:
        for record in batch:
            for message in record.pop("skipped", ()):
                self.skipped_images += 1
                logger.warning("image skipped (%d so far): %s", self.skipped_images, message)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed training needs beside the weights, in plain containers."""
        state: dict[str, Any] = super().state_dict()  # type: ignore[no-untyped-call]
        state |= {
            "seed": self.seed,
            "streams": self.share.processes * self.share.micro_batches,
            "scaler": self._scaler.state_dict(),
            "skipped_updates": self.skipped_updates,
            "skipped_images": self.skipped_images,
            "random_states": _random_states(),
            "loss_normalizer": getattr(bare(self.model), _NORMALIZER, None),
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; files of stock Detectron2 hold an optimizer alone."""
        super().load_state_dict(state)  # type: ignore[no-untyped-call]
        self.seed = state.get("seed", self.seed)
        self._scaler.load_state_dict(state.get("scaler", {}) if self._scaler.is_enabled() else {})
        self.skipped_updates = state.get("skipped_updates", 0)
        self.skipped_images = state.get("skipped_images", 0)
        streams = self.share.processes * self.share.micro_batches
        if state.get("streams", streams) != streams:
            logger.warning(
                "the training was started with %d micro-batches an update and goes on with %d: it "
                "will see other images than it would have seen.",
                state["streams"],
                streams,
            )
        if state.get("loss_normalizer") is not None:
            setattr(bare(self.model), _NORMALIZER, state["loss_normalizer"])
        if "random_states" in state:
            _restore_random(state["random_states"])
        if self.ema is not None and "ema" in state:
            self.ema.load_state_dict(state["ema"])
        elif self.ema is not None:
            logger.warning("the checkpoint has no moving average: it begins with these weights.")
            self.ema.n_averaged.zero_()


def _let_signals_in(parameter: Tensor) -> None:
    """Do nothing: Python runs the handlers of signals when a function is called."""


def distributed(model: nn.Module) -> nn.Module:
    """Wrap a model for several processes; the buffers of each are its own, as in Detectron2.

    Raises:
        ConfigError: it has SyncBN, which PyTorch has for GPUs alone.
    """
    # create_ddp_model names the process's GPU, which a model on the CPU refuses.
    on_cpu = next(model.parameters()).device.type == "cpu"
    several = comm.get_world_size() > 1
    if on_cpu and several and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise ConfigError(
            f"the model has SyncBN, which works on GPUs alone, and {comm.get_world_size()} "
            "processes share the CPU. Set NORM to FrozenBN, BN or GN (MODEL.RESNETS.NORM, "
            "MODEL.FPN.NORM), or train in one process (--num-gpus 1)."
        )
    more = {"device_ids": None} if on_cpu else {}
    wrapped: nn.Module = create_ddp_model(model, broadcast_buffers=False, **more)
    return wrapped


def bare(model: nn.Module) -> nn.Module:
    """Return a model without what distributed training puts around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def shared_seed(seed: int) -> int:
    """Return a seed, or one drawn for all processes together where it is negative."""
    return seed if seed >= 0 else int(comm.shared_random_seed())


def _random_states() -> dict[str, Any]:
    """Return the states that code outside of the micro-batches draws from, such as hooks."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }


def _restore_random(states: dict[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu().to(torch.uint8))
