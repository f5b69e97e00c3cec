"""The shape of a decoder-only transformer, and what can be counted from it without weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from effbench.api.schema import NonNegativeInt, PositiveInt

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linear layers of a Llama-style decoder block, in the order they run."""

SLICED = "sliced_llama"
"""`model_type` in the config of a saved model whose layers differ in size."""

LAYERS_DIFFER = (
    "The layers of this model differ in size or share states, so a number of layers is no depth.",
    "Choose another method, or a model whose layers are alike.",
)
"""Message and hint of what works with equal layers alone."""


@dataclass(frozen=True)
class LayerSize:
    """Sizes of one decoder block; a block may have no head or no MLP neuron at all."""

    num_heads: NonNegativeInt
    """Query heads."""
    num_kv_heads: NonNegativeInt
    """Key/value heads."""
    intermediate_size: NonNegativeInt
    """Neurons of the gated MLP."""


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

    def layer(self, index: int) -> LayerSize:
        """Return the sizes of one decoder block."""
        return LayerSize(self.num_heads, self.num_kv_heads, self.intermediate_size)

    def cached_heads(self, layer: int) -> tuple[int, int]:
        """Return how many heads of keys and of values one block puts in the cache."""
        heads = self.layer(layer).num_kv_heads
        return heads, heads

    @property
    def tail(self) -> int:
        """Layers at the top that read a prompt's last position alone."""
        return 0

    def linear_sizes(self, layer: int = 0) -> dict[str, tuple[int, int]]:
        """Return `(d_in, d_out)` of each linear of one block."""
        size, d = self.layer(layer), self.hidden_size
        q, kv = size.num_heads * self.head_dim, size.num_kv_heads * self.head_dim
        inner = size.intermediate_size
        sizes = {
            "q_proj": (d, q),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (q, d),
            "gate_proj": (d, inner),
            "up_proj": (d, inner),
            "down_proj": (inner, d),
        }
        return {name: (i, o) for name, (i, o) in sizes.items() if i * o}

    def linears(self) -> Iterator[tuple[int, str, int, int]]:
        """Yield `(layer, name, d_in, d_out)` of every decoder linear."""
        for layer in range(self.num_layers):
            for name, (d_in, d_out) in self.linear_sizes(layer).items():
                yield layer, name, d_in, d_out

    @property
    def linear_params(self) -> int:
        """Weights in all decoder linears."""
        return sum(i * o for _, _, i, o in self.linears())

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
        heads = sum(sum(self.cached_heads(i)) for i in range(self.num_layers))
        return heads * self.head_dim * element_bytes

    def flops_per_token(self, context: int = 0) -> int:
        """Return forward FLOPs of one token that attends to `context` positions.

        Matrix products only (multiply-adds times two), the head included.
        """
        products = 2 * (self.linear_params + self.vocab_size * self.hidden_size)
        heads = sum(self.layer(i).num_heads for i in range(self.num_layers))
        return products + 4 * heads * self.head_dim * context


@dataclass(frozen=True)
class SlicedShape(Shape):
    """Sizes of a model whose blocks differ, as pruning leaves them.

    `num_heads`, `num_kv_heads` and `intermediate_size` are the largest of any block.
    """

    layers: tuple[LayerSize, ...] = ()
    """Sizes of each block."""

    def layer(self, index: int) -> LayerSize:
        """Return the sizes of one decoder block."""
        return self.layers[index]


def sliced_shape(shape: Shape, hidden_size: int, layers: Sequence[LayerSize]) -> Shape:
    """Return `shape` with another width and other blocks; a plain shape where they are all alike.

    Args:
        shape: Gives everything else.
        hidden_size: Width of the residual stream.
        layers: Sizes of each block.
    """
    values: dict[str, Any] = {f.name: getattr(shape, f.name) for f in fields(Shape)}
    values |= {
        "hidden_size": hidden_size,
        "num_layers": len(layers),
        "num_heads": max(1, *(x.num_heads for x in layers)),
        "num_kv_heads": max(1, *(x.num_kv_heads for x in layers)),
        "intermediate_size": max(1, *(x.intermediate_size for x in layers)),
    }
    plain = Shape(**values)
    if all(x == plain.layer(0) for x in layers):
        return plain
    return SlicedShape(**values, layers=tuple(layers))


SIZES = "sizes.json"
"""File of an artefact that states the sizes of a sliced model."""


def slice_in(shape: Shape, folder: Path | None) -> Shape | None:
    """Return `shape` with the sizes that an artefact states, None where there is no artefact."""
    if folder is None or not (folder / SIZES).is_file():
        return None
    sizes = json.loads((folder / SIZES).read_text())
    return sliced_shape(shape, sizes["hidden_size"], [LayerSize(*s) for s in sizes["layers"]])


def planned_slice(shape: Shape, keep: float) -> Shape:
    """Return a shape with at most the share `keep` of the linear weights, all dimensions kept.

    Each layer loses the same share: neurons first, then key/value groups with their query heads.
    """
    layers = []
    for index in range(shape.num_layers):
        size = shape.layer(index)
        queries = size.num_heads // max(1, size.num_kv_heads)
        group = (2 * queries + 2) * shape.head_dim
        width = keep * (group * size.num_kv_heads + 3 * size.intermediate_size)
        groups = min(size.num_kv_heads, int(width / group))
        neurons = int((width - group * groups) / 3)
        layers.append(LayerSize(groups * queries, groups, neurons))
    return sliced_shape(shape, shape.hidden_size, layers)
