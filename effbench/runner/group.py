"""The processes of one run: what they agree on, and the sums that they make together.

A step's rows are a function of seed and step alone. Each micro-batch is split over the processes
(`stages.batching.window`), and with

    L = sum_r L_r        L_r = (sum of the losses of process r's tokens) / (tokens of the window)

the gradient of the step is the sum of theirs, whatever the lengths of the rows: no mean of means.
Data parallelism is that of Li et al., PyTorch Distributed, VLDB 2020, arXiv 2006.15704. Our choice:
gradients are summed once the backward passes of a step are over, in buckets, and not by a wrapper
around the model, because methods walk the model's layers and run parts of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from effbench.resources.energy import Energy
from effbench.resources.peaks import BUCKET_BYTES

T = TypeVar("T")


class Group:
    """The processes of a run; as it stands here one alone, which sums and agrees on nothing."""

    rank = 0
    """Which of them this is; the first one alone writes."""
    size = 1

    def told(self, value: T) -> T:
        """Return the first process's value."""
        return value

    def any(self, value: bool) -> bool:
        """Return whether a value is true in any process."""
        return value

    def total(self, value: int) -> int:
        """Return the sum of all processes' values."""
        return value

    def most(self, value: int) -> int:
        """Return the largest of all processes' values."""
        return value

    def energy(self, own: Energy) -> Energy:
        """Return the energy of all processes; what the processors share is counted once."""
        return own

    def reduce(self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> None:
        """Sum gradients and a loss over the processes, in place.

        Args:
            parameters: Their `grad`; what has one in any process has one in each afterwards. Parts
                of sharded parameters are left alone: their backward pass has summed them.
            loss: A scalar.
        """


class Processes(Group):
    """Several processes, joined by torch.distributed.

    Args:
        rank: Which one this is.
        size: How many there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def told(self, value: T) -> T:
        """Return the first process's value."""
        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        told: T = held[0]
        return told

    def any(self, value: bool) -> bool:
        """Return whether a value is true in any process."""
        return bool(self.most(int(value)))

    def total(self, value: int) -> int:
        """Return the sum of all processes' values."""
        return int(_reduced(torch.tensor(value)))

    def most(self, value: int) -> int:
        """Return the largest of all processes' values."""
        return int(_reduced(torch.tensor(value), dist.ReduceOp.MAX))

    def energy(self, own: Energy) -> Energy:
        """Return the energy of all processes."""
        joules = torch.tensor(own.joules - own.shared, dtype=torch.float64)
        return replace(own, joules=float(_reduced(joules)) + own.shared)

    def reduce(self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> None:
        """Sum gradients and a loss over the processes, in place."""
        _reduced(loss)
        whole = [p for p in parameters if not isinstance(p, DTensor)]
        if not whole:
            return
        present = torch.tensor([p.grad is not None for p in whole], dtype=torch.int32)
        for parameter, there in zip(whole, _reduced(present).tolist(), strict=True):
            if there and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in buckets([p.grad for p in whole if p.grad is not None]):
            _reduce_bucket(bucket)


def buckets(
    tensors: Sequence[torch.Tensor], most: int = BUCKET_BYTES
) -> Iterator[list[torch.Tensor]]:
    """Yield tensors in order, as many of one dtype together as have `most` bytes at the most.

    A larger one is alone.
    """
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        fits = sum(t.nbytes for t in bucket) + tensor.nbytes <= most
        if bucket and not (fits and bucket[0].dtype == tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _reduce_bucket(bucket: Sequence[torch.Tensor]) -> None:
    """Sum tensors of one dtype over the processes, in place; a single one without a copy."""
    if len(bucket) == 1 and bucket[0].is_contiguous():
        _reduced(bucket[0])
        return
    flat = _reduced(torch.cat([t.flatten() for t in bucket]))
    for tensor, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def _reduced(tensor: torch.Tensor, by: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce a tensor over all processes in place, and return it."""
    dist.all_reduce(tensor, by)
    return tensor
