"""Which layers are alike, from similarities that were measured: scores, the cut, a ranking.

Layers are counted from 0. A shared layer takes what its source makes: the nearest earlier layer
that is not shared itself. The rules are those of EchoAtt (Rajabzadeh et al., arXiv 2409.14595): the
score of a layer is its mean similarity to all others, and the largest gap between sorted scores
separates the layers that stay as they are, which must begin or end the stack.

The paper lists the layers that it shares in an order that grows with the ratio, but not the rule
behind it. Ours is greedy: share next the layer that leaves shared layers most like their sources.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from effbench.api.sharing import listed_map

Matrix = Sequence[Sequence[float]]
"""Similarity of each pair of layers, [L][L], symmetric."""


def joined(rows: Iterable[list[int]], tokens: int, samples: int) -> list[list[int]]:
    """Return texts of exactly `tokens` tokens: long rows are cut, short ones joined and then cut.

    Args:
        rows: Token ids of rows.
        tokens: Length of each text.
        samples: Texts at most; fewer where the rows end.
    """
    found, text = [], list[int]()
    for row in rows:
        text += row
        if len(text) >= tokens:
            found.append(text[:tokens])
            text = []
        if len(found) == samples:
            break
    return found


def scores(matrix: Matrix) -> list[float]:
    """Return the mean similarity of each layer to all others, [L]."""
    others = max(1, len(matrix) - 1)
    return [sum(v for j, v in enumerate(row) if j != i) / others for i, row in enumerate(matrix)]


@dataclass(frozen=True)
class Cut:
    """Where the largest gap between sorted scores cuts the stack."""

    gap: float
    """Its width."""
    first: int
    """The first layer of the inner band: all before it score low."""
    stop: int
    """The first layer after the band: it and all behind it score low."""
    odd: tuple[int, ...]
    """Layers that score low inside the band; they neither begin nor end the stack."""


def gap_cut(found: Sequence[float]) -> Cut:
    """Return the cut of layers with the scores `found`, two or more."""
    ordered = sorted(found)
    gap, low = max((b - a, a) for a, b in pairwise(ordered))
    below = {i for i, score in enumerate(found) if score <= low}
    first = next(i for i in range(len(found)) if i not in below)
    stop = next(i for i in reversed(range(len(found))) if i not in below) + 1
    return Cut(gap, first, stop, tuple(sorted(i for i in below if first < i < stop)))


def block_ends(shared: Collection[int]) -> tuple[int, ...]:
    """Return the last layer of each run of shared layers, ascending; a run ends a block."""
    return tuple(layer for layer in sorted(shared) if layer + 1 not in shared)


def ranking(matrix: Matrix, keep_first: int = 1, keep_last: int = 1) -> list[int]:
    """Return the layers that may be shared, in the order of the greedy choice.

    Each choice is the layer after which the sum over shared layers of the similarity to their
    sources is largest; layers that had it as their source get an earlier one. The first n layers of
    the ranking are what is shared when n are.

    Args:
        matrix: Similarities.
        keep_first: Layers at the beginning that are never shared, at least 1.
        keep_last: Layers at the end that are never shared.
    """
    length = len(matrix)
    rest, chosen = list(range(max(1, keep_first), length - keep_last)), list[int]()

    def worth(layer: int) -> float:
        shared = {*chosen, layer}
        places = listed_map(length, shared, "qk").sources
        return sum(matrix[i][places[i]] for i in shared)

    while rest:
        best = max(rest, key=lambda layer: (worth(layer), -layer))
        rest.remove(best)
        chosen.append(best)
    return chosen


def count_of(ratio: float, num_layers: int) -> int:
    """Return how many layers a share of all of them is, to the nearest one."""
    return int(ratio * num_layers + 0.5)
