"""Several methods one after the other: their order, shapes and cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from effbench.api import registry
from effbench.api.cost import Cost, cost_of
from effbench.api.plugins import make_method
from effbench.api.points import UNNAMED, Point, require_distinct
from effbench.api.shape import Anatomy, AnyShape, ModelShape, Phase
from effbench.api.spec import Spec
from effbench.api.stages import base as stages
from effbench.api.weights import held, is_packed
from effbench.methods.base import Method
from effbench.nn.model_kinds.base import CAUSAL, find
from effbench.util.errors import UserError

M = TypeVar("M", bound=Method)
ANATOMIES: dict[Anatomy, int] = {"other": 0, "llama": 1, "plain": 2}
"""The narrower, the higher."""


def resolved(method: M, shape: AnyShape) -> M:
    """Return a method with its defaults filled in for a model that it can work on.

    Args:
        method: Any.
        shape: Of the model that it starts from.

    Raises:
        UserError: When it cannot, with the reason, or when two of its operating points are the
            same. No weight is needed to tell.
    """
    model = ModelShape.of(shape)
    if reason := _why_not(method, model):
        raise UserError(
            f"{method.name} does not work on this model ({model.family}): {reason}.",
            f"Methods for every {find(model.kind).noun}: {', '.join(_for_any(model.kind))}.",
        )
    method = method.resolve(shape)
    require_distinct(method.points(), method.name)
    return method


def _why_not(method: Method, model: ModelShape) -> str:
    """Return what keeps a method from a model; empty when nothing does."""
    if model.kind not in method.model_kinds:
        return f"it is no {find(CAUSAL).noun}, but {find(model.kind).one}"
    if ANATOMIES[model.anatomy] < ANATOMIES[method.anatomy]:
        if model.anatomy == "llama":
            return "it needs Llama's own blocks, whose linear layers have no biases"
        return "it needs blocks that are made as Llama's are, where tokens see all before them"
    bare = [x.name for layer in model.layers for x in layer.linears if x.bare and x.copies > 1]
    if bare and (is_packed(method.weights) or is_packed(method.produces)):
        return f"{bare[-1]} is one tensor, which would stay as it is, and most of the model with it"
    return ""


def _for_any(kind: str) -> list[str]:
    """Return the names of the methods that work on every model of a kind."""
    classes = (registry.find("methods", name) for name in registry.names("methods"))
    return sorted(cls.name for cls in classes if cls.anatomy == "other" and kind in cls.model_kinds)


def shape_of(
    method: Method,
    base: AnyShape,
    point: Point = UNNAMED,
    phase: Phase = "use",
    folder: Path | None = None,
) -> ModelShape:
    """Return what a method makes of a model, which is held as the method asks for it.

    Args:
        method: Its defaults need not be filled in.
        base: What it starts from.
        point: One of its operating points.
        phase: While it trains or as it is used.
        folder: Its artefact, if there is one.
    """
    start = ModelShape.of(base)
    if is_packed(method.weights):
        start = start.packed(held(method.weights))
    return method.shape(start, point, phase, folder)


def chain_shapes(
    methods: Sequence[Method],
    shape: AnyShape,
    folders: Sequence[Path] = (),
    then: Method | None = None,
) -> list[ModelShape]:
    """Return what each method of a chain leaves to the next one, frozen, with all that it has.

    Args:
        methods: First to last.
        shape: The base model's shape.
        folders: Artefacts of the methods, as far as there are any.
        then: What comes after the last of them.
    """
    found, base = [], ModelShape.of(shape)
    for place, (method, after) in enumerate(zip(methods, [*methods[1:], then], strict=False)):
        folder = folders[place] if place < len(folders) else None
        left = shape_of(method, base, UNNAMED, "use", folder)
        base = shape_of(method, base, method.full_point(left), "use", folder).used().frozen()
        if after is not None and method.merges_for(after):
            base = base.dense()
        found.append(base)
    return found


def last_shape(
    methods: Sequence[Method],
    shape: AnyShape,
    point: Point = UNNAMED,
    folders: Sequence[Path] = (),
) -> ModelShape:
    """Return what a chain of methods made at `point`, one of the last method's.

    The last method's weights are as it trains them, those of the earlier ones as they are used.
    """
    *first, own = methods
    base = [ModelShape.of(shape), *chain_shapes(first, shape, folders, own)][-1]
    folder = folders[len(first)] if len(first) < len(folders) else None
    return shape_of(own, base, point, "use", folder)


def chain_cost(
    methods: Sequence[Method],
    shape: AnyShape,
    dtype: str,
    point: Point = UNNAMED,
    folders: Sequence[Path] = (),
) -> Cost:
    """Return the cost of what a chain of methods made; see `last_shape`."""
    left = last_shape(methods, shape, point, folders)
    return cost_of(left, dtype, shape)


def inference_cost(
    methods: Sequence[Method],
    shape: AnyShape,
    dtype: str,
    point: Point = UNNAMED,
    folders: Sequence[Path] = (),
) -> Cost:
    """Return the cost of what a chain of methods made, as it is evaluated; see `last_shape`.

    Float32 masters are cast to the compute dtype for that.
    """
    left = last_shape(methods, shape, point, folders)
    return cost_of(left.used(), dtype, shape)


def chain(spec: Spec, earlier: Sequence[Method]) -> list[Method]:
    """Return all methods that a run's model goes through.

    A run that makes nothing goes through the last one again, perhaps with other settings of
    evaluation, unless its own method makes nothing either.
    """
    own: Method = make_method(spec.method)
    same = not stages.find(spec.stage).makes and stages.find(own.stage).makes
    return [*(earlier[:-1] if same else earlier), own]
