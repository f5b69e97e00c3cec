"""What one of several devices holds of a training, counted from shapes.

none    all weights, gradients and states, and a bucket of gradients while they are summed
fsdp    rest + blocks / N of each, two gathered blocks, and the whole gradients of one
"""

from __future__ import annotations

import math
from dataclasses import replace

from effbench.api.cost import Cost, cost_of
from effbench.api.shape import ModelShape
from effbench.api.spec import Parallelism
from effbench.resources.peaks import BUCKET_BYTES, GRADIENT_BYTES

GATHERED = 2
"""Blocks that are whole at a time: the one that is computed, and the next, fetched meanwhile."""


def held_by_one(cost: Cost, shape: ModelShape, dtype: str, parallelism: Parallelism) -> Cost:
    """Return the cost of what one device holds.

    Args:
        cost: Of the model as it trains.
        shape: Its shape.
        dtype: Compute dtype.
        parallelism: Over how many devices it is spread, and how.
    """
    count = parallelism.devices
    if parallelism.sharding == "none" or count == 1:
        return cost
    rest = cost_of(shape.only(()), dtype)

    def part(whole: int, kept: int) -> int:
        return kept + math.ceil((whole - kept) / count)

    return replace(
        cost,
        trainable=part(cost.trainable, rest.trainable),
        resident_bytes=part(cost.resident_bytes, rest.resident_bytes),
    )


def bucket_bytes(cost: Cost, shape: ModelShape, dtype: str, parallelism: Parallelism) -> int:
    """Return the bytes of the copies in which gradients are summed; see `held_by_one`."""
    if parallelism.devices == 1:
        return 0
    whole = cost.trainable
    if parallelism.sharding != "none":
        whole = cost_of(shape.only(()), dtype).trainable
    return min(BUCKET_BYTES, whole * GRADIENT_BYTES)


def gathered_bytes(cost: Cost, shape: ModelShape, dtype: str, parallelism: Parallelism) -> int:
    """Return the bytes of whole blocks, and of one's gradients; see `held_by_one`."""
    if parallelism.sharding == "none" or parallelism.devices == 1:
        return 0
    blocks = [cost_of(shape.only((i,)), dtype) for i in range(shape.num_layers)]
    rest = cost_of(shape.only(()), dtype)
    weights = max(b.resident_bytes for b in blocks) - rest.resident_bytes
    trained = max(b.trainable for b in blocks) - rest.trainable
    return GATHERED * weights + trained * GRADIENT_BYTES
