"""Keys of small norm: the cache drops the entries whose keys are longest.

Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, EMNLP 2024,
arXiv 2406.11430.

    s_j = -|k_j|_2;      kept: the b entries of a head with the largest s

A key of small norm is looked at more, whatever the query is, in most layers of decoders. So no
attention has to be known, and what is dropped once would be dropped again: one pass over a text
drops what decoding it does. Each key/value head of each layer chooses for itself; the cache is
[B, G, b, d]. Keys keep the positions that they were turned at, which changes no norm. While b
tokens are there nothing is dropped, and no bit changes.

From the paper: the score, all of a cache that is too long at once or token by token, and that its
first two layers, where norms say little, keep everything (recalled; NVIDIA's kvpress (read)
skips none). Ours: a prompt is read with attention to all of it, as both do. Nothing is trained.
Nothing can be taken back: drafts are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from effbench.api.method_types import Paper
from effbench.api.schema import NonNegativeInt
from effbench.api.shape import AnyShape
from effbench.methods.evicts import EvictsSteadily
from effbench.nn.decode import importance
from effbench.nn.decode.eviction_cache import SteadyEviction
from effbench.nn.decode.policy import CachePolicy
from effbench.util.errors import UserError

if TYPE_CHECKING:
    from effbench.nn.decode.importance import Score


@dataclass(frozen=True)
class SmallKeys(SteadyEviction):
    """Drops the entries with the longest keys."""

    skipped: tuple[int, ...] = ()
    """Layers that keep everything."""

    def score(self, model: Any) -> Score:
        """Return minus the norms of keys."""
        return importance.key_norms

    def evicts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, evicts at all."""
        return layer not in self.skipped


@dataclass(frozen=True)
class KNorm(EvictsSteadily):
    """Changes nothing but what the cache keeps."""

    paper: ClassVar[Paper | None] = Paper(
        "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        "EMNLP 2024",
        "2406.11430",
    )

    skip_layers: tuple[NonNegativeInt, ...] = (0, 1)
    """Layers that keep everything, counted from 0."""

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method.

        Raises:
            UserError: When no layer is left, for one that there is not, and as `Evicts.resolve`
                does.
        """
        layers = set(range(shape.num_layers))
        if not layers - set(self.skip_layers):
            raise UserError(
                f"method.skip_layers={list(self.skip_layers)} leaves none of "
                f"{shape.num_layers} layers.",
                "Skip fewer: 'method.skip_layers=[]'",
            )
        if unknown := set(self.skip_layers) - layers:
            raise UserError(
                f"method.skip_layers names layer {min(unknown)} of {shape.num_layers}, counted "
                "from 0.",
                f"Name layers up to {shape.num_layers - 1}.",
            )
        return super().resolve(shape)

    def policy(self, budget: int) -> CachePolicy:
        """Return what the cache keeps with so many entries."""
        return SmallKeys(budget, self.skip_layers)
