"""Sums over micro-batches whose bits do not depend on which process computes which.

Float addition rounds, so its order matters: rounding alone makes trainings in one process and in
two differ by a hundredth (relative, worst tensor) after 60 updates of a small Faster R-CNN. Here
the order is a binary tree over the micro-batches: neighbours first, then pairs of them, and so on.
A process adds up the branches that it has; their sums are exchanged and added further.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnext_det.data.stream import Share

# Detectron2's RetinaNet and FCOS keep a moving average of the number of positive anchors in this
# attribute (DenseDetector._ema_update).
NORMALIZER = "loss_normalizer"

_BUCKET = 2**24  # numbers exchanged at once, which limits the memory for it


class TreeSum:
    """A sum of vectors, added in the order of the tree.

    Attributes:
        branches: first micro-batch, number of micro-batches, and sum, of those added so far.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.branches: list[tuple[int, int, Tensor]] = []

    def add(self, first: int, size: int, vector: Tensor) -> None:
        """Add the sum of `size` micro-batches, which follow those added before.

        Earlier vectors are overwritten.
        """
        while self.branches:
            before, same, other = self.branches[-1]
            if same != size or before % (2 * size):
                break
            self.branches.pop()
            first, size, vector = before, 2 * size, other.add_(vector)
        self.branches.append((first, size, vector))

    def total(self) -> Tensor:
        """Return the sum of all."""
        *others, (_, _, total) = self.branches
        for _, _, vector in reversed(others):
            total = vector.add_(total)
        self.branches.clear()
        return total


def branches(streams: range) -> list[tuple[int, int]]:
    """Return the branches (first micro-batch, number) that a process with `streams` can add up."""
    tree = TreeSum()
    for stream in streams:
        tree.add(stream, 1, torch.empty(0))
    return [(first, size) for first, size, _ in tree.branches]


class ExactSum:
    """Sums the gradients of an update, and averages what else its forward passes change.

    That is running statistics of batch norms and RetinaNet's normalizer: each micro-batch starts
    from the same state, and the next update from the mean of the states that it led to.
    """

    def __init__(self, model: nn.Module, share: Share) -> None:
        """Initialize with the model, not wrapped, and what this process computes."""
        self._model = model
        self._share = share
        self._sum = TreeSum()
        self._parameters: list[nn.Parameter] = []
        self._statistics: list[Tensor] = []
        self._before: list[Tensor] = []
        self._normalizer: float | None = None
        self._normalizers: list[float] = []

    def start(self) -> None:
        """Begin an update."""
        self._sum = TreeSum()
        self._parameters = [each for each in self._model.parameters() if each.requires_grad]
        norms = [each for each in self._model.modules() if isinstance(each, _BatchNorm)]
        self._statistics = [
            buffer for norm in norms if norm.training for buffer in norm.buffers(recurse=False)
        ]
        self._before = [buffer.clone() for buffer in self._statistics]
        self._normalizer = getattr(self._model, NORMALIZER, None)
        self._normalizers = []

    @torch.no_grad()
    def add(self, stream: int) -> None:
        """Take a micro-batch's gradients and statistics, and restore the state before it."""
        vectors = [
            torch.zeros_like(each).flatten() if each.grad is None else each.grad.flatten()
            for each in self._parameters
        ]
        vectors += [vectors[0].new_tensor([each.grad is not None for each in self._parameters])]
        for parameter in self._parameters:
            parameter.grad = None
        vectors += [each.flatten() for each in self._statistics if each.is_floating_point()]
        self._sum.add(stream, 1, torch.cat(vectors))
        for buffer, before in zip(self._statistics, self._before):
            buffer.copy_(before)
        if hasattr(self._model, NORMALIZER):
            self._normalizers.append(getattr(self._model, NORMALIZER))
            delattr(self._model, NORMALIZER)
            if self._normalizer is not None:
                setattr(self._model, NORMALIZER, self._normalizer)

    @torch.no_grad()
    def finish(self) -> None:
        """Set gradients to the sum over all micro-batches, and statistics to the mean.

        A collective call.
        """
        share = self._share
        if share.processes > 1:
            self._exchange()
        rest = self._sum.total()
        for parameter in self._parameters:
            found, rest = rest.tensor_split([parameter.numel()])
            parameter.grad = torch.empty_like(parameter)  # in the parameter's memory format
            parameter.grad.copy_(found.view_as(parameter))
        used, rest = rest.tensor_split([len(self._parameters)])
        for parameter, count in zip(self._parameters, used.tolist()):
            if not count:  # no loss depends on it: the optimizer must not decay it
                parameter.grad = None
        for buffer, before in zip(self._statistics, self._before):
            if buffer.is_floating_point():
                found, rest = rest.tensor_split([buffer.numel()])
                buffer.copy_(found.view_as(buffer) / share.total)
            else:  # the number of batches
                buffer.copy_(before + 1)
        if self._normalizers:
            everywhere = comm.all_gather(self._normalizers)
            mean = math.fsum(itertools.chain.from_iterable(everywhere)) / share.total
            setattr(self._model, NORMALIZER, mean)

    def _exchange(self) -> None:
        """Replace this process's branches by the whole sum.

        Each process adds up one slice of the vectors, and sends the result to all. A process with
        one branch sends as much as in a ring all-reduce.
        """
        layout = [branches(self._share.of(process)) for process in range(self._share.processes)]
        vectors = [vector for _, _, vector in self._sum.branches]
        for pieces in zip(*(torch.split(vector, _BUCKET) for vector in vectors)):
            pieces[0].copy_(_summed(torch.stack(pieces), layout))
        self._sum.branches = [(0, self._share.total, vectors[0])]


def _summed(pieces: Tensor, layout: list[list[tuple[int, int]]]) -> Tensor:
    """Return the sum over all processes of their branches (own branches x numbers)."""
    own, length = pieces.shape
    processes = len(layout)
    width = -(-length // processes)
    padded = nn.functional.pad(pieces, (0, processes * width - length))
    sent = padded.view(own, processes, width).transpose(0, 1).flatten()
    every = list(itertools.chain.from_iterable(layout))
    received = pieces.new_empty(len(every) * width)
    sizes = [len(each) * width for each in layout]
    dist.all_to_all_single(received, sent, sizes, [own * width] * processes)
    tree = TreeSum()
    for (first, size), vector in zip(every, received.view(-1, width)):
        tree.add(first, size, vector)
    whole = pieces.new_empty(processes * width)
    dist.all_gather_into_tensor(whole, tree.total())
    return whole[:length]
