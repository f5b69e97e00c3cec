"""StreamingLLM: the first tokens and the last ones stay in the cache, and nothing else.

Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024, arXiv 2309.17453.

    S_t = {0, ..., n - 1} u {t - w + 1, ..., t}        what token t sees: n sinks, a window of w
    o_t = softmax(R(q_t, p_t) R(K_S, p_S)^T / sqrt(d)) V_S       p: places, 0 ... n + w - 1

R is the rotary turn. Keys are kept as they were projected, [B, H_kv, n + w, d], and turned at
their places in the cache, so that no distance is larger than those that the model was trained on,
however long the text. A model looks at its first tokens whatever they say, which is why they stay;
`sinks=0` is the window without them, which the paper shows to fail.

From the paper: 4 sinks, and 1,020 tokens beside them. Ours: a prompt is read as if it came token
by token, so that each of its tokens sees its own sinks and window (the authors' code lets a prompt
see all of itself), the window counts the token that looks, and some layers may have it alone.
Nothing is trained. While all
tokens fit, the model computes what it always does, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from effbench.api.method_types import Paper
from effbench.api.parts import Mixer
from effbench.api.points import Point
from effbench.api.schema import NonNegativeInt, PositiveInt
from effbench.api.shape import AnyShape, ModelShape
from effbench.methods.caches import Caches
from effbench.nn.decode import sinks, view
from effbench.nn.decode.policy import CachePolicy
from effbench.nn.decode.scratch import GATHERED, states
from effbench.nn.llama import stack
from effbench.util.errors import UserError

PAPER_WINDOW = 1020


@dataclass(frozen=True)
class SinkWindow(CachePolicy):
    """Keeps the first and the last tokens of each sequence."""

    turns_at_places: ClassVar[bool] = True

    sinks: int
    """First tokens, n."""
    window: int
    """Last tokens, w."""
    only: tuple[int, ...] | None = None
    """The layers that forget, counted from 0; None is all of them."""

    def layers(self, model: Any, undo: int) -> Sequence[view.LayerCache]:
        """Return the empty entries of all layers of a model."""
        windows = [
            self.window if self.forgets(index) else model.config.max_position_embeddings
            for index in range(len(stack.decoder_layers(model)))
        ]
        return [sinks.SinkLayer(self.sinks, window, undo) for window in windows]

    def forgets(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has a window."""
        return self.only is None or layer in self.only

    def most_places(self, length: int) -> int:
        """Return how many places there are after so many tokens."""
        return min(length, self.sinks + self.window) if self.only is None else length

    def scratch(self, mixer: Mixer, rows: int, tokens: int, queries: int, element: int) -> float:
        """Return the bytes of what is joined, gathered for queries of their own, and turned."""
        room = min(tokens, self.sinks + self.window)
        if queries == 1 or room == tokens:
            return 6 * states(mixer, rows, room, element)
        numbers = rows * room * mixer.kv_heads * mixer.head_dim
        return 5 * min(max(1, GATHERED // numbers), tokens - room) * numbers * element


@dataclass(frozen=True)
class Streaming(Caches):
    """Changes nothing but what the cache keeps."""

    paper: ClassVar[Paper | None] = Paper(
        "Efficient Streaming Language Models with Attention Sinks", "ICLR 2024", "2309.17453"
    )

    sinks: NonNegativeInt = 4
    """First tokens of each sequence that stay in the cache, n."""
    window: PositiveInt | None = None
    """Last tokens that are in the cache beside them, w, the token that looks among them; null is
    the paper's 1,020, or as many as the model has positions for."""
    layers: tuple[NonNegativeInt, ...] | None = None
    """The layers that have them, counted from 0; the others keep every token. Null is all."""

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method with its window.

        Raises:
            UserError: For more places than the model has positions, layers that there are not, and
                layers that share states.
        """
        if self.layers == ():
            raise UserError("method.layers names no layer.", "Leave it out, for all of them.")
        if unknown := [i for i in self.layers or () if i >= shape.num_layers]:
            raise UserError(
                f"method.layers names layer {unknown[0]} of {shape.num_layers}, counted from 0.",
                f"Name layers up to {shape.num_layers - 1}.",
            )
        most = max(1, shape.max_positions - self.sinks)
        method = replace(super().resolve(shape), window=self.window or min(PAPER_WINDOW, most))
        if self.sinks + (method.window or 0) > shape.max_positions:
            raise UserError(
                f"method.sinks={self.sinks} and method.window={method.window} are more than the "
                f"{shape.max_positions} positions of the model.",
                f"Set method.window={most} or less.",
            )
        return method

    def cache_at(self, point: Point) -> CachePolicy:
        """Return what the cache keeps."""
        return self.cache

    @property
    def cache(self) -> SinkWindow:
        """What the cache keeps."""
        return SinkWindow(self.sinks, self.window or PAPER_WINDOW, self.layers)

    def cached(self, base: ModelShape, point: Point, folder: Path | None) -> ModelShape:
        """Return the model with caches that stop growing."""
        own = self.cache
        most = own.sinks + own.window
        return base.map(lambda i, layer: layer.bounded(most) if own.forgets(i) else layer)
