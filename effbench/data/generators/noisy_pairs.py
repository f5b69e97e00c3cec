"""Preference pairs of four sources, three of which label them wrongly in ways that are known.

Answers are made-up names of two to six syllables. Each letter has a worth, drawn from N(0, 1) by
the seed; a name is worth the mean over its letters, and the worthier of two is truly preferred.

    clean     5 of 100 pairs are swapped
    flips40   40 of 100
    flips90   90 of 100
    longer    the longer name is the chosen one, whatever it is worth
    noisy     these four, 500 pairs of each
    trusted, held_out     200 and 500 other pairs, none swapped

A row has `source` (0 to 3 in this order, 4 for the last two) and `flipped`: 1 where the chosen name
is the one that is worth less.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import ClassVar

from effbench.data.generators.base import Generator
from effbench.data.readers import Row

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = (2, 6)
SOURCES = {"clean": 0.05, "flips40": 0.4, "flips90": 0.9, "longer": None}
"""Share of swapped pairs; None where length decides."""
PAIRS = {**dict.fromkeys(SOURCES, 500), "trusted": 200, "held_out": 500}
"""Pairs of each part."""


class NoisyPairs(Generator):
    """Names, of which one sounds better than the other."""

    parts: ClassVar[tuple[str, ...]] = ("noisy", *PAIRS)
    seeded: ClassVar[bool] = True

    def rows(self, part: str, seed: int) -> Iterator[Row]:
        """Return the pairs of a part; prompts are numbers, of which no two are the same."""
        worth = worths(seed)
        for source in SOURCES if part == "noisy" else (part,):
            yield from _pairs(source, worth, random.Random(f"noisy_pairs {source} {seed}"))


def worths(seed: int) -> dict[str, float]:
    """Return what each letter is worth."""
    draw = random.Random(f"noisy_pairs worth {seed}")
    return {letter: draw.gauss(0, 1) for letter in CONSONANTS + VOWELS}


def _pairs(source: str, worth: dict[str, float], draw: random.Random) -> Iterator[Row]:
    place = list(PAIRS).index(source)
    first = sum([*PAIRS.values()][:place])
    for number in range(first, first + PAIRS[source]):
        better, worse = _two_names(worth, draw)
        longer = len(better) > len(worse)
        share = SOURCES.get(source, 0.0)
        flipped = draw.random() < share if share is not None else not longer
        chosen, rejected = (worse, better) if flipped else (better, worse)
        yield {
            "prompt": f"Name {number}:",
            "chosen": f" {chosen}",
            "rejected": f" {rejected}",
            "source": min(place, len(SOURCES)),
            "flipped": int(flipped),
        }


def _two_names(worth: dict[str, float], draw: random.Random) -> list[str]:
    """Return two names of different lengths, the worthier one first."""
    sizes = draw.sample(range(SYLLABLES[0], SYLLABLES[1] + 1), 2)
    names = [
        "".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(n)) for n in sizes
    ]
    return sorted(names, key=lambda name: -mean_worth(name, worth))


def mean_worth(name: str, worth: dict[str, float]) -> float:
    """Return what a name is worth."""
    return sum(worth[letter] for letter in name) / len(name)
