"""One update: gradients accumulated over micro-batches, in any precision, with numbers watched."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.engine.defaults import create_ddp_model
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
        """
        assert self.model.training, "the model was changed to eval mode"
        self.optimizer.zero_grad()
        losses: list[dict[str, Tensor]] = []
        batches: list[Batch] = []
        data_time = 0.0
        for stream in self.share.streams:
            began = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - began
            self._count_skipped(batch)
            seed_all(self.seed, 1, self.iter, stream)
            last = stream == self.share.streams[-1]
            with self._gathered_at_the_end(last):
                found = self._losses(batch)
                losses.append({name: loss.detach() for name, loss in found.items()})
                batches.append(batch)
                total = sum(found.values(), torch.zeros(())) / self.share.micro_batches
                # Asked before the processes exchange gradients: else some would wait for ever.
                if last and not self._all_finite(losses):
                    self._leave_out(losses, batches)
                    return
                self._scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        self.after_backward()  # type: ignore[no-untyped-call]
        mean = {name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]}
        self._write_metrics(mean, data_time)
        self._apply()

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

    def _all_finite(self, losses: list[dict[str, Tensor]]) -> bool:
        every = [loss.double() for part in losses for loss in part.values()]
        finite = torch.stack(every).isfinite().all()
        if self.share.processes == 1:
            return bool(finite)
        flag = finite.to(self._device, torch.float32)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag)

    def _leave_out(self, losses: list[dict[str, Tensor]], batches: list[Batch]) -> None:
        """Leave an update out, or stop, in all processes alike."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        bad = BadUpdate.of(self.iter, self.share.process, rate, losses, batches)
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
            _restore(state["random_states"])
        if self.ema is not None and "ema" in state:
            self.ema.load_state_dict(state["ema"])
        elif self.ema is not None:
            logger.warning("the checkpoint has no moving average: it begins with these weights.")
            self.ema.n_averaged.zero_()


def distributed(model: nn.Module) -> nn.Module:
    """Wrap a model for several processes; the buffers of each are its own, as in Detectron2."""
    # create_ddp_model names the process's GPU, which a model on the CPU refuses.
    on_cpu = next(model.parameters()).device.type == "cpu"
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


def _restore(states: dict[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu().to(torch.uint8))
