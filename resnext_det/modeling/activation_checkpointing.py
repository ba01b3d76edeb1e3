"""Activation checkpointing: train in less memory by computing blocks twice."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, cast

import torch
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_NormWithStatistics = nn.modules.batchnorm._NormBase  # batch and instance norms


class CheckpointedStage(nn.Sequential):
    """A stage that keeps few activations and recomputes the others in backward.

    It keeps the input of every few blocks, the square root of their number (1604.06174): the blocks
    in between are recomputed together, and so held together. Gradients and running statistics are
    those of an ordinary stage, to the last bit, and so are the names of parameters.
    `torch.compile` runs such a stage uncompiled.
    """

    # Dynamo does not support the context_fn of checkpoint().
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks one after another."""
        blocks = list(self)
        size = math.ceil(math.sqrt(len(blocks)))
        for start in range(0, len(blocks), size):
            segment = nn.Sequential(*blocks[start : start + size])
            if self.training:
                frozen = _FrozenStatistics(segment)
                contexts = lambda frozen=frozen: (nullcontext(), frozen)  # noqa: E731
                x = checkpoint(segment, x, use_reentrant=False, context_fn=contexts)
            else:
                x = segment(x)
        return x


class CheckpointedRPNHead(StandardRPNHead):
    """Detectron2's RPN head, which recomputes its hidden maps in backward: MODEL.RPN.HEAD_NAME.

    They are as large as the whole pyramid. Gradients are the same to the last bit.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return scores and box deltas of each level, as `StandardRPNHead` does."""
        forward: Any = super().forward
        if self.training:
            forward = partial(checkpoint, forward, use_reentrant=False)
        return cast(tuple[list[Tensor], list[Tensor]], forward(features))


class _FrozenStatistics(AbstractContextManager[None]):
    """Keeps the running statistics of a module's norms unchanged during the second forward pass.

    It can be entered again, once for each backward pass through a retained graph.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms = [m for m in module.modules() if isinstance(m, _NormWithStatistics)]

    def __enter__(self) -> None:
        self._saved = [(norm.momentum, norm.num_batches_tracked) for norm in self._norms]
        for norm in self._norms:
            # The statistics must stay in place: checkpoint() compares the tensors that both
            # passes save for backward.
            norm.momentum = 0.0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = norm.num_batches_tracked.clone()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for norm, (momentum, counter) in zip(self._norms, self._saved):
            norm.momentum = momentum
            norm.num_batches_tracked = counter
