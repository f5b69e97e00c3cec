"""Round-to-nearest weights: integer codes of b bits with one scale per group of a row.

Each row of W [d_out, d_in] is cut into G = ⌈d_in / group⌉ groups, the last one possibly shorter.
With L = 2^b - 1, over the weights w of one group:

    asymmetric   s = (max(w, 0) - min(w, 0)) / L,   z = round(-min(w, 0) / s)
    symmetric    s = max|w| / (2^(b-1) - 1),        z = 2^(b-1) - 1
    q = clamp(round(w / s) + z, 0, M),              ŵ = s · (q - z)

M is L, or 2z when symmetric. Zero is always exact. s is rounded to float16 before it is used, so
that q fits the scale that is stored; ŵ is exact in float32 and rounded once, to the compute dtype.
Storage: q in b bits, s in 16, and z in b bits when asymmetric.
"""

from __future__ import annotations

from typing import NamedTuple

from effbench.nn.quant.packing import codes_at, fill_up, pack, packed_bytes, unpack
from effbench.util.lazy import F, torch

SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16; the scale of a group of zeros."""
LARGEST_SCALE = 65504.0
"""The largest float16."""


class Groups(NamedTuple):
    """The stored tensors of one weight matrix."""

    codes: torch.Tensor
    """[⌈d_out · d_in · b / 8⌉] uint8, packed row after row."""
    scales: torch.Tensor
    """[d_out, G] float16."""
    zeros: torch.Tensor | None
    """[⌈d_out · G · b / 8⌉] uint8, packed row after row; None when symmetric."""


class Codes(NamedTuple):
    """Codes that are not packed."""

    codes: torch.Tensor
    """[d_out, d_in] uint8."""
    scales: torch.Tensor
    """[d_out, G] float16."""
    zeros: torch.Tensor
    """[d_out, G] whole numbers in the dtype that was computed in; all the same when symmetric."""


def grouped_bytes(d_in: int, d_out: int, bits: int, group_size: int, symmetric: bool) -> int:
    """Return the exact bytes of a [d_out, d_in] matrix: codes, scales and zero points."""
    groups = d_out * -(d_in // -group_size)
    zeros = 0 if symmetric else packed_bytes(groups, bits)
    return packed_bytes(d_in * d_out, bits) + 2 * groups + zeros


def empty(
    d_in: int,
    d_out: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    device: torch.device | None = None,
) -> Groups:
    """Return zeroed storage for a [d_out, d_in] matrix."""
    groups = -(d_in // -group_size)

    def codes(count: int) -> torch.Tensor:
        return torch.zeros(packed_bytes(count, bits), dtype=torch.uint8, device=device)

    return Groups(
        codes(d_out * d_in),
        torch.zeros(d_out, groups, dtype=torch.float16, device=device),
        None if symmetric else codes(d_out * groups),
    )


def quantise(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> Groups:
    """Return `weight`, [d_out, d_in] of any floating dtype, rounded to the nearest codes."""
    return packed(rounded(weight.detach().float(), bits, group_size, symmetric), bits, symmetric)


def rounded(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> Codes:
    """Return the nearest codes of `weight`, [d_out, d_in] float32 or float64."""
    d_out, d_in = weight.shape
    grouped = _grouped(weight, group_size)
    scales, zeros = levels(grouped, bits, symmetric)
    codes = nearest(grouped, scales[..., None], zeros[..., None], top_code(bits, symmetric))
    return Codes(codes.to(torch.uint8).view(d_out, -1)[:, :d_in], scales, zeros)


def levels(groups: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales, float16, and the zero points, whole numbers in the dtype of the weights.

    Args:
        groups: Weights [..., g], a group in the last dimension, which the results lack.
        bits: Of a code.
        symmetric: Whether the zero point is in the middle.
    """
    if symmetric:
        middle = 2 ** (bits - 1) - 1
        scales = _scales(groups.abs().amax(-1), middle)
        return scales, torch.full_like(scales, middle, dtype=groups.dtype)
    top = top_code(bits, symmetric)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = _scales(high - low, top)
    return scales, (-low / scales.to(low.dtype)).round_().clamp_(0, top)


def nearest(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> torch.Tensor:
    """Return the codes of weights as whole numbers in their dtype; all are of one shape."""
    return (weight / scales.to(weight.dtype)).round_().add_(zeros).clamp_(0, top)


def top_code(bits: int, symmetric: bool) -> int:
    """Return the largest code."""
    return 2**bits - 2 if symmetric else 2**bits - 1


def packed(found: Codes, bits: int, symmetric: bool) -> Groups:
    """Return codes as they are stored."""
    zeros = None if symmetric else pack(found.zeros.to(torch.uint8), bits)
    return Groups(pack(found.codes, bits), found.scales, zeros)


def expanded(found: Codes, group_size: int) -> torch.Tensor:
    """Return the weights that codes stand for, [d_out, d_in] in the dtype of the zero points."""
    d_out, d_in = found.codes.shape
    values = _grouped(found.codes, group_size).to(found.zeros.dtype)
    values.sub_(found.zeros[..., None]).mul_(found.scales[..., None])
    return values.view(d_out, -1)[:, :d_in]


def dequantise(
    stored: Groups, d_in: int, bits: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the weights that the codes stand for, [d_out, d_in] in `dtype`."""
    d_out, groups = stored.scales.shape
    codes = _grouped(unpack(stored.codes, bits, d_out * d_in).view(d_out, d_in), group_size)
    values = codes.to(torch.float32)
    if stored.zeros is None:
        values.sub_(2 ** (bits - 1) - 1)
    else:
        values.sub_(unpack(stored.zeros, bits, d_out * groups).view(d_out, groups, 1))
    values.mul_(stored.scales[..., None])
    return values.view(d_out, -1)[:, :d_in].to(dtype)


def dequantise_rows(
    stored: Groups,
    rows: torch.Tensor,
    d_in: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return some rows [R] of the weights that the codes stand for, [R, d_in] in `dtype`.

    The same numbers as `dequantise` gives, of these rows alone.
    """
    columns = torch.arange(d_in, device=rows.device)
    values = codes_at(stored.codes, bits, rows[:, None] * d_in + columns).float()
    each, groups = columns // group_size, stored.scales.shape[1]
    if stored.zeros is None:
        values.sub_(2 ** (bits - 1) - 1)
    else:
        values.sub_(codes_at(stored.zeros, bits, rows[:, None] * groups + each))
    return values.mul_(F.embedding(rows, stored.scales)[:, each]).to(dtype)


def _grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return [d_out, G, group_size], the last group filled with zeros."""
    return fill_up(weight, group_size).reshape(weight.shape[0], -1, group_size)


def _scales(span: torch.Tensor, steps: int) -> torch.Tensor:
    return (span / steps).clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16)
