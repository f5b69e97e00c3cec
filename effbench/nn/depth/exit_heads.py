"""Exits with a norm and a head of their own, beside those of the model.

They are a submodule of the model. Inside `with_own_head` the model is the sub-model that ends at
one of them: its own norm and head stand where the model's stood, and the others are away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from effbench.nn.llama.walk import fresh_norm
from effbench.nn.quant.linears import QuantisedLinear

NAME = "exit_heads"
"""Of the submodule."""


class ExitHead(torch.nn.Module):
    """Norm and head of one exit: h [..., d] to logits [..., V].

    Args:
        norm: What the norm starts from.
        head: What the head starts from; its weight is copied even where it is the embedding's.
        dtype: Of the copies.
    """

    def __init__(self, norm: Any, head: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = fresh_norm(norm, dtype)
        self.head = torch.nn.Linear(
            head.in_features, head.out_features, bias=head.bias is not None, device="meta"
        )
        starts = dict(head.named_parameters())
        if isinstance(head, QuantisedLinear):
            starts["weight"] = head.dense_weight(dtype)
        for name, start in starts.items():
            copied = start.detach().to(dtype, copy=True)
            setattr(self.head, name, torch.nn.Parameter(copied))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of the exit."""
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits


def attach_heads(model: torch.nn.Module, depths: Sequence[int]) -> None:
    """Give each of `depths` a norm and a head in float32, started from the model's."""
    root: Any = model
    heads = {str(n): ExitHead(root.model.norm, root.lm_head, torch.float32) for n in depths}
    model.add_module(NAME, torch.nn.ModuleDict(heads))


def cast_heads(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Return the model with its exits in `dtype`."""
    model.get_submodule(NAME).to(dtype)
    return model


def own_head(model: torch.nn.Module, depth: int) -> ExitHead | None:
    """Return the norm and head that an exit has for itself; None where it shares the model's."""
    heads: Any = getattr(model, NAME, None)
    if heads is None or str(depth) not in heads:
        return None
    found: ExitHead = heads[str(depth)]
    return found


@contextmanager
def with_own_head(model: torch.nn.Module, depth: int) -> Iterator[None]:
    """Let the model end with the norm and head of `depth`, all exits' own ones put away.

    At a depth without any the model's stay.
    """
    root: Any = model
    own, heads = own_head(model, depth), getattr(model, NAME)
    before = root.model.norm, root.lm_head
    delattr(model, NAME)
    try:
        if own is not None:
            root.model.norm, root.lm_head = own.norm, own.head
        yield
    finally:
        root.model.norm, root.lm_head = before
        model.add_module(NAME, heads)
