"""Binary coding: a weight is a sum of b scaled signs; products by tables of partial sums.

Park et al., LUT-GEMM: Quantized Matrix Multiplication based on LUTs, ICLR 2024, arXiv 2206.09557.
Over the weights w of one group of a row:

    ŵ = Σ_i a_i b_i + o,   b_i in {-1, 1}^g,   a_1 >= ... >= a_b >= 0,   o = 0 or mean(w)
    greedy     r = w - o; for each i: b_i = sign(r), a_i = mean|r|, r -= a_i b_i
    scales     a = |(B Bᵀ + λ I)⁻¹ B (w - o)|, sorted (`alternating.best_scales`)
    signs      of each weight, those of the nearest of the 2^b sums of ±a_i

The last two take turns for some rounds, as long as a group's error falls; without a round the
greedy signs stay. sign(0) is 1. Scales are rounded to float16 before signs are chosen for the last
time.

Round-to-nearest codes c with scale s and zero z are of this form: s (c - z) = Σ_i a_i b_i + o with
a_i = s 2^(b - i) / 2, b_i the bits of c and o = Σ_i a_i - s z, all of it exact in float32.

A set bit is +1; bit plane i, in the order of `planes`, has the signs of a_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from effbench.nn.quant import groupwise, planes
from effbench.nn.quant.alternating import (
    CHUNK,
    Fitted,
    best_scales,
    fit_groups,
    per_weight,
    stored,
    summed,
)
from effbench.nn.quant.packing import fill_up, unpack
from effbench.util.lazy import torch

TABLE_INPUTS = 8
"""Inputs of a table: it has the 256 sums of them with either sign."""


class Binary(NamedTuple):
    """The stored tensors of one weight matrix."""

    planes: torch.Tensor
    """[b, N, ⌈K / 8⌉] uint8."""
    scales: torch.Tensor
    """[b, N, G] float16, none negative, sorted from large to small."""
    offsets: torch.Tensor | None
    """[N, G] float32, for what is converted from round-to-nearest codes would not fit float16."""


def binary_bytes(d_in: int, d_out: int, bits: int, group_size: int, offset: bool) -> int:
    """Return the exact bytes of a [d_out, d_in] matrix: signs, scales and offsets."""
    groups = d_out * -(d_in // -group_size)
    return bits * (d_out * planes.plane_bytes(d_in) + 2 * groups) + 4 * groups * offset


def empty(
    d_in: int,
    d_out: int,
    bits: int,
    group_size: int,
    offset: bool,
    device: torch.device | None = None,
) -> Binary:
    """Return zeroed storage for a [d_out, d_in] matrix."""
    groups = -(d_in // -group_size)
    sizes = bits, d_out, planes.plane_bytes(d_in)
    return Binary(
        torch.zeros(sizes, dtype=torch.uint8, device=device),
        torch.zeros(bits, d_out, groups, dtype=torch.float16, device=device),
        torch.zeros(d_out, groups, device=device) if offset else None,
    )


def quantise(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    offset: bool = False,
    rounds: int = 15,
    chunk: int = CHUNK,
) -> Binary:
    """Return `weight` as scaled signs.

    Args:
        weight: [N, K] of any floating dtype.
        bits: Sign planes, 1 to 8.
        group_size: Neighbouring weights of a row that share their scales.
        offset: Whether the mean of each group is taken out first, and kept.
        rounds: Of refinement, at the most.
        chunk: Weights at a time.
    """

    def fit(w: torch.Tensor) -> Fitted:
        middle = summed(w.double()).div(len(w)).float() if offset else torch.zeros_like(w[0])
        w = w - middle
        codes, scales = greedy(w, bits)
        if not rounds:
            codes, scales = _sorted(codes, scales)
            return Fitted(codes, stored(scales), middle)
        scales = stored(refined(w, codes, scales, rounds))
        return Fitted(nearest(w, scales.float()), scales, middle)

    found = fit_groups(weight, group_size, fit, chunk)
    return Binary(planes.pack(found.codes, bits), found.scales, found.offsets if offset else None)


def from_groups(grouped: groupwise.Groups, d_in: int, bits: int, group_size: int) -> Binary:
    """Return round-to-nearest codes as scaled signs and offsets, without a change of any weight.

    Args:
        grouped: Of [N, K] weights, with zero points.
        d_in: K.
        bits: Per code.
        group_size: Weights that share a scale.
    """
    assert grouped.zeros is not None
    rows, count = grouped.scales.shape
    codes = unpack(grouped.codes, bits, rows * d_in).view(rows, d_in)
    zeros = unpack(grouped.zeros, bits, rows * count).view(rows, count)
    halves = 2.0 ** torch.arange(bits - 2, -2, -1, device=codes.device).view(-1, 1, 1)
    scales = stored(grouped.scales.float() * halves)
    offsets = scales.float().sum(0) - grouped.scales.float() * zeros
    return Binary(planes.pack(codes, bits), scales, offsets)


def dequantise(stored: Binary, d_in: int, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights that the signs stand for, [N, K] in `dtype`; summed in float32."""
    out = torch.zeros(stored.planes.shape[1], d_in, device=stored.planes.device)
    for plane, scales in zip(
        stored.planes.split(1), per_weight(stored.scales, group_size, d_in), strict=True
    ):
        out += scales * (2.0 * planes.unpack(plane, d_in) - 1)
    if stored.offsets is not None:
        out += next(per_weight(stored.offsets[None], group_size, d_in))
    return out.to(dtype)


# -- the fit -----------------------------------------------------------------------------------


def greedy(w: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [g, M] uint8 and scales [b, M] float32, one sign after the other.

    Args:
        w: Groups as columns, [g, M] float32.
        bits: b; bit b - 1 - i of a code is set where the sign of scale i is +1.
    """
    codes, scales, rest = torch.zeros_like(w, dtype=torch.uint8), [], w.clone()
    for _ in range(bits):
        positive = rest >= 0
        scales.append(summed(rest.abs().double()).div(len(w)).float())
        codes = codes << 1 | positive.to(torch.uint8)
        rest -= scales[-1] * (2 * positive.float() - 1)
    return codes, torch.stack(scales)


def refined(
    w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, rounds: int
) -> torch.Tensor:
    """Return the scales [b, M] after signs and scales took turns.

    Each group stops when its error falls no more.
    """
    best, least = scales.clone(), _error(w, codes, scales)
    moving = torch.arange(w.shape[1], device=w.device)
    for _ in range(rounds):
        found = best_scales(signs_of(codes, len(best)), w).abs_().float()
        found = found.sort(0, descending=True).values
        codes = nearest(w, found)
        error = _error(w, codes, found)
        better = error < least[moving]
        moving, w, codes = moving[better], w[:, better], codes[:, better]
        best[:, moving], least[moving] = found[:, better], error[better]
        if not len(moving):
            break
    return best


def signs_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the signs of codes, [b, ...] float32 of -1 and 1."""
    return torch.stack([2 * (codes >> (bits - 1 - i) & 1).float() - 1 for i in range(bits)])


def nearest(w: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the codes whose sums are nearest to the weights, [g, M] uint8, by binary search.

    Args:
        w: [g, M] float32.
        scales: [b, M] float32.
    """
    levels, order = _sums(scales).T.contiguous().sort(dim=1, stable=True)
    between = (levels[:, 1:] + levels[:, :-1]) / 2  # contiguous, as the search wants it
    place = torch.searchsorted(between, w.T.contiguous(), right=True)
    return order.to(torch.uint8).gather(1, place).T.contiguous()


def _sums(scales: torch.Tensor) -> torch.Tensor:
    """Return the sums that all codes stand for, [2^b, M], from scales [b, M]."""
    signs = signs_of(torch.arange(2 ** len(scales), device=scales.device), len(scales))
    out = torch.zeros(signs.shape[1], scales.shape[1], device=scales.device)
    for sign, scale in zip(signs, scales, strict=True):
        out += sign[:, None] * scale
    return out


def _error(w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the squared error of groups, [M] float64."""
    return summed((w - _sums(scales).gather(0, codes.long())).double().square())


def _sorted(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same sums with their scales, and the bits of the codes, from large to small."""
    scales, order = scales.sort(dim=0, descending=True, stable=True)
    weights = 2 ** (len(scales) - 1 - order)  # of the bit that comes to each place
    moved = torch.zeros_like(codes)
    for weight in weights:
        moved = moved << 1 | (codes & weight.to(torch.uint8) > 0).to(torch.uint8)
    return moved, scales


# -- the product by tables ---------------------------------------------------------------------


@dataclass
class Work:
    """Operations of a product, counted as they are made."""

    built: int = 0
    """Entries of tables, an addition each."""
    lookups: int = 0
    """Entries that are read, and added."""
    multiplications: int = 0
    """Of sums by scales or offsets."""


def tables(x: torch.Tensor) -> torch.Tensor:
    """Return the sums of each 8 neighbouring inputs with either sign.

    T[p] = Σ_j (2 bit_j(p) - 1) x_j; with bit j newly set it is T without it + 2 x_j.

    Args:
        x: [..., K] float32; zeros stand for inputs that are not there.

    Returns:
        [..., ⌈K / 8⌉, 256] float32.
    """
    inputs = fill_up(x, TABLE_INPUTS).unflatten(-1, (-1, TABLE_INPUTS))
    out = -inputs.sum(-1, keepdim=True)
    for j in range(TABLE_INPUTS):
        out = torch.cat([out, out + 2 * inputs[..., j : j + 1]], -1)
    return out


def table_product(
    x: torch.Tensor, stored: Binary, group_size: int, work: Work | None = None
) -> torch.Tensor:
    """Return x Ŵᵀ, [B, N] float32, by reading partial sums: what a kernel has to compute.

    Planes lie as kernels of another kind want them, so their bits are gathered 8 neighbours to a
    byte first.

    Args:
        x: [B, K] float32.
        stored: Of [N, K] weights.
        group_size: A multiple of 8: no table stands across two groups.
        work: Counts what is done.
    """
    if group_size % TABLE_INPUTS:
        raise ValueError(f"groups of {group_size} do not end with a table of {TABLE_INPUTS}")
    work = work or Work()
    table = tables(x.float())
    work.built += table.numel()
    out = torch.zeros(len(x), stored.planes.shape[1])
    for plane, scales in zip(stored.planes, stored.scales, strict=True):
        index = _neighbours(plane, x.shape[1])
        found = table.gather(2, index.T.expand(len(x), -1, -1))
        work.lookups += found.numel()
        out += _scaled(found, scales, group_size, work)
    if stored.offsets is not None:
        found = table[:, :, -1:].expand(-1, -1, len(stored.offsets))
        out += _scaled(found, stored.offsets, group_size, work)
    return out


def _scaled(found: torch.Tensor, scales: torch.Tensor, group_size: int, work: Work) -> torch.Tensor:
    """Return the sums of entries [B, ⌈K / 8⌉, N] over groups times scales [N, G], [B, N]."""
    sums = torch.stack([part.sum(1) for part in found.split(group_size // TABLE_INPUTS, 1)], 2)
    work.multiplications += sums.numel()
    return (sums * scales.float()).sum(2)


def _neighbours(plane: torch.Tensor, columns: int) -> torch.Tensor:
    """Return bytes whose bit j is column 8 k + j, [N, ⌈K / 8⌉] int64, of one plane."""
    bits = fill_up(planes.unpack(plane[None], columns), TABLE_INPUTS)
    return (bits.long().unflatten(1, (-1, TABLE_INPUTS)) << _places()).sum(2)


@cache
def _places() -> torch.Tensor:
    return torch.arange(TABLE_INPUTS)
