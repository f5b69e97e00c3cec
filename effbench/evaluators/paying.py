"""From which context and batch a method pays, in a sentence: what gains over the dense cache say.

A gain is what the dense cache takes over what the method takes, of bytes or of seconds. A method
pays where the whole interval of its gain is above 1, and what cannot be told apart does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Interval = Sequence[float]
"""A gain, and the lower and the upper end of its interval."""
Gains = Mapping[tuple[int, int], Interval]
"""Of one quantity, by batch and tokens of context."""
QUANTITIES = {
    "memory_gain@": "peak memory",
    "memory_gain@decode": "memory while decoding",
    "ttft_speedup@prefill": "time to first token",
    "decode_speedup@decode": "decode time",
}
"""What gains are of, by `name@phase` of their metric."""


def pays(gain: Interval) -> bool:
    """Whether an interval of a gain is wholly on the good side."""
    _, low, _ = gain
    return low > 1


def sentences(who: str, cells: Mapping[tuple[int, int, int], Mapping[str, Interval]]) -> list[str]:
    """Return where a method pays, a sentence for each number of new tokens.

    Args:
        who: The method.
        cells: Gains by `name@phase`, of each batch, context and number of new tokens.
    """
    told, counts = [], dict.fromkeys(new for *_, new in cells)
    for count in counts:
        gains = {
            what: {(b, tokens): g[name] for (b, tokens, new), g in cells.items() if new == count}
            for name, what in QUANTITIES.items()
        }
        told.append(sentence(f"{who}, {count} new" if len(counts) > 1 else who, gains))
    return told


def sentence(who: str, gains: Mapping[str, Gains]) -> str:
    """Return where a method pays.

    Args:
        who: The method.
        gains: By what they are of, such as "peak memory"; all of the same places.
    """
    told = "; ".join(f"in {what} {_where(of)}" for what, of in gains.items())
    return f"{who} against the dense cache, by tokens of context: pays {told}."


def _where(gains: Gains) -> str:
    """Return where one quantity pays, batches of which the same is true together."""
    batches: dict[str, list[int]] = {}
    for batch in sorted({batch for batch, _ in gains}):
        of_batch = {tokens: gain for (rows, tokens), gain in gains.items() if rows == batch}
        batches.setdefault(_span(of_batch), []).append(batch)
    return ", ".join(f"{span} at batch {_listed(rows)}" for span, rows in batches.items())


def _span(gains: Mapping[int, Interval]) -> str:
    """Return at which contexts a batch pays."""
    contexts = sorted(gains)
    paying = [tokens for tokens in contexts if pays(gains[tokens])]
    if not paying:
        return f"never {'up to' if contexts[1:] else 'at'} {contexts[-1]:,}"
    if paying == contexts[-len(paying) :]:
        return f"{'from' if contexts[1:] else 'at'} {paying[0]:,}"
    return f"at {_listed(paying)} but not at {_listed([c for c in contexts if c not in paying])}"


def _listed(numbers: Sequence[int]) -> str:
    *first, last = (f"{number:,}" for number in numbers)
    return f"{', '.join(first)} and {last}" if first else last
