"""GPTQ: codes of a matrix column by column, each column's error made up for by those after it.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
ICLR 2023, arXiv 2210.17323. With H = 2 Σ x x^T + λ I, over the inputs x of a matrix W [R, d], and
the upper factor U of H^-1 = U^T U, for each column i in turn:

    q_i = quant(w_i),   e = (w_i - q_i) / U_ii,   w_j = w_j - e U_ij  for all j > i
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from effbench.nn.quant import groupwise
from effbench.nn.quant.groupwise import Codes

LAZY = 128
"""Columns whose updates reach the columns behind them in one product."""
FIRST_DAMPING = 1e-6
"""Of the mean of the diagonal, where less leaves the matrix singular."""


def solve(
    weight: torch.Tensor,
    gram: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    damping: float = 0.01,
    by_activity: bool = False,
) -> Codes:
    """Return codes of `weight` that keep the products with the inputs.

    The scale of a group is found when its first column is reached, from the weights as they are
    then: the updates of all columns before it are in them. By activity, columns are not taken group
    by group, so all scales are found at the start.

    Args:
        weight: [R, d], in the dtype of `gram`.
        gram: Σ x x^T over the inputs, [d, d] float32 or float64.
        bits: Of a code.
        group_size: Neighbouring columns that share a scale.
        symmetric: Whether there is no zero point.
        damping: λ, in shares of the mean of H's diagonal.
        by_activity: Columns in the order of H's diagonal, the largest first.
    """
    columns = torch.arange(len(gram), device=gram.device)
    if by_activity:
        columns = gram.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(gram, columns, damping)
    found = groupwise.rounded(weight, bits, group_size, symmetric)
    work, top = weight[:, columns].T.contiguous(), groupwise.top_code(bits, symmetric)
    for start, stop in _spans(len(columns), group_size, LAZY):
        own, group = columns[start:stop], start // group_size
        if not by_activity and start % group_size == 0:
            scales, zeros = groupwise.levels(work[start : start + group_size].T, bits, symmetric)
            found.scales[:, group], found.zeros[:, group] = scales, zeros
        groups = own // group_size if by_activity else own[:1] // group_size
        scales, zeros = (part[:, groups].T.expand(len(own), -1) for part in found[1:])
        square = factor[start:stop, start:stop]
        codes, errors = _round(work[start:stop], square, scales, zeros, top)
        found.codes[:, own] = codes.T
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return found


def _spans(width: int, group_size: int, lazy: int) -> Iterator[tuple[int, int]]:
    """Yield runs of columns, none longer than `lazy`, that end where a group does."""
    for group in range(0, width, group_size):
        end = min(group + group_size, width)
        for start in range(group, end, lazy):
            yield start, min(start + lazy, end)


def _round(
    work: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes, uint8, and the errors e of a run of columns, [n, R]; `work` is changed.

    Args:
        work: The columns, [n, R].
        factor: Their square of U, [n, n].
        scales: Of each weight, [n, R].
        zeros: Of each weight, [n, R].
        top: The largest code.
    """
    codes, errors = torch.empty_like(work, dtype=torch.uint8), torch.empty_like(work)
    for i in range(len(work)):
        scale = scales[i].to(work.dtype)
        code = groupwise.nearest(work[i], scale, zeros[i], top)
        errors[i] = (work[i] - (code - zeros[i]) * scale) / factor[i, i]
        codes[i] = code
        work[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return codes, errors


def inverse_factor(gram: torch.Tensor, columns: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper U with (H + λ I)^-1 = U^T U, [d, d], for columns in some order.

    Where that is still singular, as when inputs are fewer than columns and λ is 0, λ is raised
    tenfold until it is not. A column that no input ever reaches has nothing to do with the others.
    """
    mean = 2 * float(gram.diagonal().mean()) or 1.0
    added = damping * mean
    while (factor := _factor(gram, columns, added)) is None:
        added = max(10 * added, FIRST_DAMPING * mean)
    return factor


def _factor(gram: torch.Tensor, columns: torch.Tensor, added: float) -> torch.Tensor | None:
    """Return the upper factor of the inverse; None where rounding leaves no positive matrix.

    Two matrices of its size are there at the most.
    """
    hessian = gram[columns[:, None], columns].mul_(2)
    hessian.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    del hessian
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed or not torch.isfinite(factor.sum()) else factor


def errors(weight: torch.Tensor, found: Codes, group_size: int, gram: torch.Tensor) -> torch.Tensor:
    """Return the squared error of each row's products, d Σ x x^T d^T with d = w - ŵ, [R]."""
    off = groupwise.expanded(found, group_size).sub_(weight)
    return (off @ gram).mul_(off).sum(1)


def better(
    one: Codes, other: Codes, weight: torch.Tensor, group_size: int, gram: torch.Tensor
) -> Codes:
    """Return the codes of each row whose products are nearer; those of `one` where both are."""
    ours, theirs = (errors(weight, found, group_size, gram) for found in (one, other))
    kept = (ours <= theirs)[:, None]
    return Codes(*(torch.where(kept, a, b) for a, b in zip(one, other, strict=True)))
