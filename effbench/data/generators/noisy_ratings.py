"""Made-up names with ratings, of sources that rate them wrongly in ways that are known.

The names are those of `noisy_pairs`, both of a pair to one prompt. They are rated from 0 to 4 in
`worth` (which fifth a name is in by what it is worth) and in `size` (syllables, less two). Where
that has a pair swapped, the worth of both names is rated upside down, 4 less what is true.

    clean, flips40, flips90     5, 40 and 90 of 100 prompts have such ratings
    longer                      pairs, of which the longer name is the chosen one
    noisy                       these four: 1,000 ratings of each, and 500 pairs
    trusted, held_out           400 right ratings; 500 pairs of which the worthier is chosen

Each third prompt has no rating in `size`. `source` and `flipped` are those of `noisy_pairs`; an
answer in the middle fifth is rated alike upside down, and is not flipped.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from typing import ClassVar

from effbench.data.generators import noisy_pairs
from effbench.data.generators.base import Generator
from effbench.data.readers import Row

RATED = ("clean", "flips40", "flips90", "trusted")
LEVELS = 5
SILENT = 3
"""One prompt of so many has no rating in `size`."""


class NoisyRatings(Generator):
    """Names, each with ratings of how it sounds and how long it is; and pairs of names."""

    parts: ClassVar[tuple[str, ...]] = noisy_pairs.NoisyPairs.parts
    seeded: ClassVar[bool] = True

    def rows(self, part: str, seed: int) -> Iterator[Row]:
        """Return the ratings of a part, or the pairs of a source of pairs."""
        worth = noisy_pairs.worths(seed)
        bounds = _fifths(worth, seed)
        for source in noisy_pairs.SOURCES if part == "noisy" else (part,):
            for number, row in enumerate(noisy_pairs.NoisyPairs().rows(source, seed)):
                if source not in RATED:
                    yield row
                    continue
                for side in ("chosen", "rejected"):
                    yield _rated(row, row[side], worth, bounds, number % SILENT > 0)


def _fifths(worth: dict[str, float], seed: int) -> list[float]:
    """Return the worths between which each fifth of all names lies, by a sample."""
    rows = noisy_pairs.NoisyPairs().rows("held_out", seed)
    names = (row[side].strip() for row in rows for side in ("chosen", "rejected"))
    found = sorted(noisy_pairs.mean_worth(name, worth) for name in names)
    return [found[len(found) * k // LEVELS] for k in range(1, LEVELS)]


def _rated(row: Row, answer: str, worth: dict[str, float], bounds: list[float], sized: bool) -> Row:
    """Return one answer of a pair with its ratings."""
    name = answer.strip()
    true = bisect(bounds, noisy_pairs.mean_worth(name, worth))
    rating = LEVELS - 1 - true if row["flipped"] else true
    return {
        "prompt": row["prompt"],
        "answer": name,
        "worth": rating,
        "size": len(name) // 2 - noisy_pairs.SYLLABLES[0] if sized else None,
        "source": row["source"],
        "flipped": int(rating != true),
    }
