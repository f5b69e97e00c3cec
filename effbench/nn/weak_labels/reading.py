"""What a causal language model makes of texts: mean states, and the words that it expects next.

A causal model has no mask token, so the text comes first and a template ends just before the blank;
one pass gives both. Of the likeliest words those are taken that the text makes likelier than a text
without content does (Zhao et al., Calibrate Before Use, ICML 2021, arXiv 2102.09690): otherwise the
template alone would decide, and every text would have the same words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effbench.api.batch import by_length, make_batch
from effbench.api.schema import digest
from effbench.nn.model_kinds.base import kind_of
from effbench.nn.weak_labels import words
from effbench.nn.weak_labels.ensemble import pooled
from effbench.util.cache import cache_dir, make_once

CONTENT_FREE = "N/A"
SHORTLIST = 50
"""Likeliest words, among which those are chosen that the text makes likelier."""
BATCH_TOKENS = 4096
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

    def __init__(self, model: Any, tokenizer: Any, template: str, most: int) -> None:
        self.model, self.most = model, most
        self.tail = tokenizer.encode(template, add_special_tokens=False)
        self.entries = words.vocabulary(tokenizer)
        self.word_tokens = torch.tensor(
            [i for i, word in enumerate(self.entries) if word], dtype=torch.int64
        )
        neutral = tokenizer.encode(CONTENT_FREE)
        self.neutral_state, logits = self._pass([neutral])
        self.neutral = logits.log_softmax(1)

    def read(self, prompts: Sequence[list[int]]) -> Reading:
        """Return what the model makes of prompts, lists of tokens; too long ones lose their end."""
        room = getattr(self.model.config, "max_position_embeddings", None)
        prompts = [p[: room and room - len(self.tail)] for p in prompts]
        sizes = [len(p) + len(self.tail) for p in prompts]
        features = torch.zeros(len(prompts), self.neutral_state.shape[1])
        found: list[list[str]] = [[] for _ in prompts]
        for group in by_length(sizes, BATCH_TOKENS):
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

        def fill(folder: Path) -> None:
            torch.save(tuple(self.read(prompts)), folder / "reading.pt")

        place = cache_dir() / "readings" / digest(origin, 32)
        made = make_once(place, origin, fill, "reading the texts")
        return Reading(*torch.load(made / "reading.pt", weights_only=True))

    @torch.no_grad()
    def _pass(self, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean states [B, d] and the next token's logits [B, V], float32 on the CPU."""
        batch = make_batch([(p + self.tail, [0] * len(p + self.tail)) for p in prompts], 0)
        device = next(self.model.parameters()).device
        batch, training = batch.to(device), self.model.training
        self.model.eval()
        states = kind_of(self.model).states(self.model, batch.input_ids, batch.attention_mask)
        self.model.train(training)
        sizes = torch.tensor([len(p) for p in prompts], device=device)
        asked = torch.arange(states.shape[1], device=device)[None] < sizes[:, None]
        last = states[torch.arange(len(prompts)), batch.attention_mask.sum(1) - 1]
        logits = self.model.get_output_embeddings()(last)
        return pooled(states, asked).cpu(), logits.float().cpu()

    def _expected(self, logits: torch.Tensor) -> list[str]:
        """Return the words that a text makes likelier, of those that are likely, best first."""
        likely = logits[self.word_tokens].topk(min(SHORTLIST, len(self.word_tokens))).indices
        tokens = self.word_tokens[likely]
        gains = (logits.log_softmax(0) - self.neutral[0])[tokens]
        order = tokens[gains.argsort(descending=True, stable=True)]
        return words.expected(order.tolist(), self.entries, self.most)
