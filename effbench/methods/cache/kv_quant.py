"""A quantised key/value cache: all but the last tokens in 8, 4 or 2 bits.

Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, ICML 2024, arXiv
2402.02750.

    K [T, D] of a head:  a range for each channel, over g tokens      x̂ = l + s q,  q in b bits
    V [T, D]:            ranges for each token, over c channels each

A few channels of keys are far larger than the others, and are so for all tokens: a range for each
channel keeps the error of one from the others. Values have no such channels, and are mixed token
by token. Held after T tokens: n = ⌊max(T - w, 0) / g⌋ groups of keys and values in codes, with s
and l in float16, and the other tokens, w to w + g - 1 of them, as they came. One token in codes
takes 2 D b / 8 + 4 D / g + 4 D / c bytes in each head.

Keys are stored after the rotary turn, as in the authors' code: no token ever moves to another place
in this cache, so what is expanded can be looked at, and whatever turn a model makes is right.
Before the turn channels would be steadier over a group (Hooper et al., KVQuant, arXiv 2401.18079),
at the price of turning all keys at every step.

From the paper: 2 bits (4 in its comparisons), groups of 32, 128 last tokens. Ours: c is the
largest common divisor of g and D; values go into codes together with the keys of their tokens,
where the authors keep exactly w; prompts are read as if they came token by token, so that each
query sees codes where decoding would (the authors quantise a prompt after it is read). Nothing is
trained. While nothing is in codes the model computes what it always does, bit for bit. The memory
is saved for real; time is in long contexts on a CPU, where a kernel attends to codes as they are
(`effbench.nn.decode.coded_attention`). Elsewhere every step expands all codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from effbench.api.method_types import Paper
from effbench.api.points import Point
from effbench.api.schema import PositiveInt
from effbench.api.shape import AnyShape, ModelShape
from effbench.methods.base import Method
from effbench.methods.caches import Caches
from effbench.methods.codes import HoldsCodes
from effbench.nn.decode.policy import CachePolicy
from effbench.nn.decode.quantised_cache import CodeBits, QuantisedCache
from effbench.util.errors import UserError


@dataclass(frozen=True)
class KVQuant(Caches):
    """Changes nothing but how the cache holds keys and values."""

    paper: ClassVar[Paper | None] = Paper(
        "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", "ICML 2024", "2402.02750"
    )

    bits: CodeBits = 4
    """Bits of a key's or value's element, ranges not counted, b."""
    group_size: PositiveInt = 32
    """Tokens over which a channel of keys has one range, g. Values have one over as many channels,
    or over the largest common divisor with a head's width."""
    window: PositiveInt = 128
    """Last tokens that stay in full precision, w, the token that looks among them."""

    def check_start(self, earlier: Sequence[Method]) -> None:
        """Refuse an artefact that decodes in a way of its own, or can hold codes itself."""
        if earlier and isinstance(earlier[-1], HoldsCodes):
            raise UserError(
                f"{earlier[-1].name} has a cache of its own, which {self.name} would leave out.",
                f"Set method.bits={self.bits} beside from=RUN in the place of method={self.name}: "
                "what that cache keeps is then in codes.",
            )
        super().check_start(earlier)

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method.

        Raises:
            UserError: For layers that share states, and groups that fill no whole bytes.
        """
        self.cache.require_bytes(ModelShape.of(shape).head_dim)
        return super().resolve(shape)

    @property
    def cache(self) -> QuantisedCache:
        """What the cache keeps."""
        return QuantisedCache(self.bits, self.group_size, self.window)

    def cache_at(self, point: Point) -> CachePolicy:
        """Return what the cache keeps."""
        return self.cache

    def cached(self, base: ModelShape, point: Point, folder: Path | None) -> ModelShape:
        """Return the model with caches in which a token is in codes once it has left the window."""
        return self.cache.shape(base)
