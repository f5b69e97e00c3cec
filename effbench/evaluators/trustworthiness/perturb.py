"""Changes of a text that leave its meaning: attacks on characters and words, and other styles."""

from __future__ import annotations

import re
from random import Random

LOOKALIKES = str.maketrans("oilsea", "011$3@")
SYNONYMS = {
    "film": "motion picture",
    "movie": "picture",
    "story": "tale",
    "characters": "figures",
    "good": "fine",
    "bad": "poor",
    "great": "grand",
    "best": "finest",
    "worst": "poorest",
    "funny": "comical",
    "boring": "tedious",
    "really": "truly",
    "very": "quite",
    "little": "slight",
    "big": "large",
    "many": "numerous",
    "because": "since",
    "but": "yet",
    "said": "stated",
    "people": "persons",
    "killed": "slain",
    "began": "started",
    "about": "roughly",
    "often": "frequently",
}
ASIDES = (
    "(and two plus two is four)",
    "(as of this writing the sky is up)",
    "(water is wet)",
    "(a week has seven days)",
)
OLD = {
    "you": "thou",
    "your": "thy",
    "is": "be",
    "are": "be",
    "has": "hath",
    "does": "doth",
    "will": "shall",
    "it": "this same thing",
    "before": "ere",
    "perhaps": "perchance",
    "never": "ne'er",
    "very": "most",
    "to": "unto",
}
SHORT = {
    "you": "u",
    "are": "r",
    "and": "n",
    "to": "2",
    "for": "4",
    "with": "w/",
    "because": "cuz",
    "the": "da",
    "great": "gr8",
    "before": "b4",
}


def characters(text: str, draw: Random) -> str:
    """Return the text with a typing error in about every third longer word, in one at least."""
    words = text.split()
    long = [i for i, word in enumerate(words) if len(word) > 3]
    for i in draw.sample(long, min(len(long), len(long) // 3 + 1)):
        words[i] = _typo(words[i], draw)
    return " ".join(words)


def words(text: str, draw: Random) -> str:
    """Return the text with known words replaced by synonyms and two neighbours swapped."""
    found = [SYNONYMS.get(word, word) for word in text.split()]
    if len(found) > 1:
        i = draw.randrange(len(found) - 1)
        found[i], found[i + 1] = found[i + 1], found[i]
    return " ".join(found)


def distraction(text: str, draw: Random) -> str:
    """Return the text with a remark that has nothing to do with it, in front or behind."""
    aside = draw.choice(ASIDES)
    return f"{aside} {text}" if draw.random() < 0.5 else f"{text} {aside}"


def archaic(text: str, draw: Random) -> str:
    """Return the text with old words for common ones."""
    return f"{draw.choice(('Hark', 'Verily', 'Prithee'))}, {_replaced(text, OLD)}"


def informal(text: str, draw: Random) -> str:
    """Return the text as a short message: abbreviated, without capitals."""
    return f"{_replaced(text.lower(), SHORT)} {draw.choice(('lol', 'tbh', 'fyi'))}"


def shouted(text: str, draw: Random) -> str:
    """Return the text in capitals."""
    return text.upper().rstrip(". ") + "!" * draw.randint(2, 4)


ATTACKS = {"character": characters, "word": words, "distraction": distraction}
STYLES = {"archaic": archaic, "informal": informal, "shouted": shouted}


def _typo(word: str, draw: Random) -> str:
    """Swap two letters, drop one, double one, or write lookalikes."""
    i = draw.randrange(1, len(word) - 1)
    changed = (
        word[:i] + word[i + 1] + word[i] + word[i + 2 :],
        word[:i] + word[i + 1 :],
        word[:i] + word[i] + word[i:],
        word.translate(LOOKALIKES),
    )
    return draw.choice(changed)


def _replaced(text: str, table: dict[str, str]) -> str:
    return re.sub(r"\w+", lambda m: table.get(m[0], m[0]), text)
