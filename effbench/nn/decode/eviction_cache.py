"""Which caches evict by a score, as values without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.nn.decode import eviction, handing
from effbench.nn.decode.policy import EVERYTHING, CachePolicy
from effbench.nn.decode.scratch import states
from effbench.nn.llama import stack

if TYPE_CHECKING:
    from effbench.api.parts import Mixer
    from effbench.nn.decode.importance import Score
    from effbench.nn.decode.view import LayerCache


@dataclass(frozen=True)
class Eviction(CachePolicy):
    """Keeps the entries of a layer with the highest scores; a subclass has `score`."""

    budget: int
    """Most entries of a head that stay, those that a score pins among them."""

    def reads_prompts(self, length: int) -> bool:
        """Whether what tokens see depends on where the prompt ends, in texts of so many tokens."""
        return length > self.budget

    def scratch(self, mixer: Mixer, rows: int, tokens: int, queries: int, element: int) -> float:
        """Return the bytes of keys and values joined with new ones, and of those that stay."""
        return 4 * states(mixer, rows, tokens, element)

    def score(self, model: Any) -> Score:
        """Return what scores the entries of each layer of a model.

        Args:
            model: What decodes.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class PromptEviction(Eviction):
    """Evicts once, when the prompt has been read; all that comes later stays."""

    then: CachePolicy = EVERYTHING
    """What the cache keeps of the entries that stay and of later tokens. Keys are turned."""

    def reads_prompts(self, length: int) -> bool:
        """Whether what tokens see depends on where the prompt ends, in texts of so many tokens."""
        return self.then != EVERYTHING or super().reads_prompts(length)

    def scratch(self, mixer: Mixer, rows: int, tokens: int, queries: int, element: int) -> float:
        """Return the larger of what evicting takes, and what holding the rest does."""
        later = self.then.scratch(mixer, rows, tokens, queries, element)
        return max(super().scratch(mixer, rows, tokens, queries, element), later)

    def layers(self, model: Any, undo: int) -> Sequence[LayerCache]:
        """Return the empty entries of all layers of a model."""
        score, inner = self.score(model), self.then
        count = len(stack.decoder_layers(model))
        kept = (
            [handing.KeepingLayer() for _ in range(count)]
            if inner == EVERYTHING
            else inner.layers(model, undo)
        )
        return [eviction.PromptLayer(self.budget, score, layer) for layer in kept]


@dataclass(frozen=True)
class SteadyEviction(Eviction):
    """Evicts after the prompt and after each later token, so that the cache stops growing."""

    takes_back: ClassVar[bool] = False

    def scratch(self, mixer: Mixer, rows: int, tokens: int, queries: int, element: int) -> float:
        """Return the bytes of keys and values joined with new ones, and of those that stay."""
        held = tokens if queries > 1 else min(tokens, self.budget)
        return super().scratch(mixer, rows, held, queries, element)

    def layers(self, model: Any, undo: int) -> Sequence[LayerCache]:
        """Return the empty entries of all layers of a model."""
        score = self.score(model)
        return [
            eviction.SteadyLayer(self.budget, score)
            if self.evicts(index)
            else handing.KeepingLayer()
            for index in range(len(stack.decoder_layers(model)))
        ]

    def evicts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, evicts at all. Default: each does."""
        return True
