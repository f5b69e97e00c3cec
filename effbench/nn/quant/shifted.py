"""Weights as integer codes with a scale and a shift for each group of a row, fitted without data.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, Mobius Labs 2023.
Over the weights w of one group, with L = 2^b - 1:

    ŵ = s q + o,   s = (max(w) - min(w)) / L,   q = clamp(round((w - o) / s), 0, L)

o starts at min(w) and is moved so that Σ |w - ŵ|^p becomes small, p < 1, by half-quadratic
splitting:

    e = sign(r) max(|r| - |r|^(p - 1) / β, 0)   with r = w - ŵ
    o = mean(w - e - s q),   β <- κ β

The authors write ŵ = s (q - z): o is -s z, and their steps are these. s and o are rounded to
float16 before they are used, so that q fits what is stored.
"""

from __future__ import annotations

from typing import NamedTuple

from effbench.nn.quant.alternating import refuse_not_finite
from effbench.nn.quant.groupwise import LARGEST_SCALE, SMALLEST_SCALE
from effbench.nn.quant.packing import pack, packed_bytes, unpack
from effbench.util.lazy import torch


class Shifted(NamedTuple):
    """The stored tensors of one weight matrix."""

    codes: torch.Tensor
    """[⌈d_out · d_in · b / 8⌉] uint8, packed row after row."""
    scales: torch.Tensor
    """[d_out, G] float16."""
    shifts: torch.Tensor
    """[d_out, G] float16."""


class Search(NamedTuple):
    """How shifts are found."""

    p: float = 0.7
    """Exponent of the error that is made small."""
    beta: float = 10.0
    """Weight β of the splitting in the first round."""
    kappa: float = 1.01
    """What it is multiplied by after each."""
    rounds: int = 20
    """At the most."""


def shifted_bytes(d_in: int, d_out: int, bits: int, group_size: int) -> int:
    """Return the exact bytes of a [d_out, d_in] matrix: codes, scales and shifts."""
    return packed_bytes(d_in * d_out, bits) + 4 * d_out * -(d_in // -group_size)


def empty(
    d_in: int, d_out: int, bits: int, group_size: int, device: torch.device | None = None
) -> Shifted:
    """Return zeroed storage for a [d_out, d_in] matrix."""
    codes = torch.zeros(packed_bytes(d_in * d_out, bits), dtype=torch.uint8, device=device)
    numbers = torch.zeros(2, d_out, -(d_in // -group_size), dtype=torch.float16, device=device)
    return Shifted(codes, numbers[0].clone(), numbers[1].clone())


def quantise(weight: torch.Tensor, bits: int, group_size: int, search: Search) -> Shifted:
    """Return a weight [d_out, d_in] of any floating dtype as codes, scales and shifts.

    Raises:
        UserError: When it holds what is not finite.
    """
    refuse_not_finite(weight)
    wide = weight.detach().float()
    rest = wide.shape[1] % group_size
    parts = [
        _fitted(part, min(group_size, part.shape[1]), bits, search)
        for part in wide.split([wide.shape[1] - rest, rest], 1)
        if part.shape[1]
    ]
    codes, scales, shifts = (torch.cat(found, 1) for found in zip(*parts, strict=True))
    return Shifted(pack(codes, bits), scales, shifts)


def dequantise(
    stored: Shifted, d_in: int, bits: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the weights that the codes stand for, [d_out, d_in] in `dtype`."""
    d_out = len(stored.scales)
    codes = unpack(stored.codes, bits, d_out * d_in).view(d_out, d_in)
    scales, shifts = (
        numbers.float().repeat_interleave(group_size, 1)[:, :d_in]
        for numbers in (stored.scales, stored.shifts)
    )
    return (scales * codes + shifts).to(dtype)


def _fitted(
    weight: torch.Tensor, size: int, bits: int, search: Search
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [N, K] uint8, scales and shifts [N, K / size] float16 of whole groups."""
    groups, top = weight.reshape(len(weight), -1, size), 2**bits - 1
    low = groups.amin(-1).clamp(-LARGEST_SCALE, LARGEST_SCALE).half()
    span = (groups.amax(-1) - groups.amin(-1)) / top
    scales = span.clamp(SMALLEST_SCALE, LARGEST_SCALE).half()
    shifts = moved(groups, scales.float()[..., None], low, top, search)
    codes = nearest(groups, scales.float()[..., None], shifts.float()[..., None], top)
    return codes.to(torch.uint8).view_as(weight), scales, shifts


def nearest(
    groups: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor, top: int
) -> torch.Tensor:
    """Return the nearest codes of groups [..., g], whole numbers in their dtype."""
    return ((groups - shifts) / scales).round_().clamp_(0, top)


def moved(
    groups: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor, top: int, search: Search
) -> torch.Tensor:
    """Return the shifts, float16, of all that the rounds come to the ones with the least mean |r|.

    Args:
        groups: w, [..., g] float32.
        scales: s, [..., 1] float32.
        shifts: Where to start, [...] float16.
        top: The largest code.
        search: How.
    """
    best, least, beta = shifts, groups.new_full(shifts.shape, torch.inf), search.beta
    for _ in range(search.rounds):
        at = shifts.float()[..., None]
        stepped = scales * nearest(groups, scales, at, top)
        error = groups - stepped - at
        mean = error.abs().mean(-1)
        better = mean < least
        if not better.any():
            break
        best, least = torch.where(better, shifts, best), torch.where(better, mean, least)
        found = (groups - shrunk(error, beta, search.p) - stepped).mean(-1)
        shifts = found.clamp(-LARGEST_SCALE, LARGEST_SCALE).half()
        beta *= search.kappa
    return best


def shrunk(error: torch.Tensor, beta: float, p: float) -> torch.Tensor:
    """Return the errors e that are left out of account: the proximal step of |r|^p."""
    size = error.abs()
    return error.sign() * (size - size.pow(p - 1) / beta).clamp_(min=0)
