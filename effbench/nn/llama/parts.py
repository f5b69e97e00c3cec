"""What a step of our engine knows of a block: the modules that it calls, in the order they run.

A module that stands in a block offers its part itself (`Offers`). For those of transformers there
are `attention_of` and `mlp_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Attention:
    """The modules of one block's attention, in the order they run.

    Those whose states come from another block are None.
    """

    norm: Any
    q: Any
    k: Any
    v: Any
    o: Any
    head_dim: int
    scaling: float
    """What scores are multiplied by."""
    groups: int
    """Query heads of each key/value head."""
    source: int | None = None
    """The block that the states come from which it does not make."""
    mixer: Mixes | None = None
    """What mixes values otherwise than by a softmax over scores; None for that."""

    def linears(self) -> tuple[torch.nn.Module, ...]:
        """Return the linears that are there."""
        return tuple(m for m in (self.q, self.k, self.v, self.o) if m is not None)

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.o.in_features) // self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.heads // self.groups


@dataclass(frozen=True)
class MLP:
    """The modules of one block's gated MLP, in the order they run."""

    norm: Any
    gate: Any
    up: Any
    down: Any

    def linears(self) -> tuple[torch.nn.Module, ...]:
        """Return the three linears."""
        return self.gate, self.up, self.down

    @property
    def inner(self) -> int:
        """Neurons."""
        return int(self.gate.out_features)


@dataclass(frozen=True)
class Block:
    """A decoder block. What was pruned away altogether is None."""

    attention: Attention | None
    mlp: MLP | None

    def parts(self) -> list[Attention | MLP]:
        """Return what is there, in the order it runs."""
        return [part for part in (self.attention, self.mlp) if part is not None]


class Mixes(Protocol):
    """What a block has in the place of a softmax over scores."""

    def mixed(
        self,
        inputs: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        cache: Any,
        product: Callable[[torch.nn.Linear, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Return what the output projection reads, [B, W, H D]; the cache takes the states in.

        Args:
            inputs: What the projections read, normed, [B, W, d].
            states: Queries [B, H, W, D], keys and values [B, G, W, D], turned.
            positions: Of the tokens, none of them padding, [B, W].
            cache: Of transformers.
            product: Of a linear of the mixer's own and what it reads, [..., K].
        """


class Offers(Protocol):
    """What a module has that takes the place of a block's attention or MLP, to be stepped through.

    Without it, or where `forward` is overridden below it, the model is decoded by forward passes.
    """

    def decode_part(self, norm: Any) -> Attention | MLP | None:
        """Return the modules that make its output from the norm's; None when it adds nothing."""

    def why_not_stepped(self) -> str:
        """Return what keeps a step from it as it is now; empty when nothing does."""


def offers(module: torch.nn.Module) -> bool:
    """Whether a module says itself what a step calls, and no subclass changed its forward."""
    order = type(module).__mro__
    own = [next((c for c in order if n in vars(c)), None) for n in ("decode_part", "forward")]
    return own[0] is not None and own[1] is not None and issubclass(own[0], own[1])


def attention_of(own: Any, norm: Any, source: int | None = None) -> Attention:
    """Return the part of an attention whose modules have Llama's names.

    Args:
        own: The attention.
        norm: What it reads through.
        source: The block that the states come from which it does not make.
    """
    q, k, v, o = (getattr(own, f"{name}_proj", None) for name in "qkvo")
    return Attention(norm, q, k, v, o, own.head_dim, own.scaling, own.num_key_value_groups, source)


def mlp_of(own: Any, norm: Any) -> MLP:
    """Return the part of a gated MLP whose modules have Llama's names."""
    return MLP(norm, own.gate_proj, own.up_proj, own.down_proj)
