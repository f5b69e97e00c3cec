"""Which methods are of one kind, so that the first of them can stand for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest

from effbench.api import registry
from effbench.api.stages import base as stages
from effbench.api.weights import is_packed
from effbench.methods.base import Method
from effbench.methods.chain import resolved, shape_of
from effbench.methods.trains import data_parallel
from effbench.nn.decode.decoder import Route
from effbench.nn.decode.policy import CachePolicy
from effbench.testing.models import given, tiny_shape

OWN_HOOKS = ("forward", "parts")
"""Hooks beside `decoder` that decide which way an evaluator goes."""


TRAINING_HOOKS = ("prepare", "loss", "update", "finalize", "validation_point")
"""Hooks in which a setting of evaluation could be mistaken for one of training."""


def method_class(name: str) -> Any:
    """Return the class of a method."""
    return registry.find("methods", name)


def stage_of(name: str) -> Any:
    """Return the stage that makes a method's artefact."""
    return method_class(name).stage


def makes(name: str) -> bool:
    """Whether a method leaves an artefact."""
    return stages.find(stage_of(name)).makes


def trains(name: str) -> bool:
    """Whether a method trains."""
    return stages.find(stage_of(name)).trains


def spreads(name: str) -> bool:
    """Whether a method says that it trains on several devices."""
    return trains(name) and bool(data_parallel(given(name)))


def compresses(name: str) -> bool:
    """Whether a method compresses."""
    return bool(stage_of(name) == "compress")


@cache
def left_kind(name: str) -> tuple[Any, ...]:
    """Return how a method leaves the linear layers, the base and the shape."""
    method, base = resolved(given(name), tiny_shape()), tiny_shape()
    left = shape_of(method, base)
    kept = list(left.linears()) == list(base.linears())
    return method.produces, method.merges, is_packed(method.weights), left.uniform, kept


@cache
def evaluation_kind(name: str) -> tuple[Any, ...]:
    """Return all that decides which way evaluators go with what a method makes.

    Formats of weights go one way, whichever they are.
    """
    cls, method = method_class(name), resolved(given(name), tiny_shape())
    own = [h for h in OWN_HOOKS if getattr(cls, h) is not getattr(Method, h)]
    skips = any(point.skips_layers for point in method.points())
    produces, *left = left_kind(name)
    format_ = "packed" if is_packed(produces) else produces
    return (format_, *left, *own, *_ways(method), skips, cls.in_one_pass, cls.nested_points)


@cache
def training_kind(name: str) -> tuple[Any, ...]:
    """Return whose code trains a method, and what of its settings is for evaluation alone."""
    cls = method_class(name)
    own = (getattr(cls, hook).__qualname__ for hook in TRAINING_HOOKS)
    return cls.eval_settings, *own


@cache
def decoding_kind(name: str) -> tuple[Any, ...]:
    """Return all that decides how the usual point of a method decodes, and what its cache holds."""
    method = resolved(given(name), tiny_shape())
    way, left = method.decoder(method.default_point()), shape_of(method, tiny_shape())
    parts = (type(part).__name__ for part in (way.cache, way.route, way.driver))
    return *parts, is_packed(method.weights), is_packed(method.produces), left.uniform


def _ways(method: Method) -> list[Any]:
    """Return how the points of a method decode, each way once, and whether they are several."""
    decoders = [method.decoder(point) for point in method.points()]
    ways = {(_family(d.cache), type(d.route).__name__, type(d.driver).__name__) for d in decoders}
    return [*sorted(ways), len(decoders) > 1]


def _family(cache: CachePolicy) -> str:
    """Return what a cache has in common with others that differ from it by what they keep."""
    base = type(cache).__base__
    return (type(cache) if base in (None, object, CachePolicy) else base).__name__


def cycles(method: Method) -> bool:
    """Whether tokens may go through different blocks, in turns."""
    return any(type(method.decoder(point).route) is not Route for point in method.points())


@cache
def follower_kind(name: str) -> tuple[Any, ...]:
    """Return all that decides what a method can go on from."""
    cls = method_class(name)
    own = cls.check_start is not Method.check_start
    return cls.stage, is_packed(given(name).weights), cls.accepts, cls.produces, own


def first_of_each(names: Sequence[Any], kind: Callable[[Any], Any]) -> list[Any]:
    """Return the first name of each kind."""
    found: dict[Any, Any] = {}
    for name in names:
        found.setdefault(kind(name), name)
    return list(found.values())


def others_slow(names: Sequence[Any], first: Sequence[Any]) -> list[Any]:
    """Return parameters of a test: those that come first, and the others marked `slow`."""
    return [*first, *(pytest.param(n, marks=pytest.mark.slow) for n in names if n not in first)]


def pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Return all ordered pairs of methods that leave something, with one of `methods` in each."""
    makers = [n for n in registry.names("methods") if makes(n)]
    return [(a, b) for a, b in product(makers, makers) if a in methods or b in methods]


def pair_kind(pair: tuple[str, str]) -> Any:
    """Return all that decides whether the second method can go on from the first, and how."""
    return left_kind(pair[0]), follower_kind(pair[1])


def pairs_in_turn(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Return every other pair of kinds, so that each kind meets half of those of the other sort."""
    chosen = first_of_each(pairs(methods), pair_kind)
    lefts, followers = (list(dict.fromkeys(pair_kind(p)[side] for p in chosen)) for side in (0, 1))

    def place(pair: tuple[str, str]) -> int:
        left, follower = pair_kind(pair)
        return lefts.index(left) + followers.index(follower)

    return [pair for pair in chosen if place(pair) % 2 == 0]
