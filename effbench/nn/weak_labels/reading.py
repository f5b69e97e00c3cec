"""What language models make of texts: mean states, and the words that they expect with them.

A causal model has no mask token, so the text comes first and a template ends just before the blank;
one pass gives both (`Reader`). An encoder sees the template in every state, so its states are of
the text alone (`States`), as when it is evaluated; one with a masked-LM head is asked at the mask
token of the template in a pass of its own (`MaskReader`), which is the paper's way. Of the
likeliest words those are taken that the text makes likelier than a text without content does (Zhao
et al., Calibrate Before Use, ICML 2021, arXiv 2102.09690): otherwise the template alone would
decide, and every text would have the same words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effbench.api.batch import Batch, by_length, make_batch
from effbench.api.schema import digest
from effbench.nn.model_kinds.base import kind_of
from effbench.nn.weak_labels import words
from effbench.nn.weak_labels.ensemble import pooled
from effbench.util.cache import cache_dir, make_once
from effbench.util.errors import UserError

CONTENT_FREE = "N/A"
SHORTLIST = 50
"""Likeliest words, among which those are chosen that the text makes likelier."""
BATCH_TOKENS = 4096
MASKED_TOKENS = 1024
"""Tokens of a batch whose head gives logits at every position."""
MASK = "[MASK]"
"""Stands in a template where a masked model is asked, whatever its tokenizer calls that token."""
FORM = 1
"""Raised when the same texts would be read in another way."""


class Reading(NamedTuple):
    """What a model made of texts."""

    features: torch.Tensor
    """Mean states, [N, d] float32."""
    words: list[list[str]]
    """Words that are expected after each text, best first."""


class Reader:
    """Reads prompts with a model that it leaves as it is.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        template: What stands between a text and the blank.
        most: Words of a text.
    """

    batch_tokens = BATCH_TOKENS

    def __init__(self, model: Any, tokenizer: Any, template: str, most: int) -> None:
        self.model, self.most = model, most
        self.tail = self._after(tokenizer, template)
        self.entries = words.vocabulary(tokenizer)
        self.word_tokens = torch.tensor(
            [i for i, word in enumerate(self.entries) if word], dtype=torch.int64
        )
        neutral = self.opened(tokenizer.encode(CONTENT_FREE))
        self.neutral_state, logits = self._pass([neutral])
        self.neutral = logits.log_softmax(1)

    def _after(self, tokenizer: Any, template: str) -> list[int]:
        """Return the tokens that stand behind each text."""
        if MASK in template:
            raise UserError(
                f"The template has a {MASK}, and {type(self.model).__name__} goes on from its end.",
                "End method.template where the word is to come.",
            )
        tail: list[int] = tokenizer.encode(template, add_special_tokens=False)
        return tail

    def opened(self, text: list[int]) -> list[int]:
        """Return the tokens of a text as others may follow them."""
        return text

    @property
    def room(self) -> int | None:
        """Most tokens of a text with what follows it; None where nothing says."""
        found: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return found

    def read(self, prompts: Sequence[list[int]]) -> Reading:
        """Return what the model makes of prompts, lists of tokens; too long ones lose their end."""
        room = self.room
        prompts = [p[: room and room - len(self.tail)] for p in prompts]
        sizes = [len(p) + len(self.tail) for p in prompts]
        features = torch.zeros(len(prompts), self.neutral_state.shape[1])
        found: list[list[str]] = [[] for _ in prompts]
        for group in by_length(sizes, self.batch_tokens):
            features[group], logits = self._pass([prompts[i] for i in group])
            for place, row in zip(group, logits, strict=True):
                found[place] = self._expected(row)
        return Reading(features, found)

    def read_once(self, prompts: Sequence[list[int]]) -> Reading:
        """Return the same, from the cache where this model has read these prompts before."""
        seen = self.neutral.numpy().tobytes() + self.neutral_state.numpy().tobytes()
        origin = {
            "model": hashlib.sha256(seen).hexdigest(),
            "prompts": digest(list(prompts), 32),
            "tail": self.tail,
            "most": self.most,
            "form": FORM,
        }
        return _kept(origin, lambda: self.read(prompts))

    @torch.no_grad()
    def _pass(self, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean states [B, d] and the next token's logits [B, V], float32 on the CPU."""
        batch, device = self._batch(prompts), _device(self.model)
        with _evaluating(self.model):
            states = kind_of(self.model).states(self.model, batch.input_ids, batch.attention_mask)
        sizes = torch.tensor([len(p) for p in prompts], device=device)
        asked = torch.arange(states.shape[1], device=device)[None] < sizes[:, None]
        last = states[torch.arange(len(prompts)), batch.attention_mask.sum(1) - 1]
        logits = self.model.get_output_embeddings()(last)
        return pooled(states, asked).cpu(), logits.float().cpu()

    def _batch(self, prompts: Sequence[list[int]]) -> Batch:
        rows = [p + self.tail for p in prompts]
        return make_batch([(row, [0] * len(row)) for row in rows], 0).to(_device(self.model))

    def _expected(self, logits: torch.Tensor) -> list[str]:
        """Return the words that a text makes likelier, of those that are likely, best first."""
        likely = logits[self.word_tokens].topk(min(SHORTLIST, len(self.word_tokens))).indices
        tokens = self.word_tokens[likely]
        gains = (logits.log_softmax(0) - self.neutral[0])[tokens]
        order = tokens[gains.argsort(descending=True, stable=True)]
        return words.expected(order.tolist(), self.entries, self.most)


class MaskReader(Reader):
    """Asks an encoder with a masked-LM head for the word at the mask token of a template.

    Its states, which have seen the template, are no features: [N, 0]. Where the template has no
    `MASK`, one stands behind it with a full stop, and then what its tokenizer ends a text with.
    """

    batch_tokens = MASKED_TOKENS

    def _after(self, tokenizer: Any, template: str) -> list[int]:
        own = tokenizer.mask_token
        if own is None:
            raise UserError(
                f"The tokenizer of the {type(self.model).__name__} has no mask token.",
                "Set mask_token in its tokenizer_config.json.",
            )
        bare = tokenizer.encode("a", add_special_tokens=False)
        whole = tokenizer.encode("a")
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self.closing: list[int] = whole[start + len(bare) :]
        written = template if MASK in template else f"{template} {MASK}."
        tail = tokenizer.encode(written.replace(MASK, own), add_special_tokens=False)
        if tail.count(tokenizer.mask_token_id) != 1:
            raise UserError(f"The template has {MASK} more than once.", "Leave one in it.")
        self.place = tail.index(tokenizer.mask_token_id)
        return [*tail, *self.closing]

    def opened(self, text: list[int]) -> list[int]:
        """Return a text without what its tokenizer ends it with."""
        ends = bool(self.closing) and text[-len(self.closing) :] == self.closing
        return text[: -len(self.closing)] if ends else text

    @property
    def room(self) -> int | None:
        """Most tokens of a text with what follows it."""
        return kind_of(self.model).positions(self.model.config)

    @torch.no_grad()
    def _pass(self, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return nothing of states, [B, 0], and the mask's logits [B, V], float32 on the CPU."""
        batch = self._batch(prompts)
        with _evaluating(self.model):
            every = kind_of(self.model).logits(
                self.model, batch.input_ids, batch.attention_mask, batch.labels
            )
        places = [len(p) + self.place for p in prompts]
        logits = every[torch.arange(len(prompts)), places].float().cpu()
        return torch.zeros(len(prompts), 0), logits


class States:
    """Reads texts alone, as they are read when the classifiers are evaluated.

    Args:
        model: Of any kind.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.neutral = self._pass([tokenizer.encode(CONTENT_FREE)])

    def read_once(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Return the mean states of prompts, [N, d] float32; from the cache where it has them."""
        origin = {
            "model": hashlib.sha256(self.neutral.numpy().tobytes()).hexdigest(),
            "prompts": digest(list(prompts), 32),
            "states": FORM,
        }
        return _kept(origin, lambda: Reading(self.read(prompts), [])).features

    def read(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Return the mean states of prompts, [N, d] float32."""
        features = torch.zeros(len(prompts), self.neutral.shape[1])
        for group in by_length([len(p) for p in prompts], BATCH_TOKENS):
            features[group] = self._pass([prompts[i] for i in group])
        return features

    @torch.no_grad()
    def _pass(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        batch = make_batch([(p, [0] * len(p)) for p in prompts], 0).to(_device(self.model))
        with _evaluating(self.model):
            states = kind_of(self.model).states(self.model, batch.input_ids, batch.attention_mask)
        return pooled(states, batch.attention_mask).cpu()


def said(model: Any, tokenizer: Any, template: str, most: int, texts: Sequence[str]) -> Reading:
    """Return what a model says to texts that another one has features of.

    Args:
        model: Of a kind that fills blanks.
        tokenizer: Its tokenizer.
        template: As in `Reader`.
        most: Words of a text.
        texts: Any.
    """
    cls = Reader if kind_of(model).caches else MaskReader
    reader = cls(model, tokenizer, template, most)
    return reader.read_once([reader.opened(tokenizer.encode(text)) for text in texts])


def _kept(origin: dict[str, Any], read: Callable[[], Reading]) -> Reading:
    """Return a reading from the cache, where it is made once."""

    def fill(folder: Path) -> None:
        torch.save(tuple(read()), folder / "reading.pt")

    place = cache_dir() / "readings" / digest(origin, 32)
    made = make_once(place, origin, fill, "reading the texts")
    return Reading(*torch.load(made / "reading.pt", weights_only=True))


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Let a model work as it does when nothing trains; afterwards it is as before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
