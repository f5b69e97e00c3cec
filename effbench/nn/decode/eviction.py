"""A layer's cache from which entries are evicted by a score of each head's own.

A prompt is read as ever: each of its tokens sees all before it. Then the queries that asked score
what is there, and the best entries stay, in the order of time, as they were stored: keys keep the
rotary positions that they were turned at, and later tokens go on with true ones. What is evicted is
freed and never comes back.

    kept = the k entries with the largest scores, [B, G, k];   K' = K[kept],   V' = V[kept]

Rows of a batch that are padded keep as many real entries as they would alone.
"""

from __future__ import annotations

from functools import partial

import torch

from effbench.nn.decode.handing import HandingLayer, KeepingLayer
from effbench.nn.decode.importance import Score
from effbench.nn.decode.selection import evicted
from effbench.nn.decode.view import LayerCache, Own, View


class PromptLayer(HandingLayer):
    """Evicts once, when the prompt has been read, and hands what stays to another entry.

    Whatever that entry makes of it, a prompt sees itself as it is.

    Args:
        budget: Most entries that stay of the prompt.
        score: See `effbench.nn.decode.importance`.
        inner: Holds what stays, and takes in later tokens.
    """

    def __init__(self, budget: int, score: Score, inner: LayerCache) -> None:
        super().__init__(inner)
        self.budget, self.score = budget, score
        self.kept = 0
        """Columns of the prompt that stay, once it has been handed on."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> View:
        """Take in keys and values [B, G, W, D] and return what their queries see."""
        self.inner.attends = self.attends
        whole = self.prompt <= self.budget and isinstance(self.inner, KeepingLayer)
        if whole or self.inner.is_initialized:
            return self.hand_on(keys, values, self.empty)
        return View(keys, values, answer=partial(self._answer, keys, values))

    def _answer(
        self, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor, own: Own
    ) -> torch.Tensor:
        """Return what a prompt's queries [B, H, P, D], and those after them, are given."""
        cut = self.prompt
        asked, view = query[:, :, :cut], View(keys[:, :, :cut], values[:, :, :cut], self.empty)
        mixed = own(asked, view)
        stay, empty = (view.keys, view.values), view.empty
        if cut > self.budget:
            stay, empty = evicted(self.score, self.budget, asked, view)
        self.kept = min(cut, self.budget)
        self.hand_on(*stay, empty)
        if query.shape[2] == cut:
            return mixed
        later = self.hand_on(keys[:, :, cut:], values[:, :, cut:], None)
        return torch.cat([mixed, own(query[:, :, cut:], later)], dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: When the prompt would have to be there again, which has been evicted from.
        """
        if self.get_seq_length() + min(0, tokens_to_remove) < self.kept:
            raise ValueError("only tokens after the prompt can be taken back")
        super().crop(tokens_to_remove)


class SteadyLayer(LayerCache):
    """Holds at most so many entries: evicts after the prompt, and after each later token.

    A token sees what was held before it, and itself; what it evicts, it has seen.

    Args:
        budget: Most entries.
        score: See `effbench.nn.decode.importance`.
    """

    def __init__(self, budget: int, score: Score) -> None:
        super().__init__()
        self.budget, self.score = budget, score
        self.lost = False
        """Whether something has been evicted."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> View:
        """Take in keys and values [B, G, W, D] and return what their queries see."""
        assert self.keys is not None and self.values is not None
        before = self.get_seq_length()
        if before:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        if keys.shape[2] > self.budget:
            return View(keys, values, answer=partial(self._answer, before, keys, values))
        self.keys, self.values = keys, values
        return View(keys, values, self.empty)

    def _answer(
        self,
        before: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        query: torch.Tensor,
        own: Own,
    ) -> torch.Tensor:
        """Return what queries [B, H, W, D] are given: all that fit at once, then one by one."""
        fits = max(self.budget, 0 if before else self.prompt)
        at_once = max(0, min(fits, keys.shape[2]) - before)
        both = keys, values
        mixed, begin, held = [], before, both
        for count in [at_once] * (at_once > 0) + [1] * (query.shape[2] - at_once):
            end = begin + count
            if begin == before:
                shown = [t[:, :, :end] for t in both]
            else:
                new = (t[:, :, begin:end] for t in both)
                shown = [torch.cat(pair, dim=2) for pair in zip(held, new, strict=True)]
            view = View(shown[0], shown[1], self.empty)
            asked = query[:, :, begin - before : end - before]
            mixed.append(own(asked, view))
            held, begin = self._kept(asked, view), end
        self.keys, self.values = held
        return torch.cat(mixed, dim=1)

    def _kept(self, query: torch.Tensor, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of a view that the queries of its last columns leave."""
        if view.keys.shape[2] <= self.budget:
            return view.keys, view.values
        self.lost = True
        stay, self.empty = evicted(self.score, self.budget, query, view)
        return stay

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: When something has been evicted since, which would have to come back.
        """
        if self.lost and tokens_to_remove:
            raise ValueError("what was evicted cannot come back")
        super().crop(tokens_to_remove)
