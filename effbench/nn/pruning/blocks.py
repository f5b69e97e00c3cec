"""Structured blocks of a Llama-style model, and which of them to keep within a budget.

A block is a key/value group with its query heads, an MLP neuron, or a dimension of the residual
stream. With n_g groups and n_f neurons kept in layer l, and d' dimensions kept in all:

    C = d' * sum_l (w_g n_g + 3 n_f),   w_g = (2 q + 2) d_h   (q query heads in a group, width d_h)

is the number of weights in the decoder's linears. The blocks are sorted by density, salience per
weight, and the longest prefix with C <= budget stays. Source: Zhao et al., APT, arXiv 2401.12200;
groups instead of heads are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from effbench.api.parts import LayerSize

Kind = str
"""`groups`, `neurons` or `dims`."""
KINDS = ("groups", "neurons", "dims")


class LayerViews(NamedTuple):
    """Views of one layer's part of a flat vector."""

    groups: torch.Tensor
    """[n_g]."""
    neurons: torch.Tensor
    """[n_f]."""


@dataclass(frozen=True)
class Layout:
    """Where each block lies in a flat vector: layer by layer groups then neurons; dims at the end.

    Masks, targets and saliences of all blocks are such vectors, [N].
    """

    layers: tuple[LayerSize, ...]
    head_dim: int
    hidden_size: int

    @cached_property
    def units(self) -> int:
        """Groups and neurons of all layers."""
        return sum(x.num_kv_heads + x.intermediate_size for x in self.layers)

    @property
    def size(self) -> int:
        """N, all blocks."""
        return self.units + self.hidden_size

    def views(self, flat: torch.Tensor) -> Iterator[LayerViews]:
        """Yield the parts of a flat vector [N], layer by layer."""
        start = 0
        for layer in self.layers:
            middle = start + layer.num_kv_heads
            end = middle + layer.intermediate_size
            yield LayerViews(flat[start:middle], flat[middle:end])
            start = end

    def dims(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the part of a flat vector [N] that belongs to the residual stream, [d]."""
        return flat[self.units :]

    def segments(self) -> Iterator[tuple[Kind, slice]]:
        """Yield the kind and the place of each run of blocks of one kind and layer."""
        start = 0
        for layer in self.layers:
            for kind, count in (
                ("groups", layer.num_kv_heads),
                ("neurons", layer.intermediate_size),
            ):
                yield kind, slice(start, start + count)
                start += count
        yield "dims", slice(start, start + self.hidden_size)

    def widths(self) -> torch.Tensor:
        """Return the weights that each group and neuron has per dimension, [units] float64."""
        parts = []
        for layer in self.layers:
            queries = layer.num_heads // max(1, layer.num_kv_heads)
            parts += [(2 * queries + 2) * self.head_dim] * layer.num_kv_heads
            parts += [3] * layer.intermediate_size
        return torch.tensor(parts, dtype=torch.float64)

    def weights(self, kept: torch.Tensor) -> float:
        """Return C for kept blocks [N]; masks between 0 and 1 count in part."""
        kept = kept.detach().double().cpu()
        return float((kept[: self.units] @ self.widths()) * self.dims(kept).sum())


@dataclass(frozen=True)
class Found:
    """What a search found. A portion is what stays or goes together."""

    kept: torch.Tensor
    """[N] bool."""
    portion: torch.Tensor
    """The portion of each block, [N] int64."""
    order: torch.Tensor
    """Portions by falling density, [P] int64."""
    count: int
    """Portions kept."""


def search(
    layout: Layout,
    salience: torch.Tensor,
    budget: float,
    *,
    prunable: Sequence[Kind] = KINDS,
    align: int = 1,
    rounds: int = 3,
) -> Found:
    """Return the blocks that stay: the longest prefix by density whose weights fit the budget.

    What a group or neuron weighs depends on the dimensions that stay, and the other way round; so
    the densities are computed anew `rounds` times, each time with the counts of the time before.
    Kinds that may not go, and the most salient dimension, stay whatever the budget.

    Args:
        layout: The blocks.
        salience: [N], not negative.
        budget: Most weights C that may stay.
        prunable: Kinds of blocks that may go.
        align: Neurons of a layer, and dimensions, stay or go this many at a time, the most salient
            together; what is left over when it does not divide their number is the least salient.
        rounds: Times that densities are computed.
    """
    salience = salience.detach().double().cpu()
    portion, frozen = _portions(layout, salience, prunable, align)
    zeros, units = torch.zeros(len(frozen), dtype=torch.float64), layout.units
    width = zeros.index_add(0, portion[:units], layout.widths())
    dims = zeros.index_add(0, portion[units:], torch.ones(layout.hidden_size).double())
    gain = zeros.index_add(0, portion, salience)
    kept_width, kept_dims = width.sum(), dims.sum()
    limit = torch.tensor(budget, dtype=torch.float64)
    for _ in range(rounds):
        cost = width * kept_dims.clamp(min=1) + dims * kept_width.clamp(min=1)
        density = (gain / cost).masked_fill(frozen, math.inf)
        density[density.masked_fill(dims == 0, -1.0).argmax()] = math.inf
        order = torch.argsort(density, descending=True, stable=True)
        total = width[order].cumsum(0) * dims[order].cumsum(0)
        count = int(torch.searchsorted(total, limit, right=True))
        count = max(count, int(density.isinf().sum()))
        kept_width, kept_dims = width[order[:count]].sum(), dims[order[:count]].sum()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return Found(place[portion] < count, portion, order, count)


def search_uniform(
    layout: Layout,
    salience: torch.Tensor,
    budget: float,
    *,
    prunable: Sequence[Kind] = KINDS,
    align: int = 1,
) -> Found:
    """Return the blocks that stay when each layer, and each kind, keeps the same share.

    The largest share whose weights fit the budget is found by bisection. Arguments as for `search`.
    """
    salience = salience.detach().double().cpu()
    portion, frozen = _portions(layout, salience, prunable, align)
    rank = torch.zeros(len(frozen), dtype=torch.float64)  # place of a portion within its segment
    for _, place in layout.segments():
        numbers = portion[place].unique()
        rank[numbers] = (torch.arange(len(numbers)).double() + 1) / max(1, len(numbers))
    rank[frozen] = 0.0
    first_dim = portion[layout.units :].min()
    rank[first_dim] = 0.0
    low, high = 0.0, 1.0
    if layout.weights(rank[portion] <= high) <= budget:
        low = high
    for _ in range(50):
        middle = (low + high) / 2
        fits = layout.weights(rank[portion] <= middle) <= budget
        low, high = (middle, high) if fits else (low, middle)
    order = torch.argsort(rank, stable=True)
    kept = rank <= low
    return Found(kept[portion], portion, order, int(kept.sum()))


@torch.no_grad()
def add_layer_sums(
    layer: Any,
    size: LayerSize,
    view: LayerViews,
    dims: torch.Tensor,
    of: Callable[[Any], torch.Tensor],
    reads: bool = False,
) -> None:
    """Add to each block the sum of a value per weight over its weights in one layer.

    Args:
        layer: A layer of a `LlamaForCausalLM` with dense linears.
        size: Its sizes.
        view: Sums of its groups and neurons.
        dims: Sums of the dimensions of the residual stream, [d].
        of: Gives the values of a linear, [d_out, d_in].
        reads: Only the weights that read a block's activations: columns of `o_proj` for groups, of
            `down_proj` for neurons, of the other linears for dimensions.
    """
    parts: list[tuple[Any, str, tuple[str, ...], torch.Tensor]] = []
    if size.num_heads:
        parts.append((layer.self_attn, "o_proj", ("q_proj", "k_proj", "v_proj"), view.groups))
    if size.intermediate_size:
        parts.append((layer.mlp, "down_proj", ("gate_proj", "up_proj"), view.neurons))
    for owner, outward, inward, units in parts:
        values = of(getattr(owner, outward))
        units += values.sum(0).view(len(units), -1).sum(1)
        if not reads:
            dims += values.sum(1)
        for name in inward:
            values = of(getattr(owner, name))
            dims += values.sum(0)
            if not reads:
                units += values.sum(1).view(len(units), -1).sum(1)


def _portions(
    layout: Layout, salience: torch.Tensor, prunable: Sequence[Kind], align: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the portion of each block, [N], and which portions may not go, [P]."""
    portion = torch.empty(layout.size, dtype=torch.int64)
    frozen: list[torch.Tensor] = []
    first = 0
    for kind, place in layout.segments():
        by_salience = torch.argsort(salience[place], descending=True, stable=True) + place.start
        free = kind in prunable
        size = 1 if free and kind == "groups" else align if free else max(1, len(by_salience))
        numbers = torch.arange(len(by_salience)) // size
        portion[by_salience] = first + numbers
        count = int(numbers[-1]) + 1 if len(numbers) else 0
        frozen.append(torch.full((count,), not free))
        first += count
    return portion, torch.cat(frozen)


def step_masks(masks: torch.Tensor, wanted: torch.Tensor, rate: float) -> None:
    """Move masks [N] in place towards 1 where wanted [N] and 0 elsewhere, by at most `rate`."""
    sign = torch.where(wanted, 1.0, -1.0).to(masks)
    masks.add_(rate * sign).clamp_(0, 1)
