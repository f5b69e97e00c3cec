"""What a decoding step is made of: modules, compiled functions, or kernels of several at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from effbench.nn.decode.cache import StaticLayer, Store

Normed = tuple[torch.Tensor, torch.Tensor]
"""The residual stream and its normed form, [B, 1, d] each."""
Products = tuple[torch.Tensor, list[torch.Tensor]]
"""The residual stream, and what each of several linears makes of its norm."""


@dataclass(frozen=True)
class Pointwise:
    """The functions that a step needs beside attention."""

    norm: Callable[[Any, torch.Tensor, torch.Tensor | None], Normed]
    """From an RMS norm's module, the residual stream and what a block adds to it to both."""
    turn: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """From queries or keys [B, H, *, D], cosine and sine [B, 1, 1, D] to the turned ones."""
    gate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """From the two inner products of a gated MLP to what its last product takes."""
    move: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """From a start [B, 1, d], a change and its scale to their sum, rounded as the start is."""

    def project(
        self, norm: Any, hidden: torch.Tensor, added: torch.Tensor | None, linears: Sequence[Any]
    ) -> Products:
        """Return the sum of the residual stream and `added`, and the products of its norm."""
        hidden, x = self.norm(norm, hidden, added)
        return hidden, [m(x) for m in linears]

    def gated(self, mlp: Any, hidden: torch.Tensor, added: torch.Tensor | None) -> Normed:
        """Return the same sum, and what the last product of a gated MLP takes.

        Args:
            mlp: Has `norm`, `gate` and `up`.
            hidden: The residual stream, [B, 1, d].
            added: What the block adds to it before its MLP.
        """
        hidden, x = self.norm(mlp.norm, hidden, added)
        return hidden, self.gate(mlp.gate(x), mlp.up(x))

    def product(self, linear: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the product of one linear."""
        out: torch.Tensor = linear(x)
        return out

    def attend(
        self,
        states: Sequence[torch.Tensor],
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: StaticLayer,
        store: Store,
        scaling: float,
    ) -> torch.Tensor | None:
        """Turn, store and attend at once, [B, 1, H D]; None where the caller has to do each.

        Args:
            states: Queries, keys and values of the new position, not turned yet.
            angles: Cosine and sine of its rotary position.
            cache: Where its key and value go.
            store: Knows at which place.
            scaling: What scores are multiplied by.
        """
        return None


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x [B, H, *, D] at its rotary position."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up."""
    return F.silu(gate) * up


def move(start: torch.Tensor, change: torch.Tensor, scale: float) -> torch.Tensor:
    """Return start + scale * change in the wider of their dtypes, rounded to that of the start."""
    return (start + scale * change).to(start.dtype)


def module_norm(norm: Any, hidden: torch.Tensor, added: torch.Tensor | None) -> Normed:
    """Add, and call the norm's module."""
    hidden = hidden if added is None else hidden + added
    return hidden, norm(hidden)


def rms_norm(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> Normed:
    """Add, and return x / rms(x) in float32, rounded, times the weight."""
    hidden = hidden if added is None else hidden + added
    wide = hidden.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return hidden, weight * normed.to(hidden.dtype)


EAGER = Pointwise(module_norm, turn, gate, move)


def fused(make: Callable[[Any], Any], kind: type[Pointwise] = Pointwise) -> Pointwise:
    """Return functions that `make` made of plain ones."""
    norm = make(rms_norm)
    return kind(
        lambda module, hidden, added: norm(hidden, added, module.weight, module.variance_epsilon),
        make(turn),
        make(gate),
        make(move),
    )
