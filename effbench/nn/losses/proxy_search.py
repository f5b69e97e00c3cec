"""The search of the coefficients of a perturbed loss, on labels and without a student.

    Q(eps) = mean_i || p_px(x_i; eps) - onehot(y_i) ||_2^2         the Brier score of the proxy

Lower is better. That coefficients are chosen by the quality of the proxy on a labelled validation
set is the paper's (arXiv 2305.05010, from reports of it); the rest is ours, since nothing of the
search is published:

    candidates   0; then draws s * N(0, 1), s log-uniform in [0.05, 10], their negative entries
                 scaled up to the bound of `convexity`
    refinement   three sweeps over the coefficients of the best one: half, double, negative
    guard        five folds by row of data: the best of four is scored on the fifth. Unless the mean
                 gain over eps = 0 there exceeds one standard error, the answer is eps = 0

Negative coefficients are needed: positive ones can only make a proxy sharper than its teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from effbench.nn.losses.convexity import LIMIT, peaks
from effbench.nn.losses.labelled import Labelled
from effbench.nn.losses.perturbed import Groups

FOLDS = 5
SWEEPS = 3
SCALES = (0.05, 10.0)
MOVES = (0.5, 2.0, -1.0)
AT_ONCE = 2**19
"""Elements of the proxies that are solved for at once."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    eps: torch.Tensor
    """[G, M] float64; zeros where the guard found no gain."""
    teacher: float
    """Q of the teacher as it is."""
    proxy: float
    """Q of `eps`, on the labels that it was chosen by."""
    gain: float
    """Mean by which Q falls on held-out folds."""
    error: float
    """Standard error of the gain."""
    candidates: int
    """Coefficients that were tried."""

    @property
    def accepted(self) -> bool:
        """Whether the gain is beyond its standard error."""
        return self.gain > self.error


def search(
    data: Labelled, by: Groups, shape: tuple[int, int], draws: int, generator: torch.Generator
) -> Found:
    """Return the coefficients whose proxy is nearest to the labels, or zeros.

    Args:
        data: At least as many rows as folds.
        by: Which classes share coefficients.
        shape: Groups G and orders M.
        draws: Random candidates.
        generator: Of the draws and the folds; on the CPU.
    """
    tried = candidates(shape, draws, generator).to(data.log_t.device)
    scores = torch.cat([data.proxy_brier(part, by) for part in tried.split(_at_once(data))])
    fold = folds(data.rows, generator)
    every = torch.arange(FOLDS + 1, device=fold.device)  # the last leaves nothing out
    best, tests = refined(data, tried, scores, fold != every[:, None], by)
    held_out = data.proxy_brier(best[:FOLDS], by).gather(0, fold[None])[0]
    gain, error = clustered(scores[0] - held_out, data.rows)
    eps = best[-1] if gain > error else torch.zeros_like(best[-1])
    return Found(
        eps,
        teacher=float(scores[0].mean()),
        proxy=float(data.proxy_brier(eps[None], by).mean()),
        gain=gain,
        error=error,
        candidates=len(tried) + tests,
    )


def candidates(shape: tuple[int, int], draws: int, generator: torch.Generator) -> torch.Tensor:
    """Return zeros and then random coefficients within the bound, [1 + draws, G, M] float64."""
    low, high = map(math.log, SCALES)
    share = torch.rand(draws, 1, 1, generator=generator, dtype=torch.float64)
    scale = (low + (high - low) * share).exp()
    drawn = scale * torch.randn(draws, *shape, generator=generator, dtype=torch.float64)
    return torch.cat([torch.zeros(1, *shape, dtype=torch.float64), within(drawn)])


def within(eps: torch.Tensor) -> torch.Tensor:
    """Return coefficients [..., M], their negative part scaled up to be within the bound."""
    room = torch.tensor(peaks(eps.shape[-1]), dtype=eps.dtype, device=eps.device)
    used = (-eps).clamp(min=0) @ room
    return torch.where(eps < 0, eps * (LIMIT / used.clamp(min=LIMIT))[..., None], eps)


def folds(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the fold of each example, [N]; those of one row are in one fold."""
    _, row = rows.unique(return_inverse=True)
    count = int(row.max()) + 1
    dealt = torch.randperm(count, generator=generator) % FOLDS
    return dealt.to(rows.device)[row]


def clustered(values: torch.Tensor, rows: torch.Tensor) -> tuple[float, float]:
    """Return the mean of values [N] and its standard error, those of one row being a cluster."""
    _, row = rows.unique(return_inverse=True)
    count, mean = int(row.max()) + 1, values.mean()
    sums = values.new_zeros(count).index_add_(0, row, values - mean)
    variance = sums.square().sum() * count / max(1, count - 1)
    return float(mean), float(variance.sqrt()) / len(values)


def _at_once(data: Labelled) -> int:
    return max(1, AT_ONCE // data.log_t.numel())


def refined(
    data: Labelled, tried: torch.Tensor, scores: torch.Tensor, sets: torch.Tensor, by: Groups
) -> tuple[torch.Tensor, int]:
    """Return the refined best candidate on each of some sets of examples, and how many were tried.

    Args:
        data: All examples.
        tried: Candidates [K, G, M].
        scores: Of each candidate and example, [K, N].
        sets: Which examples count, [S, N].
        by: Which classes share coefficients.

    Returns:
        [S, G, M], and a count.
    """
    weights = sets / sets.sum(-1, keepdim=True)
    best, first = (weights.to(scores.dtype) @ scores.T).min(-1)
    eps, tests = tried[first], 0
    for place in list(range(eps[0].numel())) * SWEEPS:
        moved = within(_moved(eps, place))
        found = data.proxy_brier(moved.flatten(0, 1), by).unflatten(0, moved.shape[:2])
        value, move = (weights * found).sum(-1).min(0)
        chosen = moved[move, torch.arange(len(eps), device=eps.device)]
        eps = torch.where((value < best)[:, None, None], chosen, eps)
        best, tests = torch.minimum(best, value), tests + found[..., 0].numel()
    return eps, tests


def _moved(eps: torch.Tensor, place: int) -> torch.Tensor:
    """Return copies of coefficients [S, G, M] with one changed in each, [moves, S, G, M]."""
    copies = eps.repeat(len(MOVES), 1, 1, 1)
    factors = torch.tensor(MOVES, dtype=eps.dtype, device=eps.device)
    copies.flatten(2)[..., place] *= factors[:, None]
    return copies
