"""Positive features of queries and keys, whose products stand in for exp(q . k).

With directions P [d, d], one matrix for all heads, for queries and for keys:

    softmax   softmax(x P)                      DiJiang, the released code
    exp       D exp(x P)                        DiJiang, the paper; D a diagonal that is learned
    prf       exp(x' P - |x'|^2 / 2) / sqrt d   x' = x / d^(1/4); Performer, arXiv 2009.14794
    elu       elu(x) + 1                        no directions; arXiv 2006.16236

DiJiang (arXiv 2403.19928) has P = C diag(w): C is the DCT-II of the identity along its first axis,
so that x P is w times the inverse transform of x; w = Phi^-1(u), u uniform on (0, 1), Phi the
normal distribution. Ours: exponents are cut at 10 where nothing divides by their sum; D is kept as
its logarithm, which starts at 0, so that features stay positive.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Features = Literal["softmax", "exp", "prf", "elu"]
Projection = Literal["dct", "orthogonal"]

LARGEST_EXPONENT = 10.0
"""Where exponents are cut, e^10 = 22026."""


def dct_matrix(size: int) -> torch.Tensor:
    """Return the orthonormal DCT-II, [d, d] float64: row k holds cos(pi (2 n + 1) k / (2 d))."""
    n = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi * (2 * n + 1) * n[:, None] / (2 * size)) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def orthogonal_matrix(size: int, draws: torch.Generator) -> torch.Tensor:
    """Return a random orthogonal matrix, [d, d] float64, uniform over all of them."""
    gaussian = torch.randn(size, size, generator=draws, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def normal_quantiles(size: int, draws: torch.Generator) -> torch.Tensor:
    """Return w = Phi^-1(u) for uniform draws u, [d] float64, all of them finite."""
    u = torch.rand(size, generator=draws, dtype=torch.float64)
    return torch.special.ndtri(u.clamp(2**-53, 1 - 2**-53))


def directions(
    kind: Features, projection: Projection, weighted: bool, size: int, draws: torch.Generator
) -> torch.Tensor | None:
    """Return P, [d, d] float64; None where there is none.

    Args:
        kind: Of the features.
        projection: The orthonormal matrix C of `softmax` and `exp`.
        weighted: Whether its columns are scaled by w; else w = 1.
        size: Width d of a head.
        draws: Of what is random.
    """
    if kind == "elu":
        return None
    if kind == "prf":
        norms = torch.randn(size, size, generator=draws, dtype=torch.float64).norm(dim=0)
        return orthogonal_matrix(size, draws) * norms
    basis = dct_matrix(size) if projection == "dct" else orthogonal_matrix(size, draws)
    return basis * normal_quantiles(size, draws) if weighted else basis


class FeatureMap(nn.Module):
    """phi, from [..., d] to [..., d], in float32 or more.

    Args:
        kind: Of the features.
        p: P, [d, d], which never trains; None for `elu`.
    """

    directions: torch.Tensor | None

    def __init__(self, kind: Features, p: torch.Tensor | None) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("directions", None if p is None else p.float())
        self.log_gain = (
            nn.Parameter(torch.zeros(len(p))) if kind == "exp" and p is not None else None
        )
        """log D, [d], of `exp`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features of queries or keys [..., d]."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.directions is None:
            return F.elu(x) + 1
        if self.kind == "prf":
            x = x * x.shape[-1] ** -0.25
        exponents = x @ self.directions.to(x.dtype)
        if self.kind == "softmax":
            return exponents.softmax(-1)
        if self.kind == "prf":
            halves = exponents - x.square().sum(-1, keepdim=True) / 2
            return halves.clamp(max=LARGEST_EXPONENT).exp() * x.shape[-1] ** -0.5
        assert self.log_gain is not None
        return self.log_gain.to(x.dtype).exp() * exponents.clamp(max=LARGEST_EXPONENT).exp()
