"""What tests of evicting caches share: small settings of each, and a first layer by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from helpers import tiny_model

from effbench.api import registry
from effbench.methods.evicts import Evicts
from effbench.nn.decode.staged import WholeSession

SMALL = {"window": 3, "sinks": 2, "kernel": 3, "future": 20, "skip_layers": ()}
"""Settings with which something is evicted of a few tokens, where a method has them."""
BUDGET = 8


def evicting() -> Iterator[type[Evicts]]:
    """Yield every method that evicts."""
    for name in registry.names("methods"):
        cls = registry.find("methods", name)
        if issubclass(cls, Evicts):
            yield cls


def small(cls: type[Evicts], budget: int = BUDGET, **settings: Any) -> Evicts:
    known = {f.name for f in fields(cls)}
    own = {name: value for name, value in SMALL.items() if name in known}
    return cls(budget=(budget,), **{**own, **settings})


def exact_model(dtype: torch.dtype = torch.float64) -> Any:
    return tiny_model(dtype=dtype).eval().requires_grad_(False)


class FirstLayer(NamedTuple):
    """What the first layer makes of one sequence; nothing is shared with what is tested."""

    projected: torch.Tensor
    """Queries before their turn, [T, H, d]."""
    queries: torch.Tensor
    keys: torch.Tensor
    """[T, G, d], turned, as queries are."""
    values: torch.Tensor

    @classmethod
    def of(cls, model: Any, ids: torch.Tensor) -> FirstLayer:
        layer = model.model.layers[0]
        own, normed = layer.self_attn, layer.input_layernorm(model.model.embed_tokens(ids))
        q, k, v = (
            m(normed).double().view(len(ids), -1, own.head_dim)
            for m in (own.q_proj, own.k_proj, own.v_proj)
        )
        turned = (torch.stack([turn(x, t, model.config) for t, x in enumerate(s)]) for s in (q, k))
        return cls(q, *turned, v)

    def weights(self, asking: int) -> torch.Tensor:
        """Return what one query sees of the entries up to its own, [H, T], zero behind."""
        length, heads, size = self.queries.shape
        group = heads // self.keys.shape[1]
        found = torch.zeros(heads, length, dtype=torch.float64)
        for h in range(heads):
            products = self.keys[: asking + 1, h // group] @ self.queries[asking, h]
            found[h, : asking + 1] = (products / size**0.5).softmax(0)
        return found


def turn(x: torch.Tensor, place: int, config: Any) -> torch.Tensor:
    """Return [..., d] turned at a place; complex numbers turn pairs of features."""
    size = x.shape[-1]
    theta = config.rope_parameters["rope_theta"]
    rates = 1 / theta ** (torch.arange(0, size, 2).float() / size)
    angles = rates * place
    pairs = torch.complex(x[..., : size // 2], x[..., size // 2 :])
    pairs = pairs * torch.complex(angles.cos().double(), angles.sin().double())
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def held_columns(session: WholeSession, first: FirstLayer, row: int = 0) -> list[list[int]]:
    """Return which tokens each head of the first layer holds, by the keys that it holds."""
    layer: Any = session.staged.cache.layers[0]
    layer = getattr(layer, "inner", layer)
    keys = layer.keys[row].double()
    found = []
    for head, held in enumerate(keys):
        gaps = (held[:, None] - first.keys[:, head]).norm(dim=2)
        assert (gaps.min(1).values < 1e-9).all()  # turned at their own positions
        found.append(gaps.argmin(1).tolist())
    return found


def top(scores: torch.Tensor, count: int) -> list[int]:
    """Return the places of the largest numbers, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda j: -float(scores[j]))[:count])
