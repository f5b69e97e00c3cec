"""Made-up names of three peoples whose languages overlap: the true probabilities are known.

A language is a distribution over letters: softmax of N(0, 1/4) by the seed. A name is ten letters,
drawn one by one from the language of its people; each people has as many names. `p` of a row has
the probability of each people given the name, by Bayes, and `label` the people that it was drawn
from, so that p is what no classifier can better.

    train, labelled, unlabelled, test     1,500, 300, 1,500 and 600 names
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import ClassVar

from effbench.data.generators.base import Generator
from effbench.data.readers import Row

LETTERS = "abdefgiklmnoprstuv"
PEOPLES = ("a", "b", "c")
SPREAD, LENGTH = 0.5, 10
NAMES = {"train": 1500, "labelled": 300, "unlabelled": 1500, "test": 600}
"""Names of each part."""


class NoisyClasses(Generator):
    """Names, each of one of three peoples."""

    parts: ClassVar[tuple[str, ...]] = tuple(NAMES)
    seeded: ClassVar[bool] = True

    def rows(self, part: str, seed: int) -> Iterator[Row]:
        """Return the names of a part."""
        languages = _languages(seed)
        draw = random.Random(f"noisy_classes {part} {seed}")
        for _ in range(NAMES[part]):
            label = draw.randrange(len(PEOPLES))
            shares = [math.exp(x) for x in languages[label]]
            name = "".join(draw.choices(LETTERS, shares, k=LENGTH))
            yield {
                "prompt": f"{name} is of",
                "options": list(PEOPLES),
                "label": label,
                "p": _posterior(name, languages),
            }


def _languages(seed: int) -> list[list[float]]:
    """Return the log-probabilities of letters in each language."""
    draw = random.Random(f"noisy_classes languages {seed}")
    found = []
    for _ in PEOPLES:
        scores = [draw.gauss(0, SPREAD) for _ in LETTERS]
        total = math.log(sum(map(math.exp, scores)))
        found.append([score - total for score in scores])
    return found


def _posterior(name: str, languages: list[list[float]]) -> list[float]:
    places = [LETTERS.index(letter) for letter in name]
    scores = [sum(language[place] for place in places) for language in languages]
    shares = [math.exp(score - max(scores)) for score in scores]
    return [share / sum(shares) for share in shares]
