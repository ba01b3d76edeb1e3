"""The training loop: gradient accumulation, mixed precision, and checks for non-finite losses."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine.defaults import create_ddp_model
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from resnext_det.data.annotations import forget
from resnext_det.data.stream import Share, seed_all
from resnext_det.engine.exact_sum import NORMALIZER, ExactSum
from resnext_det.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

Batch = list[dict[str, Any]]
Data = Callable[[int, int], Iterable[Batch]]
"""(seed, number of updates already done) -> infinite iterable of this process's micro-batches."""


class TrainLoop(SimpleTrainer):
    """Detectron2's training loop, with updates independent of the number of processes.

    Random generators are seeded by seed, iteration and stream before each micro-batch, so an update
    is a function of weights and iteration: on eight processes or one, in one go or after a resume.
    Losses are averaged over an update, as Detectron2 does across processes. Trainable batch norms
    see one micro-batch at a time; FrozenBN is unaffected.
    """

    _data_loader_iter_obj: Any  # None until it is started

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        optimizer: Optimizer,
        share: Share,
        seed: int,
        folder: Path,
        *,
        precision: torch.dtype | None = None,
        scaled: bool = False,
        max_norm: float | None = None,
        ema_decay: float | None = None,
        skip: int = 0,
        per_pass: int = 1,
        exact: bool = False,
    ) -> None:
        """Initialize the loop.

        Args:
            model: maps a batch to losses by name; wrapped in DistributedDataParallel if there are
                several processes.
            data: returns the micro-batches of this process.
            optimizer: of the model's parameters.
            share: what this process computes.
            seed: the same on all processes.
            folder: OUTPUT_DIR, where images with non-finite losses are saved.
            precision: autocast dtype, or None to disable autocast.
            scaled: scale the losses, for gradients in float16.
            max_norm: maximum norm of all gradients together, or None to disable this clipping.
            ema_decay: decay of the weights' moving average, or None for no average.
            skip: how many updates with a non-finite loss to skip before aborting.
            per_pass: how many micro-batches to compute at once.
            exact: sum gradients to the same bits on any number of processes; `per_pass` must be 1.
        """
        super().__init__(model, None, optimizer)  # type: ignore[no-untyped-call]
        self._data = data
        self.share = share
        self.seed = seed
        self._folder = folder
        self._precision = precision
        self._max_norm = max_norm
        self._skip = skip
        self._passes = [
            share.streams[first : first + per_pass]
            for first in range(0, len(share.streams), per_pass)
        ]
        self.skipped_updates = 0
        self.skipped_images = 0
        self._device = next(model.parameters()).device.type
        self._exact = ExactSum(unwrap(model), share) if exact else None
        self._scaler = torch.GradScaler(self._device, enabled=scaled)
        self.ema: AveragedModel | None = None
        if ema_decay is not None:
            average = get_ema_multi_avg_fn(ema_decay)  # type: ignore[no-untyped-call]
            self.ema = AveragedModel(unwrap(model), multi_avg_fn=average)

    def start_loader(self, iteration: int) -> Iterable[Batch]:
        """Build the loader of the micro-batches from an iteration on, start it, and return it."""
        loader = self._data(self.seed, iteration)
        forget()  # before workers fork and inherit the parsed annotations
        self._data_loader_iter_obj = iter(loader)
        return loader

    @property
    def _data_loader_iter(self) -> Iterator[Batch]:
        if self._data_loader_iter_obj is None:
            self.start_loader(self.iter)
        found: Iterator[Batch] = self._data_loader_iter_obj
        return found

    def close(self) -> None:
        """Stop the loader's workers, even if a traceback still references their iterator."""
        iterator, self._data_loader_iter_obj = self._data_loader_iter_obj, None
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()  # as in its __del__; there is no public method

    def run_step(self) -> None:
        """Compute and apply one update, or skip it if a loss is not finite."""
        assert self.model.training, "the model was changed to eval mode"
        self.optimizer.zero_grad()
        losses: list[dict[str, Tensor]] = []
        batches: list[Batch] = []
        data_time = 0.0
        share = self.share
        if self._exact is not None:
            self._exact.start()
        for streams in self._passes:
            began = time.perf_counter()
            batch = [record for _ in streams for record in next(self._data_loader_iter)]
            data_time += time.perf_counter() - began
            self._count_skipped(batch)
            seed_all(self.seed, 1, self.iter, streams[0])
            is_last = self._exact is None and streams is self._passes[-1]
            # DistributedDataParallel averages over processes, however many micro-batches each has.
            processes = 1 if self._exact is not None else share.processes
            with self._no_sync(not is_last), self._interpreted(self._exact is not None):
                found = self._losses(batch)
                loss = sum(found.values(), torch.zeros(()))
                loss = loss / (share.total / (processes * len(streams)))
                if not is_last:
                    self._backward(loss)
            if self._exact is not None:
                self._exact.add(streams[0])
            losses.append({name: each.detach() for name, each in found.items()})
            batches.append(batch)
        # Before the last backward pass, in which the processes wait for each other's gradients.
        if not self._finite_everywhere(losses):
            self.optimizer.zero_grad()
            self._skip_update(losses, batches)
            return
        if self._exact is None:
            self._backward(loss)
        else:
            self._exact.finish()
        self.after_backward()  # type: ignore[no-untyped-call]
        self._write_metrics(self._weighted(losses), data_time)
        self._apply()

    def _no_sync(self, enabled: bool) -> contextlib.AbstractContextManager[None]:
        """Keep gradients in this process, as for all micro-batches but the last."""
        if enabled and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _interpreted(self, enabled: bool) -> contextlib.AbstractContextManager[None]:
        """Do not compile TorchScript's functions, such as RetinaNet's focal loss.

        They round differently from the third call in a process on, in which they are compiled.
        """
        if enabled:
            return torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
        return contextlib.nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        try:
            with torch.autocast(self._device, self._precision, enabled=self._precision is not None):
                found: dict[str, Tensor] = self.model(batch)
        except FloatingPointError as error:  # Detectron2's RPN, on non-finite boxes
            logger.debug("%s", error)
            return {"total_loss": torch.tensor(math.nan, device=self._device, requires_grad=True)}
        return {"total_loss": found} if isinstance(found, Tensor) else found

    def _weighted(self, losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return this process's losses so that their mean over processes is that of an update."""
        weights = torch.tensor([len(streams) for streams in self._passes], dtype=torch.float64)
        weights *= self.share.processes / self.share.total
        return {
            name: torch.stack([part[name].double() for part in losses]).cpu() @ weights
            for name in losses[0]
        }

    def _finite_everywhere(self, losses: list[dict[str, Tensor]]) -> bool:
        """Tell whether the losses of all processes are finite."""
        every = torch.stack([loss.double() for part in losses for loss in part.values()])
        finite = every.isfinite().all()
        if self.share.processes > 1:
            flag = finite.to(self._device, torch.int32)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
            finite = flag
        return bool(finite)

    def _skip_update(self, losses: list[dict[str, Tensor]], batches: list[Batch]) -> None:
        """Save the images of non-finite losses; abort on all processes after too many of these."""
        self.skipped_updates += 1
        rate = self.optimizer.param_groups[0]["lr"]
        bad: list[dict[str, Any]] = []
        for part, batch in zip(losses, batches):
            values = {name: float(loss) for name, loss in part.items()}
            if not all(map(math.isfinite, values.values())):
                bad.append({"losses": values, "images": [_plain(record) for record in batch]})
        text = ""
        if bad:
            file = self._folder / f"bad_update_{self.iter:07d}_process{self.share.process}.pth"
            torch.save({"iteration": self.iter, "learning_rate": rate, "micro_batches": bad}, file)
            described = "; ".join(
                f"{', '.join(f'{name} {value:g}' for name, value in part['losses'].items())} "
                f"for {', '.join(str(image.get('file_name')) for image in part['images'])}"
                for part in bad
            )
            text = f"{described} (saved as {file})"
        everywhere = "; ".join(filter(None, comm.all_gather(text)))
        message = (
            f"a loss is not finite at iteration {self.iter}, learning rate {rate:g}: {everywhere}"
        )
        if self.skipped_updates > self._skip:
            raise TrainingError(
                f"{message}. Usually SOLVER.BASE_LR is too high, the weights don't fit, or boxes "
                f"of these images are broken. SOLVER.SKIP_BAD_UPDATES is {self._skip}; set it "
                "higher to skip such updates."
            )
        logger.warning(
            "skipped update %d of at most %d: %s", self.skipped_updates, self._skip, message
        )

    def _apply(self) -> None:
        if self._max_norm is not None:
            self._scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self._max_norm)
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
            "streams": self.share.total,
            "processes": self.share.processes,
            "kernels": _kernels(self._device),
            "scaler": self._scaler.state_dict(),
            "skipped_updates": self.skipped_updates,
            "skipped_images": self.skipped_images,
            "loss_normalizer": getattr(unwrap(self.model), NORMALIZER, None),
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; stock Detectron2's checkpoints contain only the optimizer."""
        super().load_state_dict(state)  # type: ignore[no-untyped-call]
        self.seed = state.get("seed", self.seed)
        if self._scaler.is_enabled() and state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])
        self.skipped_updates = state.get("skipped_updates", 0)
        self.skipped_images = state.get("skipped_images", 0)
        share = self.share
        if (streams := state.get("streams", share.total)) != share.total:
            logger.warning(
                "training started with %d micro-batches per update and resumes with %d, so it will "
                "see different images than it would have seen. SOLVER.IMS_PER_MICRO_BATCH %d keeps "
                "them on up to %d processes",
                *(streams, share.total, max(1, share.total * share.images // streams), streams),
            )
        if state.get("loss_normalizer") is not None:
            setattr(unwrap(self.model), NORMALIZER, state["loss_normalizer"])
        kernels = _kernels(self._device)
        if self._exact is not None and state.get("kernels", kernels) != kernels:
            logger.warning(
                "SOLVER.EXACT_SUM: training resumes with other kernels (%s before, now %s), which "
                "may round differently. OMP_NUM_THREADS sets the number of threads",
                *(state["kernels"], kernels),
            )
        processes = state.get("processes", share.processes)
        if self._exact is None and processes != share.processes:
            for reason in local_state(unwrap(self.model)):
                logger.warning(
                    "training resumes on %d processes instead of %d, which its result depends on: "
                    "%s",
                    *(share.processes, processes, reason),
                )
        if self.ema is not None and "ema" in state:
            self.ema.load_state_dict(state["ema"])
        elif self.ema is not None:
            logger.warning("the checkpoint has no moving average: it starts from these weights")
            self.ema.n_averaged.zero_()


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of the model's input in tensors and plain containers."""
    plain = {name: value for name, value in record.items() if isinstance(value, Tensor | str | int)}
    instances = record.get("instances")
    if isinstance(instances, Instances):
        plain["gt_boxes"] = instances.gt_boxes.tensor
        plain["gt_classes"] = instances.gt_classes
    return plain


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
            f"the model has SyncBN, which needs GPUs, and {comm.get_world_size()} processes share "
            "the CPU. Set MODEL.RESNETS.NORM and MODEL.FPN.NORM to FrozenBN, BN or GN, or train in "
            "one process (--num-gpus 1)."
        )
    more = {"device_ids": None} if on_cpu else {}
    wrapped: nn.Module = create_ddp_model(model, broadcast_buffers=False, **more)
    return wrapped


def check_batch_norms(model: nn.Module, share: Share, *, exact: bool) -> None:
    """Refuse SyncBN in processes with different numbers of micro-batches: they would never meet.

    Raises:
        ConfigError: as said, or the sum is to be `exact`, which SyncBN cannot be.
    """
    has_any = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    if has_any and exact:
        raise ConfigError(
            "SOLVER.EXACT_SUM is True, but the model has SyncBN, which normalizes over the "
            "processes, however many there are. Set MODEL.RESNETS.NORM and MODEL.FPN.NORM to "
            "FrozenBN, BN or GN, or SOLVER.EXACT_SUM False."
        )
    if has_any and share.total % share.processes:
        raise ConfigError(
            f"the model has SyncBN, which {share.processes} processes must call equally often, but "
            f"an update has {share.total} micro-batches. Start a number of processes that divides "
            f"{share.total}, or set MODEL.RESNETS.NORM and MODEL.FPN.NORM to FrozenBN, BN or GN."
        )


def _kernels(device: str) -> str:
    """Return what the rounding of one micro-batch depends on, besides the versions installed."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{device}, {torch.get_num_threads()} threads"


def local_state(model: nn.Module) -> list[str]:
    """Return why an update depends on the number of processes, for each reason."""
    found = []
    modules = list(model.modules())
    if any(isinstance(module, nn.SyncBatchNorm) for module in modules):
        found.append("SyncBN normalizes over one micro-batch of each process")
    elif any(isinstance(m, _BatchNorm) and m.track_running_stats for m in modules):
        found.append("running statistics of batch norms are those of the first process's images")
    if hasattr(model, NORMALIZER):
        found.append("each process averages the losses' normalizer over its own images")
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a DistributedDataParallel wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def shared_seed(seed: int) -> int:
    """Return the seed, or if it is negative a random one shared by all processes."""
    return seed if seed >= 0 else int(comm.shared_random_seed())
