"""Several methods one after the other: their order, shapes and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from effbench.api.cost import Cost
from effbench.api.plugins import make_method
from effbench.api.shape import DTYPE_BYTES, Shape
from effbench.api.spec import Spec
from effbench.api.stages import base as stages
from effbench.methods.base import Method


def chain_cost(
    methods: Sequence[Method],
    shape: Shape,
    dtype: str,
    point: str = "",
    folders: Sequence[Path] = (),
) -> Cost:
    """Return the cost of what a chain of methods made; `point` is one of the last method's.

    The last method's weights are as it trains them, those of the earlier ones as they are used.

    Args:
        methods: First to last.
        shape: The base model's shape.
        dtype: Compute dtype.
        point: Operating point.
        folders: Artefacts of the methods, as far as there are any.
    """
    shapes = chain_shapes(methods, shape, folders)
    cost = None
    for method, here in zip(methods[:-1], shapes, strict=False):
        cost = _in_use(method, method.cost(here, dtype, method.whole(here), cost), dtype)
    return methods[-1].cost(shapes[-1], dtype, point, cost)


def chain_shapes(
    methods: Sequence[Method], shape: Shape, folders: Sequence[Path] = ()
) -> list[Shape]:
    """Return the shape that each method of a chain leaves; see `chain_cost`."""
    found = []
    for place, method in enumerate(methods):
        shape = method.left(shape, folders[place] if place < len(folders) else None)
        found.append(shape)
    return found


def inference_cost(
    methods: Sequence[Method],
    shape: Shape,
    dtype: str,
    point: str = "",
    folders: Sequence[Path] = (),
) -> Cost:
    """Return the cost of what a chain of methods made, as it is evaluated; see `chain_cost`.

    Float32 masters are cast to the compute dtype for that.
    """
    return _in_use(methods[-1], chain_cost(methods, shape, dtype, point, folders), dtype)


def _in_use(method: Method, cost: Cost, dtype: str) -> Cost:
    if method.weights != "float32":
        return cost
    share = DTYPE_BYTES[dtype] / DTYPE_BYTES["float32"]
    return replace(
        cost,
        resident_bytes=int(cost.resident_bytes * share),
        bytes_per_token=cost.bytes_per_token * share,
    )


def chain(spec: Spec, earlier: Sequence[Method]) -> list[Method]:
    """Return all methods that a run's model goes through.

    A run that makes nothing goes through the last one again, perhaps with other settings of
    evaluation, unless its own method makes nothing either.
    """
    own: Method = make_method(spec.method)
    same = not stages.find(spec.stage).makes and stages.find(own.stage).makes
    return [*(earlier[:-1] if same else earlier), own]
