"""A layer's cache of the coordinates of keys and values in a few directions.

    k = U z + b,   z = U^T (k - b)        U [D, r] with orthonormal columns, D = G d

for the keys k [D] of a token, all heads G of d elements at once and not turned yet, and for its
values in the same way. Where a projection is U C x + b, z is C x: nothing is lost. Kept are z alone
(Zhang et al., LoRC, arXiv 2410.03111). Keys are made of it for every token at every step, and
turned at their places; values are not, for

    sum_s p_s (U_g z_s + b_g) = U_g (sum_s p_s z_s) + b_g      U_g [d, r]: the rows of head g

so that a few queries mix coordinates and only what they mixed is expanded, if the output projection
has not absorbed U (`effbench.nn.llama.factorised`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from effbench.nn.decode.handing import HandingLayer
from effbench.nn.decode.view import LayerCache, View
from effbench.nn.llama.factorised import AbsorbedOutput


class Basis(NamedTuple):
    """The directions that a cache knows of."""

    up: torch.Tensor
    """U, [D, r]."""
    bias: torch.Tensor | None
    """b, [D]."""
    heads: int
    """G."""

    @classmethod
    def of(cls, attention: Any, name: str, rank: int) -> Basis | None:
        """Return that of a projection of an attention layer; None where all is kept as it is."""
        linear, width = getattr(attention, name), attention.head_dim
        if rank >= linear.out_features:
            return None
        return cls(linear.up.weight[:, :rank], linear.up.bias, linear.out_features // width)

    def coordinates(self, states: torch.Tensor) -> torch.Tensor:
        """Return z, [B, 1, W, r], of keys or values [B, G, W, d]."""
        flat = states.transpose(1, 2).flatten(2)
        centred = flat if self.bias is None else flat - self.bias
        return (centred @ self.up)[:, None]

    def states(self, z: torch.Tensor) -> torch.Tensor:
        """Return keys or values [B, G, S, d] of z [B, 1, S, r]."""
        flat = torch.nn.functional.linear(z[:, 0], self.up, self.bias)
        return flat.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def expanded(self, mixed: torch.Tensor) -> torch.Tensor:
        """Return mixed values [B, W, H, d] of mixed coordinates [B, W, H, r]."""
        rows, width, heads, rank = mixed.shape
        grouped = mixed.view(rows, width, self.heads, -1, rank)
        own = self.up.view(self.heads, -1, rank).transpose(1, 2)
        out = torch.matmul(grouped.transpose(1, 2).flatten(2, 3), own)
        if self.bias is not None:
            out = out + self.bias.view(self.heads, 1, -1)
        out = out.view(rows, self.heads, width, heads // self.heads, -1).transpose(1, 2)
        return out.flatten(2, 3)


class LatentLayer(HandingLayer):
    """Has coordinates of keys and values kept, [B, 1, S, r]; what has no basis stays as it came.

    Args:
        attention: The layer whose projections say the directions.
        keys: Rank of keys.
        values: Rank of values.
        inner: Holds coordinates.
    """

    def __init__(self, attention: Any, keys: int, values: int, inner: LayerCache) -> None:
        super().__init__(inner)
        inner.final = False
        self.key_basis = Basis.of(attention, "k_proj", keys)
        self.value_basis = Basis.of(attention, "v_proj", values)
        output = attention.o_proj
        self.absorbing = output if isinstance(output, AbsorbedOutput) else None
        """Takes coordinates that were mixed, so that they are not expanded."""
        self.query_heads = attention.o_proj.in_features // attention.head_dim

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> View:
        """Take in keys and values [B, G, W, d] and return what their queries see."""
        width = keys.shape[2]
        new_keys = self.key_basis.coordinates(keys) if self.key_basis else keys
        new_values = self.value_basis.coordinates(values) if self.value_basis else values
        held = self.hand_on(new_keys, new_values, self.empty)
        made = self.key_basis.states(held.keys) if self.key_basis else held.keys
        if self.value_basis is None:
            return replace(held, keys=made)
        if self._rebuilds(width, self.value_basis):
            return replace(held, keys=made, values=self.value_basis.states(held.values))
        shared = held.values.expand(-1, keys.shape[1], -1, -1)
        expand = self.absorbing.marked if self.absorbing else self.value_basis.expanded
        return replace(held, keys=made, values=shared, expand=expand)

    def _rebuilds(self, width: int, basis: Basis) -> bool:
        """Whether it takes fewer products to make values than to let so many queries mix z."""
        size, rank = basis.up.shape
        return width * self.query_heads * (rank - size // basis.heads) > rank * size
