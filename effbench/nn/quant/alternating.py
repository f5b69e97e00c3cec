"""Sums of scaled code planes fitted to groups of weights by alternating least squares.

Each row of W [N, K] is cut into G = ⌈K / group⌉ groups, the last one possibly shorter. A group w
[g] becomes Σ_k a_k s_k of P planes: codes s_k [g] from a small set, scales a_k. Two steps take
turns: the scales that suit given codes best (here), and the codes that suit given scales best
(`trits`, `binary`). No group looks at another one.

Groups are columns here: w [g, M] float32, planes s [P, g, M] float32, scales a [P, M] float64. All
but sums of integers is computed element by element or summed in a fixed order, so the result is
the same bits for any number of groups at a time and of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from effbench.nn.quant.groupwise import LARGEST_SCALE
from effbench.util.errors import UserError
from effbench.util.lazy import torch

CHUNK = 2**17
"""Weights that are fitted at a time: few enough to stay in a cache."""
RIDGE = 1e-8
"""What is added to the diagonal of the normal equations, as long as they are well conditioned."""
LARGEST_RIDGE = 1.0
CONDITION = 1e6
"""Largest condition number ‖A‖_F ‖A⁻¹‖_F of the normal equations."""


class Fitted(NamedTuple):
    """What stands for a matrix, or for some of its groups."""

    codes: torch.Tensor
    """[N, K] uint8; [g, M] of groups."""
    scales: torch.Tensor
    """[P, N, G] float16; [P, M] of groups."""
    offsets: torch.Tensor
    """[N, G] float32, added to all weights of a group; [M] of groups."""


Fit = Callable[["torch.Tensor"], Fitted]
"""Fits the groups [g, M]."""


def fit_groups(weight: torch.Tensor, size: int, fit: Fit, chunk: int = CHUNK) -> Fitted:
    """Return what stands for a matrix, fitted group by group.

    Args:
        weight: [N, K] of any floating dtype.
        size: Weights in a group.
        fit: Fits some groups of one size.
        chunk: Weights at a time, about.
    """
    rest = weight.shape[1] % size
    parts = [
        _fit_part(part.float(), min(size, part.shape[1]), fit, chunk)
        for part in weight.detach().split([weight.shape[1] - rest, rest], 1)
        if part.shape[1]
    ]
    codes, scales, offsets = zip(*parts, strict=True)
    return Fitted(torch.cat(codes, 1), torch.cat(scales, 2), torch.cat(offsets, 1))


def _fit_part(weight: torch.Tensor, size: int, fit: Fit, chunk: int) -> Fitted:
    """Return what stands for [N, K], K a multiple of the size."""
    rows, columns = weight.shape
    groups = weight.reshape(-1, size).split(max(chunk // size, 1))
    codes, scales, offsets = zip(*(fit(some.T.contiguous()) for some in groups), strict=True)
    return Fitted(
        torch.cat([c.T for c in codes]).reshape(rows, columns),
        torch.cat(scales, 1).view(-1, rows, columns // size),
        torch.cat(offsets).view(rows, -1),
    )


def refuse_not_finite(weight: torch.Tensor, name: str = "") -> None:
    """Refuse weights that no code stands for.

    Args:
        weight: Of any shape.
        name: What it is called, where that is known.

    Raises:
        UserError: When one is infinite or not a number.
    """
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise UserError(
            f"{bad} of {weight.numel()} weights of {name or f'a {tuple(weight.shape)} matrix'} are "
            "not finite.",
            "Quantise a model whose weights are; `effbench eval` finds where one goes wrong.",
        )


def summed(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of [g, M] over g, [M], added in one order whatever M is."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        rest = x[2 * half :]
        x = torch.cat([x[:half] + x[half : 2 * half], rest]) if len(rest) else x[:half] + x[half:]
    return x[0]


def best_scales(
    planes: torch.Tensor, w: torch.Tensor, condition: float = CONDITION
) -> torch.Tensor:
    """Return the scales a = (S Sᵀ + λ I)⁻¹ S w, [P, M] float64.

    λ is `RIDGE`, and ten times as much as long as the condition number is above `condition`.

    Args:
        planes: S, [P, g, M] of integers.
        w: [g, M].
        condition: Largest condition number.
    """
    count = len(planes)
    gram = w.new_empty(count, count, w.shape[1], dtype=torch.float64)
    for i in range(count):
        for j in range(i + 1):  # integers below 2^24: exact in any order
            gram[i, j] = gram[j, i] = (planes[i] * planes[j]).sum(0)
    right = torch.stack([summed((s * w).double()) for s in planes])
    return _added(_damped_inverse(gram, condition) * right)


def _damped_inverse(gram: torch.Tensor, condition: float) -> torch.Tensor:
    """Return (A + λ I)⁻¹ of symmetric matrices [P, P, M] with a λ for each."""
    ridge = torch.full_like(gram[0, 0], RIDGE)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)[..., None]
    while True:
        damped = gram + identity * ridge
        inverse = _inverse(damped)
        number = _square(damped) * _square(inverse)
        bad = (number > condition**2) & (ridge < LARGEST_RIDGE)
        if not bad.any():
            return inverse
        ridge = torch.where(bad, (10 * ridge).clamp(max=LARGEST_RIDGE), ridge)


def _inverse(matrices: torch.Tensor) -> torch.Tensor:
    """Return the inverses of positive definite matrices [P, P, M], by Gauss and Jordan."""
    a = matrices.clone()
    for k in range(len(a)):
        pivot = a[k, k].clone()
        a[k, k] = 1
        a[k] /= pivot
        for i in range(len(a)):
            if i != k:
                factor = a[i, k].clone()
                a[i, k] = 0
                a[i] -= factor * a[k]
    return a


def _square(matrices: torch.Tensor) -> torch.Tensor:
    """Return the squared Frobenius norms of [P, P, M], [M]."""
    flat = matrices.flatten(0, 1)
    return summed(flat * flat)


def _added(products: torch.Tensor) -> torch.Tensor:
    """Return the sums of [P, P, M] over its second dimension, [P, M]."""
    return torch.stack([summed(row) for row in products])


def stored(scales: torch.Tensor) -> torch.Tensor:
    """Return scales as they are stored: float16, none of them infinite."""
    return scales.clamp(max=LARGEST_SCALE).half()


def per_weight(scales: torch.Tensor, size: int, columns: int) -> Iterator[torch.Tensor]:
    """Yield for each plane of scales [P, N, G] the scale of every weight, [N, K] float32."""
    for plane in scales:
        yield plane.float().repeat_interleave(size, 1)[:, :columns]
