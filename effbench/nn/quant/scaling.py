"""Scales of channels that are folded into what makes the channels: the model stays the same.

Lin et al., AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration, MLSys 2024, arXiv 2306.00978. With one scale s_j for each channel j between a source
and its readers,

    readers   W_ij <- W_ij s_j            source   channel j <- channel j / s_j

gives the same products, while rounding W loses less of the columns that were enlarged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch

from effbench.nn.quant.calibration import Inputs

STEPS = 20
"""Exponents that are tried: 0, 1/20, .. 19/20."""
SMALLEST_INPUT = 1e-4
"""What the mean of |x| of a channel is raised to."""


class Fold(NamedTuple):
    """Linears of a Llama block that read the same channels, and the module that makes these."""

    source: str
    """A norm, or a linear whose rows the channels are; by its name in the block."""
    readers: tuple[str, ...]
    """The last of them is the source of the next fold, where that is a linear."""
    head_dim: int = 0
    """Of heads of values, each read as several query heads attend to it; 0 where each channel is
    read as it is made."""

    def of_source(self, values: torch.Tensor, channels: int) -> torch.Tensor:
        """Return the mean over the places where a channel is read, [channels], of values [d_in]."""
        if not self.head_dim:
            return values
        return values.view(channels // self.head_dim, -1, self.head_dim).mean(1).view(-1)

    def of_readers(self, scales: torch.Tensor, width: int) -> torch.Tensor:
        """Return the scales of the channels, [channels], where they are read, [width]."""
        if not self.head_dim:
            return scales
        heads = scales.view(-1, 1, self.head_dim)
        return heads.expand(-1, width // scales.numel(), -1).reshape(-1)


def folds(block: Any) -> Iterator[Fold]:
    """Yield the folds of a Llama block in the order in which their readers run.

    Values pass through attention as they are, weighted over positions: a channel of `v_proj` is
    read by `o_proj` in the place of each query head of its group.
    """
    attention, mlp = block.self_attn, block.mlp
    if hasattr(attention, "o_proj"):
        heads = tuple(f"self_attn.{n}_proj" for n in "qkv")
        yield Fold("input_layernorm", heads)
        yield Fold("self_attn.v_proj", ("self_attn.o_proj",), attention.head_dim)
    if hasattr(mlp, "down_proj"):
        yield Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
        yield Fold("mlp.up_proj", ("mlp.down_proj",))


def channels_of(source: Any) -> int:
    """Return how many channels a norm or a linear makes."""
    return int(source.weight.shape[0])


@torch.no_grad()
def divide(source: Any, scales: torch.Tensor) -> torch.Tensor:
    """Divide the channels that a norm or a linear makes, in place.

    Returns:
        What they were divided by, [channels]: for a norm, with the rounding to its dtype in it, so
        that readers make up for that as well.
    """
    before = source.weight.data
    rows = scales.view(-1, *(1,) * (before.dim() - 1))
    source.weight.data = after = (before / rows).to(before.dtype)
    if getattr(source, "bias", None) is not None:
        source.bias.data = (source.bias.data / scales).to(source.bias.dtype)
    if before.dim() > 1:
        return scales
    return torch.where(after != 0, before.to(scales.dtype) / after.to(scales.dtype), scales)


def copied(linear: Any) -> Any:
    """Return a linear with a copy of the weight in float32."""
    new = deepcopy(linear)
    new.weight.data = new.weight.data.float()
    return new


@torch.no_grad()
def multiply(reader: Any, scales: torch.Tensor) -> None:
    """Multiply the columns of a linear, in place, by scales [d_in]."""
    reader.weight.data = reader.weight.data * scales


def candidates(magnitude: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield s = m^α / sqrt(max m^α · min m^α) for each α, from 0, which is ones, upwards.

    Args:
        magnitude: Mean of |x| of each channel, m, [channels].
    """
    m = magnitude.clamp(min=SMALLEST_INPUT)
    for step in range(STEPS):
        scales = m ** (step / STEPS)
        yield scales / (scales.max() * scales.min()).sqrt()


@torch.no_grad()
def search(
    fold: Fold,
    weights: Sequence[torch.Tensor],
    inputs: Inputs,
    channels: int,
    rounded: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, list[float]]:
    """Return the scales of the channels with the least error of the readers' outputs.

    Args:
        fold: What is scaled.
        weights: Of the readers, [d_out, d_in] float32 each.
        inputs: What they read.
        channels: Of the source.
        rounded: Returns a weight as it is after rounding.

    Returns:
        [channels], and the squared error for each α: that of plain rounding first.
    """
    found, best = torch.ones(channels, device=inputs.gram.device), float("inf")
    tried = list[float]()
    for scales in candidates(fold.of_source(inputs.magnitude, channels)):
        columns = fold.of_readers(scales, len(inputs.gram))
        tried.append(sum(_error(w, columns, inputs.gram, rounded) for w in weights))
        if tried[-1] < best:
            found, best = scales, tried[-1]
    return found, tried


def _error(
    weight: torch.Tensor,
    columns: torch.Tensor,
    gram: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """Return Σ |d x|^2 over the inputs x, with d what rounding the scaled weight changes."""
    off = rounded(weight * columns).div_(columns).sub_(weight)
    return float((off @ gram).mul_(off).sum())
