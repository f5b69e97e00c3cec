"""Which caches hold entries in few bits, as values without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from effbench.api.parts import LayerShape, Mixer
from effbench.api.shape import ModelShape
from effbench.nn.decode import quantised, view
from effbench.nn.decode.policy import CachePolicy
from effbench.nn.decode.scratch import LOOKING, states
from effbench.nn.quant.ranges import RANGE_BYTES, channels_of
from effbench.util.errors import UserError

CodeBits = Literal[2, 4, 8]


@dataclass(frozen=True)
class QuantisedCache(CachePolicy):
    """Keeps the last tokens as they are, and all others in few bits."""

    bits: CodeBits
    """Bits of a code, b."""
    group: int
    """Tokens that go into codes together, g."""
    window: int
    """Last tokens that stay as they are, w."""

    def layer(self, undo: int) -> view.LayerCache:
        """Return a layer's empty entry."""
        return quantised.QuantisedLayer(self.bits, self.group, self.window, undo)

    def cycle(self) -> tuple[int, int]:
        """Return after how many tokens the cache grows evenly, and over how many at a time."""
        return self.window, self.group

    def scratch(self, mixer: Mixer, rows: int, tokens: int, queries: int, element: int) -> float:
        """Return the bytes of keys and values expanded, and joined with those that are not coded.

        Where queries see other columns each, the keys and values of all query heads come on top,
        and which columns those that look together see: as booleans and as numbers that are added to
        scores; the same for all rows that are not padded.
        """
        if queries == 1:
            return 4 * states(mixer, rows, tokens, element)
        each, looking = mixer.heads / mixer.kv_heads, min(queries, LOOKING)
        seen = looking * (tokens + looking) * (1 + element)
        return (4 + 2 * each) * states(mixer, rows, tokens, element) + seen

    def require_bytes(self, width: int) -> None:
        """Refuse groups that fill no whole bytes.

        Args:
            width: Elements of a head, or what the number of coordinates is a multiple of.

        Raises:
            UserError: With the next number of tokens that does.
        """
        if width * self.group * self.bits % 8:
            raise UserError(
                f"method.group_size={self.group} fills no whole bytes.",
                f"Set method.group_size={4 * -(self.group // -4)}.",
            )

    def shape(self, base: ModelShape) -> ModelShape:
        """Return a model with caches in which a token is in codes once it has left the window."""
        return base.map(lambda _, layer: self._coded(layer))

    def _coded(self, layer: LayerShape) -> LayerShape:
        if layer.mixer is None:
            return layer
        mixer, cache = layer.mixer, layer.mixer.cache
        values = int(cache.values * cache.width)
        whole = values == mixer.kv_heads * mixer.head_dim
        channels = channels_of(self.group, mixer.head_dim if whole else values)
        ranges = cache.keys / self.group + cache.values / channels
        element = self.bits / 8 + RANGE_BYTES * ranges / (cache.keys + cache.values)
        coded = replace(cache, element=float(element), recent=self.window, group=self.group)
        return replace(layer, mixer=replace(mixer, cache=coded))
