"""Seeds and cuts as the program of Any-Precision LLM finds them, for parity with its artefacts.

Park et al., Any-Precision LLM, ICML 2024, arXiv 2402.10517, and the k-means that its program calls
(flash1dkmeans 0.2.5). A row is sorted, x_0 <= ... <= x_{K-1}, with sensitivities f. Both are local
searches:

    seed   k-means++: each further centre is the best of 2 + ⌊ln C⌋, drawn with odds
           f (x - centre)^2;
           then at most 50 rounds: intervals end half-way between centres, and centres are means
    cut    halving: with the means l, r on both sides of the tried cut, go left or right by where
           (l + r) / 2 lies, and stop where it lies at the cut: an optimum among its neighbours

An interval of which one weight alone
counts is not cut, one of which none does is cut as if all did. Draws are numpy's legacy ones, from
the same seed for every row; centres of the seed are float32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np

ROUNDS = 50
"""Of the seed."""


class Sums(NamedTuple):
    """A sorted row and its running sums, each with a zero in front."""

    values: np.ndarray
    mass: np.ndarray
    moment: np.ndarray
    square: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, mass: np.ndarray) -> Self:
        """Return those of a row of float64 numbers, ascending."""
        parts = (mass, mass * values, mass * values**2)
        return cls(values, *(np.concatenate([[0.0], np.cumsum(part)]) for part in parts))


def bounds(values: np.ndarray, mass: np.ndarray, seed_bits: int, bits: int) -> np.ndarray:
    """Return the bounds of the 2^bits intervals of a row, from 0 to K.

    Args:
        values: [K] float64, ascending.
        mass: [K] float64, none negative, some positive.
        seed_bits: Intervals that are found together, as a power of two.
        bits: Intervals at the end.
    """
    sums, plain = Sums.of(values, mass), Sums.of(values, np.ones_like(values))
    found = _seed(sums, 2**seed_bits)
    for _ in range(bits - seed_bits):
        pairs = pairwise(found)
        halves = [(start, _cut(sums, plain, int(start), int(stop))) for start, stop in pairs]
        found = np.array([*(place for pair in halves for place in pair), found[-1]])
    return found


# -- the seed ----------------------------------------------------------------------------------


def _seed(sums: Sums, clusters: int) -> np.ndarray:
    """Return the bounds of the first intervals."""
    short = sums.values.astype(np.float32)
    centres, found = np.sort(_drawn(sums, short, clusters)), np.empty(0)
    for _ in range(ROUNDS):
        borders = _borders(short, centres)
        if np.array_equal(borders, found):
            break
        found = borders
        mass, moment = np.diff(sums.mass[found]), np.diff(sums.moment[found])
        for i in range(clusters):
            if found[i] < found[i + 1]:
                own = short[found[i] : found[i + 1]]
                centres[i] = moment[i] / mass[i] if mass[i] else own.mean()
    return found


def _drawn(sums: Sums, short: np.ndarray, clusters: int) -> np.ndarray:
    """Return the centres that k-means++ draws."""
    draws, trials = np.random.RandomState(0), 2 + int(np.log(clusters))
    first = np.searchsorted(sums.mass[1:], draws.random_sample() * sums.mass[-1])
    centres = short[[first]]
    while len(centres) < clusters:
        far = _far(sums, short, centres)
        places = np.searchsorted(far, draws.random_sample(trials) * far[-1])
        tried = [np.append(centres, short[min(p, len(short) - 1)]) for p in places]
        centres = min(tried, key=lambda some: _far(sums, short, some)[-1])
    return centres


def _far(sums: Sums, short: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the running sum of f (x - its centre)^2."""
    centres = np.sort(centres)
    own = centres.astype(np.float64).repeat(np.diff(_borders(short, centres)))
    return np.cumsum(np.diff(sums.mass) * (sums.values - own) ** 2)


def _borders(short: np.ndarray, centres: np.ndarray) -> np.ndarray:
    inner = np.searchsorted(short, (centres[:-1] + centres[1:]) / 2)
    return np.concatenate([[0], inner, [len(short)]])


# -- cuts --------------------------------------------------------------------------------------


def _cut(sums: Sums, plain: Sums, start: int, stop: int) -> int:
    """Return where an interval is cut; its end where the right part is empty."""
    if stop - start <= 2:
        return min(start + 1, stop)
    counting = np.flatnonzero(np.diff(sums.mass[start : stop + 1]))
    if not len(counting):
        return _halved(plain, start, stop, start + 1, stop - 1)
    first, last = start + int(counting[0]), start + int(counting[-1])
    return stop if first == last else _halved(sums, start, stop, first + 1, last)


def _halved(sums: Sums, start: int, stop: int, floor: int, ceiling: int) -> int:
    """Return the cut at which the halving ends, which is at least `floor` and at most `ceiling`."""
    while floor < ceiling:
        cut = (floor + ceiling) // 2
        left, right = (sums.mass[cut] - sums.mass[start], sums.mass[stop] - sums.mass[cut])
        middle = (sums.moment[cut] - sums.moment[start]) / left
        middle = (middle + (sums.moment[stop] - sums.moment[cut]) / right) / 2
        if sums.values[cut - 1] > middle:
            ceiling = max(floor, cut - 1)
        elif middle > sums.values[cut]:
            floor = cut + 1
        else:
            break
    return (floor + ceiling) // 2
