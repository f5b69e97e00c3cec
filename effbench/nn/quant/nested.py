"""Codes whose leading bits are the codes at fewer bits, with levels of its own for each row.

A row w [K] with sensitivities f [K] is sorted once; a cluster is then an interval of it:

    seed     2^s intervals with the least sum of f (w - mean)^2, by dynamic programming
    split    each interval in two, at the cut with the least such sum: children 2c and 2c + 1 of c
    table_b  mean of w, weighted by f, over the weights whose code starts with the b bits of c

With F, A the running sums of f and f w, an interval (j, i] lowers the sum of f w^2 by
(A_i - A_j)^2 / (F_i - F_j), so the best intervals are those of the largest total. The dynamic
programme over i finds all of one more interval in O(K log K): the best start never falls with i.

Sources: Park et al., Any-Precision LLM, ICML 2024, arXiv 2402.10517 (seed and splits); Kim et al.,
SqueezeLLM, ICML 2024, arXiv 2306.07629 (the weighted seed); Grønlund et al., Fast Exact k-Means,
k-Medians and Bregman Divergence Clustering in 1D, arXiv 1701.07204 (the programme).

Ours: the seed is the optimum, where the authors take k-means++ and Lloyd's rounds, and so is each
split; equal weights share a code. All is float64, and computed for many rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F

from effbench.nn.quant import released
from effbench.nn.quant.intervals import Rows, best_cuts, best_intervals

TOGETHER = 2**18
"""Weights of the rows that are computed at once: what they need stays near the processor."""
NOTHING = 1e-14
"""Share of a row's sensitivity below which differences of running sums are rounding."""


class Nested(NamedTuple):
    """A matrix in codes, and what they stand for at every width."""

    codes: torch.Tensor
    """[N, K] uint8, of the widest; the codes at b bits are their leading b bits."""
    tables: dict[int, torch.Tensor]
    """[N, 2^b] float64 by width b, ascending in each row."""


Seed = Literal["optimal", "released"]
"""How intervals are found: the best ones, or those of the authors' program (`released`)."""


def quantise(
    weight: torch.Tensor,
    sensitivity: torch.Tensor | None,
    seed_bits: int,
    bits: int,
    seed: Seed = "optimal",
) -> Nested:
    """Return the nested codes of a matrix.

    Args:
        weight: [N, K], finite.
        sensitivity: [N, K], none negative; None weighs all alike.
        seed_bits: Width s of the clusters that are found together.
        bits: Width of the codes, at least s and at most 8.
        seed: How intervals are found.
    """
    if sensitivity is None:
        sensitivity = torch.ones_like(weight)
    rows = max(1, TOGETHER // weight.shape[1])
    blocks = zip(weight.split(rows), sensitivity.split(rows), strict=True)
    found = [_of_rows(SortedRows.of(*block), seed_bits, bits, seed) for block in blocks]
    tables = {b: torch.cat([x.tables[b] for x in found]) for b in range(seed_bits, bits + 1)}
    return Nested(torch.cat([x.codes for x in found]), tables)


def _of_rows(rows: SortedRows, seed_bits: int, bits: int, seed: Seed) -> Nested:
    bounds = rows.released if seed == "released" else rows.best
    codes = rows.clusters(bounds(seed_bits, bits))
    unsorted = torch.empty_like(codes).scatter_(1, rows.order, codes)
    return Nested(unsorted.to(torch.uint8), rows.tables(codes, seed_bits, bits))


@dataclass(frozen=True)
class SortedRows:
    """Rows in ascending order, of which every cluster is an interval."""

    values: torch.Tensor
    """[N, K] float64, ascending."""
    mass: torch.Tensor
    """[N, K] float64, the sensitivities; those of a row add up to 1."""
    order: torch.Tensor
    """[N, K] int64, the columns of the values."""

    @classmethod
    def of(cls, weight: torch.Tensor, sensitivity: torch.Tensor) -> Self:
        """Sort rows [N, K]; zeros do not count, and a row of which nothing does counts alike."""
        mass = sensitivity.double().masked_fill(weight == 0, 0)
        mass = mass / mass.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        mass = torch.where(mass.any(1, keepdim=True), mass, 1)
        values, order = weight.double().sort(dim=1, stable=True)
        return cls(values, (mass / mass.sum(1, keepdim=True)).gather(1, order), order)

    @cached_property
    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Running sums of mass and of mass times the value's distance from the row's mean."""
        mean = (self.mass * self.values).sum(1, keepdim=True)
        parts = self.mass, self.mass * (self.values - mean)
        return F.pad(parts[0].cumsum(1), (1, 0)), F.pad(parts[1].cumsum(1), (1, 0))

    @cached_property
    def barred(self) -> torch.Tensor:
        """Whether an interval cannot start at a place, since its first value is the last one's."""
        return F.pad(self.values[:, 1:] == self.values[:, :-1], (1, 1))

    def tables(self, codes: torch.Tensor, seed_bits: int, bits: int) -> dict[int, torch.Tensor]:
        """Return the levels of every width.

        A cluster without mass has its plain mean, one without weights the level of its parent.

        Args:
            codes: [N, K] int64 at `bits` bits, in the order of the values.
            seed_bits: Lowest width.
            bits: Highest width.
        """
        zeros = self.values.new_zeros(len(codes), 2**bits)
        parts = self.mass, self.mass * self.values, torch.ones_like(self.mass), self.values
        sums = [zeros.scatter_add(1, codes, part) for part in parts]
        means = {bits: _means(*sums)}
        for b in range(bits - 1, seed_bits - 1, -1):
            sums = [x.unflatten(1, (-1, 2)).sum(2) for x in sums]
            means[b] = _means(*sums)
        tables = {seed_bits: _filled(means[seed_bits])}
        for b in range(seed_bits + 1, bits + 1):
            parents = tables[b - 1].repeat_interleave(2, 1)
            tables[b] = torch.where(means[b].isnan(), parents, means[b])
        return tables

    # -- intervals: bounds [N, C + 1] of C of them, from 0 to K ------------------------------------

    def best(self, seed_bits: int, bits: int) -> torch.Tensor:
        """Return the bounds of the best intervals and cuts, [N, 2^bits + 1]."""
        bounds = self.seed(2**seed_bits)
        for _ in range(bits - seed_bits):
            bounds = self.split(bounds)
        return bounds

    def released(self, seed_bits: int, bits: int) -> torch.Tensor:
        """Return the bounds that the authors' program finds, [N, 2^bits + 1]; row by row."""
        pairs = zip(self.values.cpu().numpy(), self.mass.cpu().numpy(), strict=True)
        found = [torch.from_numpy(released.bounds(*pair, seed_bits, bits)) for pair in pairs]
        return torch.stack(found).to(self.values.device)

    def seed(self, clusters: int) -> torch.Tensor:
        """Return the bounds of the best intervals, [N, clusters + 1]."""
        mass, moment = self.sums
        if (found := best_intervals(Rows(mass, moment, self.barred), clusters)) is not None:
            return found
        gains, starts = _gain(mass, moment), []
        for _ in range(clusters - 1):
            gains, start = self._one_more(gains)
            starts.append(start)
        bounds = [torch.full_like(self.order[:, :1], self.order.shape[1])]
        for start in reversed(starts):
            bounds.append(start.gather(1, bounds[-1]))
        return torch.cat([torch.zeros_like(bounds[0]), *reversed(bounds)], 1)

    def split(self, bounds: torch.Tensor) -> torch.Tensor:
        """Return the bounds after the best cut of every interval, [N, 2 C + 1].

        One that holds no two values is the left child as it is, and the right child is empty.
        """
        mass, moment = self.sums
        if (found := best_cuts(Rows(mass, moment, self.barred), bounds)) is not None:
            return found
        segment = self.clusters(bounds)
        place = torch.arange(segment.shape[1], device=segment.device).expand_as(segment)
        low, high = bounds.gather(1, segment), bounds.gather(1, segment + 1)
        left = mass[:, :-1] - mass.gather(1, low), moment[:, :-1] - moment.gather(1, low)
        right = mass.gather(1, high) - mass[:, :-1], moment.gather(1, high) - moment[:, :-1]
        barred = self.barred[:, :-1] | (place == low)
        gains = (_gain(*left) + _gain(*right)).masked_fill(barred, -torch.inf)
        best, cut = _best(gains, segment, place, bounds.shape[1] - 1)
        cut = torch.where(best.isinf(), bounds[:, 1:], cut)
        pairs = torch.stack([bounds[:, :-1], cut], 2).flatten(1)
        return torch.cat([pairs, bounds[:, -1:]], 1)

    def clusters(self, bounds: torch.Tensor) -> torch.Tensor:
        """Return the interval that each sorted weight is in, [N, K] int64."""
        place = torch.arange(self.order.shape[1], device=bounds.device)
        inner = bounds[:, 1:-1].contiguous()
        return torch.searchsorted(inner, place.expand_as(self.order).contiguous(), right=True)

    def _one_more(self, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one interval at the end of every prefix of the rows.

        Args:
            before: [N, K + 1] what the intervals so far gain on each prefix.

        Returns:
            The same with one more, and where that starts. Ends are done by halving: with those at
            multiples of 2 h known, an end between two of them starts between their two starts.
        """
        before = before.masked_fill(self.barred, -torch.inf)
        gains, starts = before.clone(), torch.zeros_like(before, dtype=torch.int64)
        places = before.shape[1]
        half = 1 << (places - 1).bit_length() - 1
        while half:
            found = self._at_ends(before, starts[:, 2 * half :: 2 * half], half)
            gains[:, half :: 2 * half], starts[:, half :: 2 * half] = found
            half //= 2
        return gains, starts

    def _at_ends(
        self, before: torch.Tensor, known: torch.Tensor, half: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gain and start of the best last interval that ends at h, 3 h, 5 h, ..., [N, M].

        Args:
            before: [N, K + 1] gains of the intervals before, by where the last one starts.
            known: [N, M - 1 or M] best starts for the ends 2 h, 4 h, ....
            half: h.
        """
        ends = slice(half, None, 2 * half)
        count = len(range(before.shape[1])[ends])
        segment, start = _windows(known[:, : count - 1], before.shape[1])
        mass, moment = (x[:, ends].gather(1, segment) - x.gather(1, start) for x in self.sums)
        gains = before.gather(1, start) + _gain(mass, moment)
        late = start > 2 * half * segment + half
        return _best(gains.masked_fill(late, -torch.inf), segment, start, count)


def _windows(borders: torch.Tensor, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut 0 ... P - 1 into segments of which two neighbours share their border.

    Args:
        borders: [N, M - 1], ascending.
        places: P.

    Returns:
        For each of the P + M - 1 places, borders twice, its segment and its number, int64.
    """
    rows, inner = borders.shape
    marks = torch.zeros(rows, places + inner, dtype=torch.int64, device=borders.device)
    firsts = borders + torch.arange(1, inner + 1, device=borders.device)
    segment = marks.scatter_(1, firsts, 1).cumsum(1)
    return segment, torch.arange(places + inner, device=borders.device) - segment


def _best(
    gains: torch.Tensor, segment: torch.Tensor, place: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest gain of each segment and its first place, [N, count] each.

    Args:
        gains: [N, L].
        segment: [N, L] int64.
        place: [N, L] int64.
        count: Segments; one that nothing is in gains minus infinity.
    """
    shape = len(gains), count
    best = gains.new_full(shape, -torch.inf).scatter_reduce_(1, segment, gains, "amax")
    row, at = (gains == best.gather(1, segment)).nonzero(as_tuple=True)
    first = torch.full((len(gains) * count,), 2**62, device=gains.device)
    first.scatter_reduce_(0, row * count + segment[row, at], place[row, at], "amin")
    return best, first.view(shape)


def _gain(mass: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return how much intervals lower the sum of f w^2 when their mean stands for them."""
    return torch.where(mass > NOTHING, moment.square() / mass, 0)


def _means(
    mass: torch.Tensor, moment: torch.Tensor, count: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """Return the means of clusters, plain where they have no mass; NaN where they are empty."""
    return torch.where(mass > 0, moment / mass, total / count)


def _filled(levels: torch.Tensor) -> torch.Tensor:
    """Return levels [N, C] whose gaps have the level before, the leading ones the lowest."""
    known = levels.masked_fill(levels.isnan(), -torch.inf).cummax(1).values
    lowest = levels.masked_fill(levels.isnan(), torch.inf).amin(1, keepdim=True)
    return torch.maximum(known, lowest)
