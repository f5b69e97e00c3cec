"""Generated questions about one place in a long text, of exactly so many tokens.

After RULER (Hsieh et al., 2024, arXiv 2404.06654), whose haystack of repeated sentences this is;
the wording of needles and questions is ours. A text is a filler from which the start is cut, so
that prompt and answer together have the length asked for, with sentences of the task at seeded
places between those of the filler, in order, and a question whose answer is a number:

    needle      one sentence that names a number
    keys        several of different names; one is asked for
    variables   two chains of assignments, in turn; the value of the last of one is asked for
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from effbench.api.schema import digest
from effbench.data.tokens import Encoder
from effbench.util.errors import UserError

Task = Literal["needle", "keys", "variables"]
TASKS: tuple[Task, ...] = get_args(Task)
FILLER = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
CHAINS = 2
"""Of `variables`; with one there would be one number in the text, and nothing to trace."""


@dataclass(frozen=True)
class Sizes:
    """How much there is to find."""

    keys: int
    """Sentences of `keys`."""
    hops: int
    """Assignments of `variables` from one variable to the next."""


@dataclass(frozen=True)
class Facts:
    """What a text says and is asked."""

    sentences: list[str]
    question: str
    answer: str


@dataclass(frozen=True)
class Item:
    """A prompt and its answer."""

    id: str
    ids: list[int]
    """Tokens of the prompt."""
    answer: str
    """A number."""
    depth: float
    """Where the first sentence stands, from 0 to 1."""

    def right(self, text: str) -> bool:
        """Whether a text begins with the answer and nothing that would make it another one."""
        return re.match(rf"\s*{re.escape(self.answer)}(?!\w)", text) is not None


def items(
    task: Task, length: int, count: int, tokenizer: Any, *, sizes: Sizes, seed: int
) -> tuple[list[Item], int]:
    """Return questions of one task and length, and how many tokens to decode for each.

    A prompt and that many tokens are `length` tokens together: those of the longest answer, and one
    that says whether it ends there.

    Args:
        task: Which.
        length: Tokens.
        count: Of questions.
        tokenizer: The model's.
        sizes: How much there is to find.
        seed: Of all that is drawn.

    Raises:
        UserError: When a question does not fit so few tokens.
    """
    encoder = Encoder(tokenizer)
    draws = [random.Random(digest([seed, task, length, n])) for n in range(count)]
    found = [FACTS[task](draw, sizes) for draw in draws]
    new = 1 + max(len(encoder(f" {facts.answer}", special=False)) for facts in found)
    return [
        _item(task, facts, length - new, encoder, draw)
        for facts, draw in zip(found, draws, strict=True)
    ], new


def _item(task: Task, facts: Facts, length: int, encoder: Encoder, draw: random.Random) -> Item:
    """Return a prompt of exactly so many tokens."""
    said = [encoder(sentence, special=False) for sentence in facts.sentences]
    opening, question = encoder(""), encoder(facts.question, special=False)
    room = length - sum(map(len, (opening, question, *said)))
    if room < 1:
        raise UserError(
            f"Task {task} does not fit: its shortest prompt has {length - room + 1} tokens, and "
            f"there is room for {length}.",
            "Give longer ones, evaluator.long_context.lengths, or leave the task out: "
            "evaluator.long_context.tasks",
        )
    filler = list(_filler(room, encoder))
    places = sorted(draw.randint(1, len(filler)) for _ in said)
    ids, before = list(opening), 0
    for place, sentence in zip((*places, len(filler)), (*said, question), strict=True):
        ids += [t for chunk in filler[before:place] for t in chunk] + sentence
        before = place
    return Item(digest([task, ids]), ids, facts.answer, places[0] / len(filler))


def _filler(room: int, encoder: Encoder) -> Sequence[list[int]]:
    """Return sentences of `room` tokens in all, the first one cut off at its start."""
    sentences = [encoder(sentence, special=False) for sentence in FILLER]
    chunks: list[list[int]] = []
    while room > 0:
        sentence = sentences[-1 - len(chunks) % len(sentences)]
        chunks.append(sentence[-room:])
        room -= len(sentence)
    return chunks[::-1]


def _words(draw: random.Random) -> Iterator[str]:
    """Yield words that mean nothing, each once."""
    seen: set[str] = set()
    while True:
        word = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))
        if word not in seen:
            seen.add(word)
            yield word


def _numbers(draw: random.Random, count: int) -> list[str]:
    return [str(n) for n in draw.sample(range(10_000, 100_000), count)]


def _needles(draw: random.Random, count: int) -> Facts:
    names = _words(draw)
    pairs = [(next(names), number) for number in _numbers(draw, count)]
    name, number = draw.choice(pairs)
    sentences = [f" The special number of {n} is {v}." for n, v in pairs]
    return Facts(sentences, f" The special number of {name} mentioned above is", number)


def _needle(draw: random.Random, sizes: Sizes) -> Facts:
    return _needles(draw, 1)


def _keys(draw: random.Random, sizes: Sizes) -> Facts:
    return _needles(draw, sizes.keys)


def _variables(draw: random.Random, sizes: Sizes) -> Facts:
    names, values = _words(draw), _numbers(draw, CHAINS)
    chains = [[next(names) for _ in range(sizes.hops + 1)] for _ in range(CHAINS)]
    sentences = [f" VAR {c[0]} = {v}." for c, v in zip(chains, values, strict=True)]
    for hop in range(sizes.hops):
        sentences += [f" VAR {c[hop + 1]} = VAR {c[hop]}." for c in chains]
    asked = draw.randrange(CHAINS)
    return Facts(sentences, f" So the value of VAR {chains[asked][-1]} is", values[asked])


FACTS: dict[Task, Callable[[random.Random, Sizes], Facts]] = {
    "needle": _needle,
    "keys": _keys,
    "variables": _variables,
}
