"""Trit planes: a weight is a sum of P scaled values of -1, 0 and +1.

Xiao et al., PTQTP: Post-Training Quantization to Trit-Planes, arXiv 2509.16989. Over the weights w
of one group of a row:

    ŵ = Σ_k a_k t_k,   t_k in {-1, 0, 1}^g,   a_k >= 0
    start      a_k = mean|w| / P over what is not zero: the least squares of t_k = sign(w)
    scales     a = (S Sᵀ + λ I)⁻¹ S w, S the trits as rows; float64 (`alternating.best_scales`)
    trits      of each weight, the combination c of all 3^P with the least (w - Σ_k a_k c_k)²

Combinations of equal error are ties: the one with fewer trits that are not zero is taken, then the
one with later planes; the first scales are equal, and this is what tells the planes apart.
Scales are rounded to float16 before trits are chosen for the last time.

A trit is stored as two's complement of 2 bits: of a trit plane, bit plane 0 has where it is
negative (weight -2) and bit plane 1 where it is not zero (weight 1), in the order of `planes`.
Zeros, of the columns filled up too, have no bit.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

from effbench.nn.quant import planes
from effbench.nn.quant.alternating import (
    CHUNK,
    CONDITION,
    Fitted,
    best_scales,
    fit_groups,
    per_weight,
    stored,
    summed,
)
from effbench.util.lazy import torch


class Search(NamedTuple):
    """How long scales and trits take turns."""

    max_iters: int = 50
    """Rounds at the most."""
    tolerance: float = 1e-4
    """A group is done when its scales move by less, ‖Δa‖₂."""
    condition: float = CONDITION
    """Largest condition number of the normal equations."""


class Trits(NamedTuple):
    """The stored tensors of one weight matrix."""

    planes: torch.Tensor
    """[2 P, N, ⌈K / 8⌉] uint8: of each trit plane, where it is negative and where it is not 0."""
    scales: torch.Tensor
    """[P, N, G] float16, none negative."""


def trit_bytes(d_in: int, d_out: int, count: int, group_size: int) -> int:
    """Return the exact bytes of a [d_out, d_in] matrix: trits and scales."""
    return 2 * count * d_out * (planes.plane_bytes(d_in) + -(d_in // -group_size))


def empty(
    d_in: int, d_out: int, count: int, group_size: int, device: torch.device | None = None
) -> Trits:
    """Return zeroed storage for a [d_out, d_in] matrix."""
    sizes = 2 * count, d_out, planes.plane_bytes(d_in)
    groups = -(d_in // -group_size)
    return Trits(
        torch.zeros(sizes, dtype=torch.uint8, device=device),
        torch.zeros(count, d_out, groups, dtype=torch.float16, device=device),
    )


def quantise(
    weight: torch.Tensor,
    count: int,
    group_size: int,
    search: Search = Search(),  # noqa: B008
    chunk: int = CHUNK,
) -> Trits:
    """Return `weight` as trit planes.

    Args:
        weight: [N, K] of any floating dtype.
        count: Trit planes, 1 to 3.
        group_size: Neighbouring weights of a row that share their scales.
        search: When to stop.
        chunk: Weights at a time.
    """

    def fit(w: torch.Tensor) -> Fitted:
        scales = stored(searched_scales(w, count, search).abs())
        codes = _codes(nearest(w, scales.float()))
        return Fitted(codes, scales, torch.zeros_like(w[0]))

    found = fit_groups(weight, group_size, fit, chunk)
    return Trits(planes.pack(found.codes, 2 * count), found.scales)


def dequantise(stored: Trits, d_in: int, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights that the trits stand for, [N, K] in `dtype`; summed in float32."""
    scaled = zip(
        trits_of(stored.planes, d_in), per_weight(stored.scales, group_size, d_in), strict=True
    )
    first, *rest = (trits * scales for trits, scales in scaled)
    for more in rest:
        first += more
    return first.to(dtype)


def trits_of(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the trits of bit planes [2 P, N, ⌈K / 8⌉], [P, N, K] int8."""
    codes = torch.stack([planes.unpack(pair, columns) for pair in packed.split(2)]).to(torch.int8)
    return (codes & 1) - (codes & 2)


def searched_scales(w: torch.Tensor, count: int, search: Search) -> torch.Tensor:
    """Return the scales that scales and trits by turns end at, [P, M] float64 of either sign.

    Args:
        w: Groups as columns, [g, M] float32.
        count: P.
        search: When to stop; each group stops by itself.
    """
    used = (w != 0).sum(0).clamp(min=1)
    scales = (summed(w.abs().double()) / (count * used)).repeat(count, 1)
    moving = torch.arange(w.shape[1], device=w.device)
    for _ in range(search.max_iters - 1):
        trits = nearest(w, scales[:, moving].float())
        found = best_scales(trits, w, search.condition)
        moved = summed((found - scales[:, moving]).square()) >= search.tolerance**2
        scales[:, moving] = found
        moving, w = moving[moved], w[:, moved]
        if not len(moving):
            break
    return scales


@cache
def combinations(count: int) -> tuple[tuple[int, ...], ...]:
    """Return one of c and -c for all 3^P combinations of trits, the one that a tie takes first."""
    found = sorted(product((0, 1, -1), repeat=count), key=lambda c: sum(map(abs, c)))
    return tuple(c for c in found if next(filter(None, c), 0) >= 0)


def nearest(w: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the trits whose sums are nearest to the weights, [P, g, M] float32.

    Args:
        w: [g, M] float32.
        scales: [P, M] float32.
    """
    size, least = w.abs(), w.abs()
    chosen = torch.zeros_like(w, dtype=torch.uint8)
    choices = combinations(len(scales))
    levels = [sum(c * a for c, a in zip(choice, scales, strict=True)) for choice in choices]
    for number, level in enumerate(levels):
        error = (size - level.abs()).abs_()
        nearer = (error < least).view(torch.uint8)
        torch.maximum(chosen, nearer.mul_(number), out=chosen)  # the last that was nearer
        torch.minimum(least, error, out=least)
    signs = torch.stack(levels).sign()
    table = torch.tensor(choices, dtype=w.dtype, device=w.device).T[..., None] * signs
    chosen = chosen.long()
    return torch.stack([values.gather(0, chosen) for values in table]).mul_(w.sign())


def _codes(trits: torch.Tensor) -> torch.Tensor:
    """Return all trits of a weight as one code of 2 P bits, [g, M] uint8, from [P, g, M]."""
    codes = torch.zeros(trits.shape[1:], dtype=torch.uint8, device=trits.device)
    for plane in trits:
        codes = codes << 2 | (plane.nan_to_num(0).to(torch.int8) & 3).to(torch.uint8)
    return codes
