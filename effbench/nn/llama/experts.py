"""Experts as plain linears: what transformers holds as one tensor for all experts of a layer.

With the K experts that the router chooses for a token x, e_1 .. e_K, and their weights p_k:

    y = sum over k of p_k W_down[e_k] g(W_up[e_k] x)

g is the model's own gate. Each expert's W_up [d_up, d] and W_down [d, m] are linears with names, so
that adapters, quantisers and calibration find them as they find those of any MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

INTO = ("gate_up_proj", "up_proj")
"""Names of what experts read their input with; a model has one of them."""
OUT = "down_proj"


class Expert(nn.Module):
    """One expert: two linears, and the gate between them that all experts of a layer share.

    Args:
        gate: What transformers computes between the two products, [n, d_up] to [n, m].
        linears: The two by their names, in the order they run.
    """

    gate: Any

    def __init__(self, gate: Any, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        vars(self)["gate"] = gate  # no child, whatever it is
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, d] for [n, d]."""
        into, out = self._modules.values()
        assert into is not None
        assert out is not None
        found: torch.Tensor = out(self.gate(into(x)))
        return found


class Experts(nn.ModuleList):
    """The experts of a layer, in the place of the module that holds them as single tensors.

    Args:
        stock: That module; its tensors are taken from it.
    """

    only: torch.Tensor | None = None
    """Which of a pass's tokens go through experts, [N]; None is all."""

    def __init__(self, stock: Any) -> None:
        made = list(_linears(stock))
        stock._parameters.clear()
        gate = stock._apply_gate if stock.has_gate else stock.act_fn
        super().__init__(Expert(gate, linears) for linears in made)
        self.train(stock.training)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return what the chosen experts make of tokens, [N, d].

        Each token's sum is taken in the order of its choices, whatever the other tokens are.

        Args:
            hidden_states: [N, d].
            top_k_index: The experts of each token, [N, K].
            top_k_weights: How much each of them counts, [N, K].
        """
        if hidden_states.is_meta:
            return torch.empty_like(hidden_states)
        chosen = top_k_index
        if self.only is not None:
            chosen = chosen.masked_fill(~self.only[:, None], len(self))
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self)).tolist()[: len(self)]
        order = order[: sum(counts)]
        parts = hidden_states[order // top_k_index.shape[1]].split(counts)
        made = [e(x) for e, x in zip(self, parts, strict=True) if len(x)]
        out = hidden_states.new_zeros(top_k_index.numel(), hidden_states.shape[1])
        if made:
            out = out.index_copy(0, order, torch.cat(made).to(out.dtype))
        each = out.view(*top_k_index.shape, -1) * top_k_weights[..., None]
        return each.sum(1).to(hidden_states.dtype)


def split_experts(model: nn.Module) -> None:
    """Put plain linears in the place of the experts that are held as single tensors.

    Experts that transformers computes in another way than all others stay as they are.
    """
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if is_stock(module):
                setattr(parent, name, Experts(module))


def is_stock(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer as transformers' common interface wants it."""
    held = {name for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    into = held & {*INTO}
    plain = hasattr(module, "is_transposed") and not getattr(module, "has_post_expert_norm", False)
    return plain and held == into | {OUT} and len(into) == 1


def layers_of(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Yield the experts of every layer with their qualified name."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield name, module


def has_experts(model: nn.Module) -> bool:
    """Whether some layer of a model has experts, as linears or as single tensors."""
    return any(True for _ in layers_of(model)) or any(p.ndim == 3 for p in model.parameters())


def stacked(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with those of experts in the names and the form that transformers has.

    Args:
        model: Of transformers' own, the experts of each layer single tensors.
        tensors: By name, those of each expert for itself.
    """
    found = dict(tensors)
    for name, stock in model.named_modules():
        if not is_stock(stock):
            continue
        for key, wanted in stock.named_parameters(recurse=False):
            last = f"{key.removesuffix('_bias')}.bias" if key.endswith("_bias") else f"{key}.weight"
            names = [f"{name}.{e}.{last}" for e in range(len(wanted))]
            if all(n in found for n in names):
                tensor = torch.stack([found.pop(n) for n in names])
                turned = wanted.ndim == 3 and getattr(stock, "is_transposed", False)
                found[f"{name}.{key}"] = tensor.mT if turned else tensor
    return found


@contextmanager
def routing_only(model: nn.Module, real: torch.Tensor) -> Iterator[None]:
    """Send no other tokens than those of `real` [N] through experts inside the context."""
    layers = [m for m in model.modules() if isinstance(m, Experts)]
    try:
        for layer in layers:
            layer.only = real
        yield
    finally:
        for layer in layers:
            layer.only = None


def _linears(stock: Any) -> Iterator[dict[str, nn.Linear]]:
    """Yield the linears of each expert; they hold copies, so that each is freed on its own."""
    names = [name for name in (*INTO, OUT) if name in stock._parameters]
    for number in range(len(stock._parameters[OUT])):
        found = {}
        for name in names:
            weight = stock._parameters[name].detach()[number]
            bias = stock._parameters.get(f"{name}_bias")
            found[name] = _linear(weight.mT if stock.is_transposed else weight, bias, number)
        yield found


def _linear(weight: torch.Tensor, biases: torch.Tensor | None, number: int) -> nn.Linear:
    """Return a linear with a copy of a weight [d_out, d_in] and of its row of biases [E, d_out]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if biases is not None:
        linear.bias = nn.Parameter(biases.detach()[number].clone())
    return linear
