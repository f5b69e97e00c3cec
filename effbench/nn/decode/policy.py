"""What a cache keeps, as a value without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.nn.llama import stack, walk
from effbench.util.errors import UserError

if TYPE_CHECKING:
    from effbench.api.parts import Mixer
    from effbench.nn.decode.view import LayerCache


@dataclass(frozen=True)
class CachePolicy:
    """What each layer keeps of the tokens read; on its own, all keys and values.

    Any other policy is a subclass with a `layer`, or with `layers` where these differ.
    """

    turns_at_places: ClassVar[bool] = False
    """Whether keys are kept as they were projected, and turned at their places in the cache."""
    takes_back: ClassVar[bool] = True
    """Whether the last tokens can be forgotten again."""

    def layer(self, undo: int) -> LayerCache:
        """Return a layer's empty entry.

        Args:
            undo: Most tokens that will have to be taken back at a time.
        """
        raise NotImplementedError

    def layers(self, model: Any, undo: int) -> Sequence[LayerCache]:
        """Return the empty entries of all layers of a model.

        Args:
            model: What decodes; the policy applies to it.
            undo: Most tokens that will have to be taken back at a time.
        """
        return [self.layer(undo) for _ in stack.decoder_layers(model)]

    def reads_prompts(self, length: int) -> bool:
        """Whether what tokens see depends on where the prompt ends, in texts of so many tokens."""
        return False

    def most_places(self, length: int) -> int:
        """Return how many places there are after so many tokens."""
        return length

    def scratch(self, mixer: Mixer, rows: int, tokens: int, queries: int, element: int) -> float:
        """Return the bytes that a layer needs for a moment beside what it keeps.

        Args:
            mixer: What the layer attends with.
            rows: Sequences.
            tokens: Tokens that have come in, of each.
            queries: Tokens that came in last, together.
            element: Bytes of a compute element.
        """
        return 0

    def cycle(self) -> tuple[int, int]:
        """Return after how many tokens the cache grows evenly, and over how many at a time."""
        return 0, 1

    def require(self, model: Any) -> None:
        """Refuse a model whose modules would not attend to what the policy shows.

        Raises:
            UserError: When the model turns queries and keys in a way of its own.
        """
        if self.turns_at_places and model.config.model_type not in TURNING:
            raise UserError(
                f"{type(model).__name__} may turn queries and keys in another way than Llama does.",
                "Choose a model of the Llama family.",
            )
        rope = getattr(model.model.rotary_emb, "rope_type", "") if self.turns_at_places else ""
        if rope and rope not in walk.STATIC_ROPE:
            raise UserError(
                f"The rotary positions of {type(model).__name__} are {rope}: their angles change "
                "with the length of a text, and keys in this cache are turned by one table.",
                "Choose a model whose positions are turned by fixed angles.",
            )


EVERYTHING = CachePolicy()
TURNING = frozenset({"llama", "sliced_llama", "mistral", "qwen2", "qwen3"})
"""Model types whose queries and keys are turned as Llama's are, in every layer."""
