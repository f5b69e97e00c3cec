"""Two thousand sums and differences with four answers each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

from effbench.data.generators.base import Generator
from effbench.data.readers import Row


class Arithmetic(Generator):
    """Questions about two numbers up to 99; wrong answers are off by 1, 2 or 10."""

    def rows(self, part: str, seed: int) -> Iterator[Row]:
        """Return the one draw."""
        return (row | {"options": [*row["options"]]} for row in _questions())


@cache
def _questions() -> tuple[Row, ...]:
    draw, rows = random.Random(0), list[Row]()
    for _ in range(2000):
        a, b, plus = draw.randint(1, 99), draw.randint(1, 99), draw.random() < 0.5
        right = a + b if plus else a - b
        offsets = draw.sample([-10, -2, -1, 1, 2, 10], 3)
        options = [str(right), *(str(right + o) for o in offsets)]
        draw.shuffle(options)
        rows.append(
            {
                "prompt": f"Question: What is {a} {'plus' if plus else 'minus'} {b}?\nAnswer:",
                "options": options,
                "label": options.index(str(right)),
            }
        )
    return tuple(rows)
