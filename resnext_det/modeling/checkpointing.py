"""Activation checkpointing: memory saved in training by computing blocks twice."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_Norm = nn.modules.batchnorm._NormBase  # batch and instance norms


class CheckpointedStage(nn.Sequential):
    """A stage that keeps only the inputs of its blocks, and computes them again going backward.

    The gradients are those of an ordinary stage, and so are the running statistics: batch norms
    do not count the second time. Names of parameters do not change. `torch.compile` leaves such a
    stage as it is.
    """

    # Dynamo knows no context_fn of checkpoint().
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks one after the other."""
        if not self.training:
            out: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return out
        for block in self:
            x = checkpoint(block, x, use_reentrant=False, context_fn=_Contexts(block))
        return x


class _Contexts:
    """Gives `checkpoint` what to enter when a block runs for the first time and again."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _StatisticsAtRest(self.block)


class _StatisticsAtRest(AbstractContextManager[None]):
    """While entered, the batch norms of a block leave their running statistics alone.

    A class, since it is entered again for each backward pass through a retained graph.
    """

    def __init__(self, block: nn.Module) -> None:
        self._norms = [module for module in block.modules() if isinstance(module, _Norm)]

    def __enter__(self) -> None:
        self._usual = [(norm.momentum, norm.num_batches_tracked) for norm in self._norms]
        for norm in self._norms:
            # The statistics must be there as the first time: checkpoint() compares what is saved.
            norm.momentum = 0.0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = norm.num_batches_tracked.clone()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for norm, (momentum, counter) in zip(self._norms, self._usual):
            norm.momentum = momentum
            norm.num_batches_tracked = counter
