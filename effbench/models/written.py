"""Shapes as JSON: what a survey found, without the fields that have their default."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from effbench.api.schema import build
from effbench.api.shape import ModelShape

KIND = "effbench_kind"
"""Key in a config that says of what kind the model is, where it is no causal one."""


def encoded(shape: ModelShape) -> dict[str, Any]:
    """Return a surveyed shape as plain JSON values; layers that are alike stand there once."""
    runs = [(len(list(alike)), _lean(layer)) for layer, alike in groupby(shape.layers)]
    return {"layers": runs, "rest": _lean(dataclasses.replace(shape, layers=()))}


def decoded(values: Mapping[str, Any]) -> ModelShape:
    """Return the shape that was written down.

    Raises:
        UserError: When it is none.
        KeyError: The same.
    """
    layers = [layer for count, layer in values["layers"] for _ in range(count)]
    return build(ModelShape, {**values["rest"], "layers": layers}, "shape")


def _lean(value: Any) -> Any:
    """Return a dataclass without the fields that have their default."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value)}
        return {name: _lean(own) for name, (own, usual) in fields.items() if own != usual}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_lean(v) for v in value]
    return value
