"""Methods with a cache of their own, and ways of decoding with it beside the ordinary one.

The ways are those of `methods.depth.reading`: `exit` lets a token leave at the first exit that is
sure of it, `speculative` has the shallowest exit draft what all layers verify. What a way cannot do
with a cache is refused before a model is loaded, as the cache and the way say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from effbench.api.points import UNNAMED, Point
from effbench.api.schema import NonNegativeFloat, PositiveInt
from effbench.api.shape import LAYERS_DIFFER, AnyShape, ModelShape, Phase
from effbench.api.submodels import check_depths, depth_set
from effbench.methods.base import Method
from effbench.methods.depth.points import Way, check_exits, read_mixed
from effbench.nn.decode import early_exit
from effbench.nn.decode.decoder import Decoder, Drafts, Driver, Exits, Route
from effbench.nn.decode.policy import CachePolicy
from effbench.util.errors import UserError

SHALLOWEST = 0.3
"""Share of the layers that the shallowest exit has at least, unless exits are given."""
DRIVING = frozenset({"decoding", "exit_depths", "thresholds"})
"""Settings on which nothing that is made depends."""


@dataclass(frozen=True)
class Driven(Point):
    """A way of decoding with a cache."""

    skips_layers: ClassVar[bool] = True

    cache: Point
    """The point at which the cache is the same and decoding is ordinary."""
    decoding: Way

    @property
    def name(self) -> str:
        """The name of that point and the way."""
        return f"{self.cache.name}-{self.decoding}" if self.cache.name else self.decoding


@dataclass(frozen=True)
class Drives(Method):
    """A method whose operating points are caches, each with every way of decoding that is asked.

    A subclass has `cache_at`, and `cache_points` and `cached` where there is more than one.
    """

    decoding: tuple[Way, ...] = ()
    """Ways of decoding with the cache that are operating points too."""
    exit_depths: tuple[PositiveInt, ...] = ()
    """Depths at which tokens can leave, the first of which drafts; empty for the default ones."""
    thresholds: tuple[NonNegativeFloat, ...] = ()
    """Least probability to leave at each exit but the last; empty for the paper's."""

    def cache_points(self) -> tuple[Point, ...]:
        """Return a point for each cache. Default: the unnamed one."""
        return (UNNAMED,)

    def cache_at(self, point: Point) -> CachePolicy:
        """Return what the cache keeps at one of these points."""
        raise NotImplementedError

    def cached(self, base: ModelShape, point: Point, folder: Path | None) -> ModelShape:
        """Return a model with the cache of one of these points; see `Method.shape`."""
        return base

    def points(self) -> tuple[Point, ...]:
        """Return every cache with every way of decoding, and then each alone."""
        caches = self.cache_points()
        return (*(Driven(p, way) for way in self.decoding for p in caches), *caches)

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method with its exits.

        Raises:
            UserError: For exits that the model does not have or that lead nowhere, and ways of
                decoding that the cache does not go with.
        """
        if not self.decoding:
            return self
        if not shape.uniform:
            raise UserError(*LAYERS_DIFFER)
        check_depths("exit_depths", self.exit_depths, shape.num_layers)
        method = self._with_exits(shape.num_layers)
        check_exits(self.decoding, method.exit_depths, self.thresholds, "exit_depths")
        for point in method.points():
            cache, (route, driver) = self.cache_at(_cache_point(point)), method._way(point)
            if reason := route.why_not(cache) or driver.why_not(route, cache):
                ways = list(self.decoding)
                raise UserError(
                    f"method.decoding={ways} does not go with {self.name}: {reason}.",
                    "Leave that way of decoding out.",
                )
        return method

    def _with_exits(self, num_layers: int) -> Self:
        depths = self.exit_depths or depth_set(num_layers, SHALLOWEST)
        return replace(self, exit_depths=(*(n for n in depths if n < num_layers), num_layers))

    def decoder(self, point: Point) -> Decoder:
        """Return a point's way of decoding, with its cache."""
        route, driver = self._way(point)
        return Decoder(route, driver, self.cache_at(_cache_point(point)))

    def _way(self, point: Point) -> tuple[Route, Driver]:
        if not isinstance(point, Driven):
            return Route(), Driver()
        if point.decoding == "exit":
            return Exits(self.exit_depths, self.rule), Driver()
        return Route(), Drafts(self.exit_depths[0])

    def rule(self, exits: int) -> early_exit.Rule:
        """Return who leaves at each of so many exits."""
        return early_exit.chosen(self.thresholds, exits)

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Return the model with a point's cache, read out as its way of decoding does."""
        own = self.cached(base, _cache_point(point), folder)
        if not isinstance(point, Driven):
            return own
        exits = self._with_exits(base.num_layers).exit_depths
        drafts = Drafts(exits[0])
        if point.decoding == "speculative":
            own = own.map(lambda _, layer: layer.undoing(drafts.ahead))
        return read_mixed(own, point.decoding, exits, exits[0], drafts.tokens)


def _cache_point(point: Point) -> Point:
    """Return the point with the same cache and ordinary decoding."""
    return point.cache if isinstance(point, Driven) else point
