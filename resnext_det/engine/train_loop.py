"""The training loop: gradient accumulation, mixed precision, and checks for non-finite losses."""

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

# Detectron2's RetinaNet and FCOS keep a moving average of the number of positive anchors in this
# attribute but not in the state dict (DenseDetector._ema_update), so a resume would reset it. Each
# process averages its own images, so their updates depend on the number of processes.
_NORMALIZER = "loss_normalizer"

Batch = list[dict[str, Any]]
Data = Callable[[int, int], Iterable[Batch]]
"""(seed, number of updates already done) -> infinite iterable of this process's micro-batches."""


GLOBAL_NORM = "global_norm"
"""SOLVER.CLIP_GRADIENTS.CLIP_TYPE that clips the total norm, in addition to Detectron2's types."""


@dataclass(frozen=True)
class Arithmetic:
    """Numerical settings of an update.

    Attributes:
        precision: autocast dtype, or None to disable autocast.
        largest_norm: maximum total gradient norm, or None to disable clipping.
        ema_decay: decay of the weights' moving average, or None for no average.
        skipped: how many updates with a non-finite loss to skip before aborting.
    """

    precision: torch.dtype | None = None
    largest_norm: float | None = None
    ema_decay: float | None = None
    skipped: int = 0

    @classmethod
    def of(cls, cfg: CfgNode) -> Arithmetic:
        """Read the SOLVER section of a config."""
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
    """One process's partially computed update.

    Attributes:
        losses: detached losses by name, one mapping per micro-batch.
        batches: the micro-batches.
        data_time: seconds spent waiting for data.
        last: loss of the newest micro-batch, whose backward pass may still be pending.
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
    """State to restore if an update is dropped after its forward pass.

    Attributes:
        buffers: the model's buffers, each with a copy of its previous value.
        random: random generator states.
        normalizer: value of `_NORMALIZER`, or None if the model lacks it.
        skipped_images: number of images skipped so far.
    """

    buffers: list[tuple[Tensor, Tensor]]
    random: dict[str, Any]
    normalizer: Any
    skipped_images: int


class TrainLoop(SimpleTrainer):
    """Detectron2's training loop, with updates independent of the number of processes.

    Random generators are seeded by seed, iteration and stream before each micro-batch, so an update
    is a function of weights and iteration: on eight processes or one, in one go or after a resume.
    Losses are averaged over an update, as Detectron2 does across processes. Trainable batch norms
    see one micro-batch at a time; FrozenBN is unaffected.

    float16 and GPUs are untested.
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
        """Initialize the loop.

        Args:
            model: maps a batch to losses by name; wrapped in DistributedDataParallel if there are
                several processes.
            data: returns the micro-batches of this process.
            optimizer: optimizer of the model's parameters.
            share: what this process computes.
            seed: the same on all processes.
            folder: OUTPUT_DIR, where images with non-finite losses are saved.
            arithmetic: precision, clipping and averaging.
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
            self.ema = AveragedModel(unwrap(model), multi_avg_fn=average)
        modules = list(model.modules())
        # SyncBN communicates during the forward pass, so one process cannot abort it alone.
        self._is_local = not any(
            isinstance(module, nn.SyncBatchNorm | NaiveSyncBatchNorm) for module in modules
        )
        self._buffers = [
            buffer
            for module in modules
            if not isinstance(module, FrozenBatchNorm2d)
            for buffer in module.buffers(recurse=False)
        ]
        # Python handles signals only between bytecodes, and backward() is a single call; a Python
        # hook on every gradient lets handlers run during it.
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
        """Shut down the loader's workers, even if a traceback still references the iterator."""
        iterator, self._data_loader_iter_obj = self._data_loader_iter_obj, None
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()  # as in its __del__; there is no public method

    def run_step(self) -> None:
        """Compute and apply one update.

        Raises:
            TrainingError: more non-finite losses than allowed.
            Abandoned: a process received a signal and all dropped the update; the model and random
                states are restored.
        """
        assert self.model.training, "the model was changed to eval mode"
        self.optimizer.zero_grad()
        alone = self.share.processes == 1
        if isinstance(self.model, DistributedDataParallel):
            # DDP would otherwise communicate in the forward pass of the second update.
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
        # Agree before the gradient all-reduce, or some processes would wait forever.
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
        """Run this process's micro-batches, except the last one's backward pass."""
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
        except FloatingPointError as error:  # Detectron2's RPN, on non-finite boxes
            logger.debug("%s", error)
            return {"total_loss": torch.tensor(float("nan"), requires_grad=True)}
        return {"total_loss": found} if isinstance(found, Tensor) else found

    def _gathered_at_the_end(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Disable the gradient all-reduce for all but the last micro-batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _all_finite(self, update: Update) -> bool:
        every = [loss.double() for part in update.losses for loss in part.values()]
        return bool(torch.stack(every).isfinite().all())

    def _verdict(self, update: Update, interrupted: bool) -> int:
        """Agree across processes: 1 to apply the update, 0 to skip it, -N to stop on signal N."""
        own = -SIGNALS.received if interrupted else int(self._all_finite(update))
        if self.share.processes == 1:
            return own
        flag = torch.tensor(own, device=self._device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return int(flag)

    def _touched_by_forward(self) -> Touched:
        """Record the state that dropping the update must restore."""
        kept = [(buffer, buffer.clone()) for buffer in self._buffers]
        normalizer = getattr(unwrap(self.model), _NORMALIZER, None)
        return Touched(kept, _random_states(), normalizer, self.skipped_images)

    def _restore(self, before: Touched) -> None:
        for buffer, value in before.buffers:
            buffer.copy_(value)
        _restore_random(before.random)
        if before.normalizer is not None:
            setattr(unwrap(self.model), _NORMALIZER, before.normalizer)
        self.skipped_images = before.skipped_images

    def _leave_out(self, update: Update) -> None:
        """Skip an update with a non-finite loss, or abort, on all processes."""
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
            self.ema.update_parameters(unwrap(self.model))

    def _count_skipped(self, batch: Batch) -> None:
        for record in batch:
            for message in record.pop("skipped", ()):
                self.skipped_images += 1
                logger.warning("image skipped (%d so far): %s", self.skipped_images, message)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs in addition to the weights, in plain containers."""
        state: dict[str, Any] = super().state_dict()  # type: ignore[no-untyped-call]
        state |= {
            "seed": self.seed,
            "streams": self.share.processes * self.share.micro_batches,
            "scaler": self._scaler.state_dict(),
            "skipped_updates": self.skipped_updates,
            "skipped_images": self.skipped_images,
            "random_states": _random_states(),
            "loss_normalizer": getattr(unwrap(self.model), _NORMALIZER, None),
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; stock Detectron2's checkpoints contain only the optimizer."""
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
            setattr(unwrap(self.model), _NORMALIZER, state["loss_normalizer"])
        if "random_states" in state:
            _restore_random(state["random_states"])
        if self.ema is not None and "ema" in state:
            self.ema.load_state_dict(state["ema"])
        elif self.ema is not None:
            logger.warning("the checkpoint has no moving average: it begins with these weights.")
            self.ema.n_averaged.zero_()


def _let_signals_in(parameter: Tensor) -> None:
    """Do nothing; calling a Python function lets signal handlers run."""


def distributed(model: nn.Module) -> nn.Module:
    """Wrap a model in DistributedDataParallel without buffer broadcast, as in Detectron2.

    Raises:
        ConfigError: the model has SyncBN, which PyTorch supports on GPUs only.
    """
    # create_ddp_model always passes device_ids, which DDP rejects for a model on the CPU.
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


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a DistributedDataParallel wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def shared_seed(seed: int) -> int:
    """Return the seed, or if it is negative a random one shared by all processes."""
    return seed if seed >= 0 else int(comm.shared_random_seed())


def _random_states() -> dict[str, Any]:
    """Return the global generator states, used by code outside micro-batches such as hooks."""
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
