"""What a model under a method needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effbench.api.shape import Shape


@dataclass(frozen=True)
class Cost:
    """What a model under a method needs, counted from shapes alone."""

    params: int
    """All parameters, adapters included, tied ones once."""
    trainable: int
    """Parameters that receive gradients."""
    resident_bytes: int
    """Bytes of all weights as they lie in memory, scales and adapters included."""
    bytes_per_token: float
    """Weight bytes read to decode one token at batch 1 (embedding rows not counted)."""
    flops_per_token: float
    """Forward FLOPs of one token at context 0, matrix products only."""
    kv_bytes_per_token: float
    """Bytes that one more token adds to the key/value cache, on average."""
    saving: Literal["none", "physical", "simulated"] = "none"
    """Whether smaller figures here are real on the device or only modelled."""


def dense_cost(shape: Shape, weight_bytes: int) -> Cost:
    """Return the cost of an unchanged model whose weights take `weight_bytes` bytes each."""
    head = shape.vocab_size * shape.hidden_size
    return Cost(
        params=shape.params,
        trainable=0,
        resident_bytes=shape.params * weight_bytes,
        bytes_per_token=(shape.linear_params + head + shape.norm_params) * weight_bytes,
        flops_per_token=shape.flops_per_token(),
        kv_bytes_per_token=shape.kv_bytes_per_token(weight_bytes),
    )
