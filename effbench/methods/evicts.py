"""Methods of evaluation whose cache evicts entries: an operating point for each budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from effbench.api.parts import LayerShape
from effbench.api.points import Point
from effbench.api.schema import PositiveInt
from effbench.api.shape import AnyShape, ModelShape
from effbench.methods.caches import Caches
from effbench.methods.codes import HoldsCodes
from effbench.nn.decode.eviction_cache import PromptEviction, SteadyEviction
from effbench.nn.decode.policy import EVERYTHING, CachePolicy
from effbench.util.errors import UserError


@dataclass(frozen=True)
class Budget(Point):
    """Entries that a head keeps."""

    tokens: int

    @property
    def name(self) -> str:
        """`b<tokens>`."""
        return f"b{self.tokens}"


@dataclass(frozen=True)
class Evicts(Caches):
    """A cache of at most so many entries a head; at the unnamed point it keeps everything."""

    budget: tuple[PositiveInt, ...] = (1024,)
    """Entries that stay in each head of keys and values; an operating point for each."""

    def cache_points(self) -> tuple[Point, ...]:
        """Return a point for each budget."""
        return tuple(Budget(tokens) for tokens in self.budget)

    @property
    def pinned(self) -> int:
        """Entries that always stay."""
        return 0

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method.

        Raises:
            UserError: For no budget, one that what always stays does not fit, and layers that share
                states.
        """
        method = super().resolve(shape)
        if not self.budget:
            raise UserError("method.budget names no budget.", "Give one: 'method.budget=[1024]'")
        if min(self.budget) < self.pinned:
            raise UserError(
                f"method.budget={min(self.budget)} is less than the {self.pinned} tokens that "
                f"{self.name} always keeps.",
                f"Set 'method.budget=[{self.pinned}]' or more, or let fewer always stay.",
            )
        return method

    def policy(self, budget: int) -> CachePolicy:
        """Return what the cache keeps with so many entries."""
        raise NotImplementedError

    def cache_at(self, point: Point) -> CachePolicy:
        """Return what the cache keeps with a point's budget."""
        return self.policy(point.tokens) if isinstance(point, Budget) else EVERYTHING


@dataclass(frozen=True)
class EvictsSteadily(Evicts):
    """Evicts at every token; `policy` gives a `SteadyEviction`."""

    def cached(self, base: ModelShape, point: Point, folder: Path | None) -> ModelShape:
        """Return the model with caches that stop growing."""
        policy = self.cache_at(point)

        def bounded(index: int, layer: LayerShape) -> LayerShape:
            if isinstance(policy, SteadyEviction) and policy.evicts(index):
                return layer.bounded(policy.budget)
            return layer

        return base.map(bounded)


@dataclass(frozen=True)
class EvictsPrompt(HoldsCodes, Evicts):
    """Evicts when the prompt has been read; what stays, and later tokens, may be held in few bits.

    `evicting` gives the `PromptEviction`.
    """

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method.

        Raises:
            UserError: For groups that fill no whole bytes, and as `Evicts.resolve` does.
        """
        if self.codes:
            self.codes.require_bytes(ModelShape.of(shape).head_dim)
        return super().resolve(shape)

    def evicting(self, budget: int) -> PromptEviction:
        """Return what evicts down to so many entries."""
        raise NotImplementedError

    def policy(self, budget: int) -> CachePolicy:
        """Return what the cache keeps with so many entries of a prompt."""
        return replace(self.evicting(budget), then=self.codes or EVERYTHING)

    def cached(self, base: ModelShape, point: Point, folder: Path | None) -> ModelShape:
        """Return the model with caches that keep a part of a prompt, perhaps in codes."""
        if not isinstance(point, Budget):
            return base
        model = base.map(lambda _, layer: layer.keeping(point.tokens))
        return self.codes.shape(model) if self.codes else model
