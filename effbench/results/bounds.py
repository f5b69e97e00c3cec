"""What a metric can be at all, by its name: where its interval has to end.

A share is one by what it is, whatever came up: half a point for a tie is an outcome of one too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

SHARE = (0.0, 1.0)
POSITIVE = (0.0, math.inf)
LOYALTY = (1 - math.sqrt(math.log(2)), 1.0)

KNOWN: Mapping[str, tuple[float, float]] = {
    "kl": POSITIVE,
    "reverse_kl": POSITIVE,
    "logit_mse": POSITIVE,
    "js": (0.0, math.log(2)),
    "probability_loyalty": LOYALTY,
    "answer_loyalty": LOYALTY,
    "refusal_rate": SHARE,
    "invalid_rate": SHARE,
    "leak_rate": SHARE,
    "trust_score": (0.0, 100.0),
    "trust_delta_abs": (0.0, 100.0),
    "trust_shift": POSITIVE,
}
"""Bounds of metrics whose name alone tells them."""
SHARES = {"accuracy", "acc", "match", "em", "f1", "agreement", "loyalty", "flips", "truncated"}
"""Words of which one is in the name of every other share, as in `exact_match_best_of_4`."""


AMOUNTS = {
    *("FLOP", "J", "bytes", "decisions", "g", "labels", "ms", "parameters"),
    *("positions", "rows", "rules", "s", "sequences", "steps", "tokens", "W"),
}
"""Units of which there cannot be less than none, over whatever they are counted."""


def bounds_of(metric: str, unit: str = "") -> tuple[float, float]:
    """Return the least and the largest value of a metric; infinite where none is known.

    A metric of another scale that bears such a name, as percents of right answers would, is told
    by its mean: see `stats.shares`.
    """
    if metric in KNOWN:
        return KNOWN[metric]
    if unit.replace("/", " ").partition(" ")[0] in AMOUNTS:
        return POSITIVE
    return SHARE if SHARES & {*metric.split("_")} else (-math.inf, math.inf)
