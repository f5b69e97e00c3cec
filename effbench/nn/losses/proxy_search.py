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
    best = [_best(data, tried, scores, fold != f, by) for f in range(FOLDS)]
    gains = torch.zeros_like(scores[0])
    for f, eps in enumerate(best):
        held_out = data.only(fold == f)
        gains[fold == f] = scores[0, fold == f] - held_out.proxy_brier(eps[None], by)[0]
    gain, error = clustered(gains, data.rows)
    eps = _best(data, tried, scores, fold >= 0, by) if gain > error else torch.zeros_like(tried[0])
    moved = (FOLDS + (gain > error)) * SWEEPS * math.prod(shape) * len(MOVES)
    return Found(
        eps,
        teacher=float(scores[0].mean()),
        proxy=float(data.proxy_brier(eps[None], by).mean()),
        gain=gain,
        error=error,
        candidates=len(tried) + moved,
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


def _best(
    data: Labelled, tried: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor, by: Groups
) -> torch.Tensor:
    """Return the refined best candidate on the chosen examples, [G, M]."""
    means = scores[:, chosen].mean(-1)
    place = int(means.argmin())
    best, eps = float(means[place]), tried[place]
    part = data.only(chosen)
    for place in list(range(eps.numel())) * SWEEPS:
        moved = within(_moved(eps, place))
        found = part.proxy_brier(moved, by).mean(-1)
        if float(found.min()) < best:
            best, eps = float(found.min()), moved[found.argmin()]
    return eps


def _moved(eps: torch.Tensor, place: int) -> torch.Tensor:
    """Return copies with one coefficient changed, [moves, G, M]."""
    copies = eps.repeat(len(MOVES), 1, 1)
    factors = torch.tensor(MOVES, dtype=eps.dtype, device=eps.device)
    copies.flatten(1)[:, place] *= factors
    return copies
