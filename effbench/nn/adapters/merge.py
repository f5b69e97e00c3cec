"""Adapters added to the weights that they stand beside: for good in a file, or for a while.

A model with adapters decodes more slowly than the plain model that it could be merged into: two
more products a layer, and no single kernel for a step. What merging costs is rounding, for the sum
has the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from effbench.nn.adapters import peft_lora
from effbench.nn.adapters.deep import DeepLinear
from effbench.nn.adapters.dora import DoRALinear
from effbench.nn.adapters.lowrank import LowRankLinear
from effbench.nn.llama.surgery import decoder_linears, replace_module
from effbench.nn.llama.walk import fresh_norm, untouched
from effbench.nn.quant.embedding import embedding_dtype, expand_embedding
from effbench.nn.quant.linears import QuantisedLinear
from effbench.util.errors import UserError


def update_of(linear: torch.nn.Module) -> tuple[torch.nn.Module, torch.Tensor] | None:
    """Return what an adapter is put on and its update [d_out, d_in]; None where there is none."""
    if isinstance(linear, LowRankLinear):
        a, b = (factor.detach().float() for factor in linear.active_factors())
        return linear.base, linear.alpha / linear.control.active * (b @ a)
    if isinstance(linear, DoRALinear):
        dense = merged_weight(linear.base)
        return linear.base, linear.direction(dense) * linear.gains()[:, None] - dense
    if isinstance(linear, DeepLinear):
        return linear.base, linear.delta().detach().float()
    return peft_lora.peft_update(linear)


def is_adapted(module: torch.nn.Module) -> bool:
    """Whether a module is a linear with an adapter beside it."""
    return isinstance(module, LowRankLinear | DoRALinear | DeepLinear) or peft_lora.holds(module)


def merged_weight(linear: torch.nn.Module) -> torch.Tensor:
    """Return the dense weight [d_out, d_in] of a linear layer in float32, its adapter added."""
    found = update_of(linear)
    if found is not None:
        return merged_weight(found[0]) + found[1]
    if isinstance(linear, QuantisedLinear):
        return linear.dense_weight(torch.float32)
    weight: Any = linear.weight
    dense: torch.Tensor = weight.detach().float()
    return dense


@contextmanager
def merged(model: torch.nn.Module) -> Iterator[int]:
    """Be the plain model inside the context, in the dtype of the weights; yield what was merged.

    Every module with an adapter gives its place to a plain linear, and a last norm that is held in
    another dtype to one that is not. After the context the same modules are back. Inside it both
    are in memory.

    Raises:
        UserError: When an adapter stands beside packed weights, which would have to be expanded.
    """
    before: list[tuple[str, torch.nn.Module]] = []
    try:
        for name, linear in list(decoder_linears(model)):
            if update_of(linear) is not None:
                before.append((name, linear))
                replace_module(model, name, _plain_linear(name, linear))
        count = len(before)
        norm = _plain_norm(model)
        if norm is not None:
            before.append(("model.norm", model.get_submodule("model.norm")))
            replace_module(model, "model.norm", norm)
        yield count
    finally:
        for name, module in before:
            replace_module(model, name, module)


def merge_for_good(model: torch.nn.Module) -> int:
    """Make every linear with an adapter or packed weights a plain one, in the dtype of the
    embedding; return how many adapters there were.

    A last norm that is held in another dtype, or watched, becomes a plain one too.

    Args:
        model: Changed in place, one linear after the other, and frozen.
    """
    root: Any = model
    dtype = embedding_dtype(root)
    expand_embedding(root)
    count, inside = 0, "\n"
    for name, linear in list(model.named_modules()):
        mine = is_adapted(linear) or isinstance(linear, QuantisedLinear)
        if name.startswith(inside) or not mine:
            continue
        inside = f"{name}."
        count += is_adapted(linear)
        replace_module(model, name, _dense_linear(linear, dtype))
    last = getattr(getattr(model, "model", None), "norm", None)
    if count and hasattr(last, "variance_epsilon"):
        norm = _plain_norm(model)
        if norm is not None:
            replace_module(model, "model.norm", norm)
    return count


def bias_of(linear: Any) -> torch.Tensor | None:
    """Return the bias [d_out] of a linear, under whatever adapters it has; None without one."""
    while is_adapted(linear):
        found = update_of(linear)
        assert found is not None
        linear = found[0]
    bias: torch.Tensor | None = linear.bias
    return bias


def _dense_linear(linear: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Linear:
    weight, bias = merged_weight(linear).to(dtype), bias_of(linear)
    new = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    new.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        new.bias = torch.nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return new.train(linear.training)


def _plain_linear(name: str, linear: torch.nn.Module) -> torch.nn.Linear:
    found = update_of(linear)
    assert found is not None
    base: Any = found[0]
    if type(base) is not torch.nn.Linear:
        raise UserError(
            f"{name} is a {type(base).__name__}, which cannot take its adapter in.",
            "Only adapters on dense weights can be merged.",
        )
    d_out, d_in = base.weight.shape
    new = torch.nn.Linear(d_in, d_out, bias=base.bias is not None, device="meta")
    weight = (base.weight.detach().float() + found[1]).to(base.weight.dtype)
    new.weight = torch.nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        new.bias = base.bias
    return new.train(linear.training)


def _plain_norm(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the last norm in the dtype of the embedding; None where it is so already."""
    root: Any = model
    norm, dtype = root.model.norm, embedding_dtype(root)
    if norm.weight.dtype == dtype and untouched(norm):
        return None
    return fresh_norm(norm, dtype).requires_grad_(False)
