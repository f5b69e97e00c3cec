"""The shape of a decoder-only transformer, and what can be counted from it without weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from effbench.schema import PositiveInt

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linear layers of a Llama-style decoder block, in the order they run."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-style model; every count below is exact for it."""

    hidden_size: PositiveInt
    """Width d of the residual stream."""
    intermediate_size: PositiveInt
    """Inner width of the gated MLP."""
    num_layers: PositiveInt
    """Number of decoder blocks L."""
    num_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt
    """Key/value heads (grouped-query attention when fewer than the query heads)."""
    head_dim: PositiveInt
    """Width of one head."""
    vocab_size: PositiveInt
    """Rows of the embedding."""
    max_positions: PositiveInt = 2048
    """Longest context the positions were made for, in tokens."""
    tied: bool = False
    """Whether the output head shares the embedding's storage."""
    rope_theta: float = 10000.0
    """Base of the rotary position angles."""
    rms_eps: float = 1e-5
    """Epsilon of the RMS norms."""

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Return `(d_in, d_out)` of each linear of one block."""
        d, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (d, q),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (q, d),
            "gate_proj": (d, inner),
            "up_proj": (d, inner),
            "down_proj": (inner, d),
        }

    def linears(self) -> Iterator[tuple[int, str, int, int]]:
        """Yield `(layer, name, d_in, d_out)` of every decoder linear."""
        for layer in range(self.num_layers):
            for name, (d_in, d_out) in self.linear_sizes().items():
                yield layer, name, d_in, d_out

    @property
    def linear_params(self) -> int:
        """Weights in all decoder linears."""
        return self.num_layers * sum(i * o for i, o in self.linear_sizes().values())

    @property
    def embedding_params(self) -> int:
        """Weights in the embedding and, when it is not tied, the head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def norm_params(self) -> int:
        """Weights in the two norms of every block and the final one."""
        return (2 * self.num_layers + 1) * self.hidden_size

    @property
    def params(self) -> int:
        """All weights, tied ones counted once."""
        return self.linear_params + self.embedding_params + self.norm_params

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Return the bytes that one token adds to a full key/value cache."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes

    def flops_per_token(self, context: int = 0) -> int:
        """Return forward FLOPs of one token that attends to `context` positions.

        Matrix products only (multiply-adds times two), the head included.
        """
        products = 2 * (self.linear_params + self.vocab_size * self.hidden_size)
        return products + 4 * self.num_layers * self.num_heads * self.head_dim * context
