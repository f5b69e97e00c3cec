"""How much each block matters, from the passes that training makes anyway.

    S~_j = (sum_t |dL/dH_tj|) * (sum_t |H_tj|),   S_j = S~_j + sqrt(max(0, Kurt(O_j)))

H are the inputs of `o_proj` (heads) and `down_proj` (neurons) and the outputs of `o_proj`
(dimensions, summed over layers); t runs over all real tokens of a step. Only sums over t are kept.
O_j is what block j adds through its weights: outliers there protect it. Source: Zhao et al., APT,
arXiv 2401.12200, and its code: O is the mean input times the weight, so that a neuron's kurtosis is
that of its column of `down_proj`; the kurtosis is the excess over a normal distribution's.

A group sums over its query heads and their features. Our choice: the kurtosis, which changes no
faster than the weights, is computed when blocks are ranked, from running means of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from effbench.nn.adapters.lowrank import merged_weight
from effbench.nn.llama.attention import NoAttention, NoMLP
from effbench.nn.pruning.blocks import Layout
from effbench.nn.pruning.slicing import layout_of

Average = Literal["ema", "sum"]


class Salience(nn.Module):
    """Collects salience in a model, as its submodule `salience`.

    `activity` [N] float32 holds S~ and `inputs` the mean inputs of every `o_proj`, one after the
    other, [sum_l H_l d_h] float32; `steps` counts what they are of. These a checkpoint keeps.

    Args:
        model: A `LlamaForCausalLM`; hooks of other kinds must be in it already.
        beta: Weight of the past in the running averages.
        average: `ema`, or `sum` for plain sums over steps.
    """

    activity: torch.Tensor
    inputs: torch.Tensor
    steps: torch.Tensor

    def __init__(self, model: Any, beta: float = 0.85, average: Average = "ema") -> None:
        super().__init__()
        self.layout: Layout = layout_of(model)
        self.beta, self.average = beta, average
        device = model.model.embed_tokens.weight.device
        features = sum(x.num_heads for x in self.layout.layers) * self.layout.head_dim
        self.register_buffer("activity", torch.zeros(self.layout.size, device=device))
        self.register_buffer("inputs", torch.zeros(features, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self._real: torch.Tensor | None = None
        self._sums: dict[tuple[str, int, str], torch.Tensor] = {}
        self._tokens = 0
        self._unit = 1.0
        self._hooks = [model.model.embed_tokens.register_forward_hook(self._need_gradient)]
        for index, layer in enumerate(model.model.layers):
            if not isinstance(layer.self_attn, NoAttention):
                self._watch(layer.self_attn.o_proj, index, "groups", "dims")
            if not isinstance(layer.mlp, NoMLP):
                self._watch(layer.mlp.down_proj, index, "neurons", "")
        model.add_module("salience", self)

    def remove(self, model: Any) -> None:
        """Take it out of the model."""
        for hook in self._hooks:
            hook.remove()
        del model.salience

    # -- a step --------------------------------------------------------------------------------

    @contextmanager
    def watching(self, attention_mask: torch.Tensor) -> Iterator[None]:
        """Collect from the forward passes inside the context and from their backward passes.

        Backward passes belong outside of it, so that layers which gradient checkpointing runs
        again are not counted again.

        Args:
            attention_mask: [B, T], 1 for real tokens.
        """
        self._real = attention_mask.bool()
        self._tokens += int(attention_mask.sum())
        try:
            yield
        finally:
            self._real = None

    def watch_loss(self, loss: torch.Tensor) -> None:
        """Learn what a gradient scaler multiplies the loss by; gradients are divided by it."""

        def note(gradient: torch.Tensor) -> None:
            self._unit = float(gradient)

        loss.register_hook(note)

    def finish_step(self) -> None:
        """Take the sums of all micro-batches of a step into the averages."""
        now, features = torch.zeros_like(self.activity), []
        dims = self.layout.dims(now)
        views = zip(self.layout.layers, self.layout.views(now), strict=True)
        for index, (size, view) in enumerate(views):
            if size.num_heads:
                view.groups.copy_(self._product("groups", index).view(size.num_kv_heads, -1).sum(1))
                dims.add_(self._product("dims", index))
                features.append(self._sums["groups", index, "mean"] / max(1, self._tokens))
            if size.intermediate_size:
                view.neurons.copy_(self._product("neurons", index))
        mean = torch.cat(features) if features else torch.zeros_like(self.inputs)
        finite = bool(torch.isfinite(now).all())  # a scaler's overflow is skipped, as by the step
        if finite and self.average == "sum":
            self.activity += now
            self.inputs += mean
        elif finite:
            self.activity.mul_(self.beta).add_(now, alpha=1 - self.beta)
            self.inputs.mul_(self.beta).add_(mean, alpha=1 - self.beta)
        self.steps += finite
        self._sums.clear()
        self._tokens = 0

    def averaged(self) -> torch.Tensor:
        """Return S~, [N], with a running average freed of the zeros that it began from."""
        if self.average == "sum" or not self.steps:
            return self.activity
        return self.activity / (1 - self.beta ** int(self.steps))

    def _product(self, kind: str, index: int) -> torch.Tensor:
        values = self._sums[kind, index, "value"]
        gradients = self._sums.get((kind, index, "gradient"), torch.zeros_like(values))
        return values * gradients / abs(self._unit)

    # -- hooks ---------------------------------------------------------------------------------

    def _need_gradient(self, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Let gradients reach the first layer, where nothing before it trains."""
        if self._real is None or output.requires_grad or not torch.is_grad_enabled():
            return None
        return output.requires_grad_()

    def _watch(self, linear: nn.Module, index: int, inward: str, outward: str) -> None:
        def look_in(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._note(inputs[0], inward, index)

        def look_out(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            self._note(output, outward, index)

        self._hooks.append(linear.register_forward_pre_hook(look_in))
        if outward:
            self._hooks.append(linear.register_forward_hook(look_out))

    def _note(self, x: torch.Tensor, kind: str, index: int) -> None:
        real = self._real
        if real is None or not x.requires_grad:
            return
        rows = x.detach()[real]
        self._add((kind, index, "value"), rows.abs().sum(0, dtype=torch.float32))
        if kind == "groups":
            self._add((kind, index, "mean"), rows.sum(0, dtype=torch.float32))

        def note_gradient(gradient: torch.Tensor) -> None:
            total = gradient[real].abs().sum(0, dtype=torch.float32)
            self._add((kind, index, "gradient"), total)

        x.register_hook(note_gradient)

    def _add(self, key: tuple[str, int, str], value: torch.Tensor) -> None:
        self._sums[key] = self._sums[key] + value if key in self._sums else value


def salience_of(model: nn.Module) -> Salience | None:
    """Return what collects salience in a model, if anything does."""
    found = getattr(model, "salience", None)
    return found if isinstance(found, Salience) else None


# -- outliers ----------------------------------------------------------------------------------


def root_kurtosis(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the square root of the excess kurtosis along a dimension, 0 where it is negative.

    The kurtosis is the fourth central moment over the squared variance (both divided by n), less 3.
    """
    centred = values.float() - values.float().mean(dim, keepdim=True)
    square = centred.square()
    variance = square.mean(dim)
    fourth = square.square().mean(dim)
    ratio = torch.where(variance > 0, fourth / variance.square().clamp(min=1e-30), 3.0)
    return (ratio - 3).clamp(min=0).sqrt()


@torch.no_grad()
def outliers(model: Any, layout: Layout, inputs: torch.Tensor) -> torch.Tensor:
    """Return sqrt(max(0, Kurt(O_j))) of every block, [N] float32.

    Args:
        model: A `LlamaForCausalLM`.
        layout: Its blocks.
        inputs: Mean input of every `o_proj`, one after the other.
    """
    found = torch.zeros(layout.size, device=inputs.device)
    dims, start = layout.dims(found), 0
    views = zip(model.model.layers, layout.layers, layout.views(found), strict=True)
    for layer, size, view in views:
        if size.num_heads:
            width = size.num_heads * layout.head_dim
            output = merged_weight(layer.self_attn.o_proj).float() * inputs[start : start + width]
            start += width
            dims.add_(root_kurtosis(output, 1))
            heads = output.view(-1, size.num_heads, layout.head_dim).transpose(0, 1).flatten(1)
            of_heads = root_kurtosis(heads, 1)
            view.groups.copy_(of_heads.view(size.num_kv_heads, -1).sum(1))
        if size.intermediate_size:
            view.neurons.copy_(root_kurtosis(merged_weight(layer.mlp.down_proj), 0))
    return found


def ranked(
    activity: torch.Tensor, kurtosis: torch.Tensor | None, layout: Layout, normalise: bool
) -> torch.Tensor:
    """Return the salience of every block, [N].

    Args:
        activity: S~, [N].
        kurtosis: The outlier term, [N], or None to leave it out.
        layout: The blocks.
        normalise: Bring the outlier term to the mean that S~ has over the blocks of each kind,
            since their units differ. S~ itself stays: what a kind is worth beside another is in it.
    """
    if kurtosis is None:
        return activity
    return activity + (_at_mean(kurtosis, activity, layout) if normalise else kurtosis)


def _at_mean(term: torch.Tensor, of: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return a term that has, over the blocks of each kind, the mean of another."""
    places: dict[str, list[torch.Tensor]] = {}
    for kind, place in layout.segments():
        places.setdefault(kind, []).append(torch.arange(place.start, place.stop))
    result = term.clone()
    for parts in places.values():
        index = torch.cat(parts).to(term.device)
        if len(index):
            result[index] *= of[index].mean() / term[index].mean().clamp(min=1e-30)
    return result
