"""Weights and activations as 8-bit integers, and large activations beside them as they are.

Dettmers et al., LLM.int8(), NeurIPS 2022, arXiv 2208.07339. With the rows x of X [T, K] and w of
W [N, K], and a threshold α:

    c_w = max |w|,   w8 = round(127 w / c_w)                                       for each row of W
    O   = { h : |x_h| >= α },   c_x = max over h not in O of |x_h|,   x8 = round(127 x / c_x)
    y   = Σ_{h in O} x_h ŵ_h + c_x c_w / 127² Σ_{h not in O} x8_h w8_h,   ŵ = c_w w8 / 127

The second sum is one of integers, and exact here; the first is computed in the dtype of x. O is of
each token alone, as it is while one token is decoded: what a token becomes would depend on those
beside it if, as in the paper, a column were large for all of X where it is for one row.
"""

from __future__ import annotations

from typing import NamedTuple

from effbench.nn.quant.alternating import refuse_not_finite
from effbench.util.lazy import torch

LEVELS = 127
"""Largest code."""
TOGETHER = 2**24 // LEVELS**2
"""Products of two codes whose sum float32 holds exactly."""


class Int8(NamedTuple):
    """The stored tensors of one weight matrix."""

    codes: torch.Tensor
    """w8, [N, K] int8."""
    scales: torch.Tensor
    """c_w, [N] float32."""


def int8_bytes(d_in: int, d_out: int) -> int:
    """Return the bytes of codes and scales."""
    return d_out * (d_in + 4)


def empty(d_in: int, d_out: int, device: torch.device | None = None) -> Int8:
    """Return zeroed storage for a [d_out, d_in] matrix."""
    codes = torch.zeros(d_out, d_in, dtype=torch.int8, device=device)
    return Int8(codes, torch.zeros(d_out, device=device))


def quantise(weight: torch.Tensor) -> Int8:
    """Return the codes of a matrix [N, K].

    Raises:
        UserError: When it holds what is not finite.
    """
    refuse_not_finite(weight)
    return _rows(weight.detach().float())


def dequantise(stored: Int8, dtype: torch.dtype) -> torch.Tensor:
    """Return Ŵ, [N, K] in `dtype`."""
    return (stored.codes * (stored.scales / LEVELS)[:, None]).to(dtype)


def product(x: torch.Tensor, stored: Int8, threshold: float) -> torch.Tensor:
    """Return y, [T, N] in the dtype of `x` [T, K]."""
    large = x.abs() >= threshold
    large |= ~x.isfinite()
    own = _rows(x.float().masked_fill(large, 0))
    sums = _integer_product(own.codes, stored.codes)
    out = sums * (own.scales[:, None] * stored.scales / LEVELS**2)
    columns = large.any(0).nonzero()[:, 0]
    if len(columns):
        beside = Int8(stored.codes[:, columns], stored.scales)
        part = torch.where(large[:, columns], x[:, columns], 0)
        out = out + (part @ dequantise(beside, x.dtype).T).float()
    return out.to(x.dtype)


def _rows(matrix: torch.Tensor) -> Int8:
    """Return the codes and the largest size of each row, float32; a row of zeros has zeros."""
    largest = matrix.abs().amax(1)
    scaled = matrix * (LEVELS / largest.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    return Int8(scaled.round_().clamp_(-LEVELS, LEVELS).to(torch.int8), largest)


def _integer_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b^T of codes [T, K] and [N, K], exactly, [T, N] int32."""
    pairs = zip(a.split(TOGETHER, 1), b.split(TOGETHER, 1), strict=True)
    parts = ((x.float() @ y.float().T).to(torch.int32) for x, y in pairs)
    return sum(parts, torch.zeros((), dtype=torch.int32, device=a.device))
