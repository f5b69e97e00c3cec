"""Words that rules are made of: those that a language model expects next, or those of a text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

SHORTEST = 3
"""Letters of the shortest word."""
WORD_STARTS = "Ġ▁ "
"""How tokenizers write that a token begins a word."""
WORD_GOES_ON = "##"
"""How WordPiece writes that it does not."""
LETTERS = re.compile(rf"[a-z]{{{SHORTEST},}}")
ENDINGS = ("ing", "ed", "es", "ly", "s")
"""What `stem` takes off, the first that fits."""
COMMON = """
    about above after again against all also although always among and another any anything are
    around because been before being below between both but can cannot could did does doing done
    down during each either else even ever every everything few for from further get gets going got
    had has have having her here hers herself him himself his how however into its itself just
    least less let like many may maybe might mine more most much must myself neither never nor not
    nothing now off often once one only onto other others our ours ourselves out over own per
    perhaps quite rather really same seem seems shall she should since some something sometimes
    somewhat still such than that the their theirs them themselves then there therefore these they
    thing things this those though through thus too toward towards two under until upon use used
    very was well were what whatever when where whether which while who whole whom whose why will
    with within without would yet you your yours yourself
"""
STOP_WORDS = frozenset(COMMON.split())


def is_word(word: str) -> bool:
    """Whether a word in small letters can be in a rule: long enough, and no stop-word."""
    return bool(LETTERS.fullmatch(word)) and word not in STOP_WORDS


def stem(word: str) -> str:
    """Return a word without a common ending of English; crude, and only used to find doubles."""
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= SHORTEST:
            return word.removesuffix(ending)
    return word


def distinct(words: Iterable[str], most: int) -> list[str]:
    """Return the first words that have different stems."""
    found: dict[str, str] = {}
    for word in words:
        found.setdefault(stem(word), word)
        if len(found) == most:
            break
    return list(found.values())


def text_words(text: str) -> list[str]:
    """Return the words of a text, each stem once, in the order of the text."""
    words = LETTERS.findall(text.lower())
    return distinct((w for w in words if is_word(w)), len(words) + 1)


def vocabulary(tokenizer: Any) -> list[str]:
    """Return the word that each token is, in small letters; "" for what is none.

    A word is a token that begins one: a part of a longer word says nothing by itself. WordPiece
    marks the parts, every other way the beginnings.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if any(t and t.startswith(WORD_GOES_ON) for t in tokens):
        lowered = [(t or "").lower() for t in tokens]
    else:
        lowered = [t[1:].lower() if t and t[0] in WORD_STARTS else "" for t in tokens]
    return [word if is_word(word) else "" for word in lowered]


def expected(tokens: Sequence[int], entries: Sequence[str], most: int) -> list[str]:
    """Return the words of tokens, best first, that have different stems.

    Args:
        tokens: In order of preference.
        entries: The `vocabulary`.
        most: Words that are returned.
    """
    return distinct((entries[t] for t in tokens if entries[t]), most)
