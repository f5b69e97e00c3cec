"""The shape that a method states, held against the modules that are really there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE

from effbench.api import registry
from effbench.api.cost import cost_of
from effbench.api.parts import Adapter, LayerShape, Linear, Norm
from effbench.api.shape import ModelShape
from effbench.methods.chain import chain_cost, chain_shapes, shape_of
from effbench.methods.depth.depths import Depths
from effbench.methods.depth.points import Depth
from effbench.methods.full import Full
from effbench.nn.adapters import twin
from effbench.nn.quant.linears import QuantisedLinear, storage_bytes
from effbench.testing.kinds import trains
from effbench.testing.models import begun, changed, fresh, saved

NAMES = registry.names("methods")
TRAINED = [n for n in NAMES if trains(n)]
Matrix = tuple[int, int, int, bool, int, int]
"""Columns, rows, bytes, whether it trains; parameters beside it, and how many of them train."""


def test_the_walk_sees_what_it_should() -> None:
    """What the tests below rest on: a change of any linear is seen."""
    _, model, shape, _ = fresh("none")
    stated, here = ModelShape.of(shape), tree(model.requires_grad_(False))
    assert stated_of(stated, 4) == here
    for change in (
        stated.low_rank(2, ["v_proj"]),
        stated.trained(),
        stated.only([0]),
        stated.map(lambda i, x: x if i else LayerShape(None, x.mlp, x.norms)),
    ):
        assert stated_of(change, 4) != here


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_shape_that_trains_is_the_model_that_trains(name: str, dtype: str) -> None:
    method, model, shape, ctx = fresh(name, dtype)
    model = begun(method, model, ctx)
    stated = shape_of(method, shape, phase="train")
    found = stated_of(stated, getattr(torch, dtype).itemsize, apart=twin.has_twin(model))
    assert found == tree(model)


@pytest.mark.parametrize("name", NAMES)
def test_the_shape_that_is_left_is_the_model_that_is_left(name: str, tmp_path: Path) -> None:
    method, model, shape, _ = changed(name, "bfloat16")
    made = next(iter(saved(method, model, tmp_path)), None)
    left = shape_of(method, shape, phase="use", folder=made)
    point = method.full_point(left)
    left = shape_of(method, shape, point, "use", made)
    with method.at(model, point):
        there = tree(model)
    assert stated_of(left, 2, [layer[2] for layer in there["layers"]]) == there


def test_what_the_next_method_starts_from_trains_nothing_and_has_no_masters() -> None:
    [left] = chain_shapes([Full()], SHAPE)
    assert (cost_of(left, "bfloat16").trainable, left) == (0, ModelShape.of(SHAPE))
    read = chain_cost([Full(), Depths(eval_depths=(1,))], SHAPE, "bfloat16", Depth(1))
    assert read.trainable == 0
    assert read.resident_bytes == 2 * read.params


# -- what is stated ----------------------------------------------------------------------------


def stated_of(
    shape: ModelShape, element: int, shared: Sequence[int] = (), apart: bool = False
) -> dict[str, Any]:
    """Return what a shape says of the modules, in the form of `tree`.

    Args:
        shape: The shape.
        element: Bytes of a compute element.
        shared: By layer, bytes above 0 where its linears are held as one.
        apart: Whether copies of adapters after the first lie beside the layers.
    """
    layers, copies = [], (0, 0)
    if apart:
        whole = shape
        shape = whole.map_linears(lambda _, x: replace(x, adapter=_single(x.adapter)))
        copies = tuple(a - b for a, b in zip(_adapted(whole), _adapted(shape), strict=True))
    for i, layer in enumerate(shape.layers):
        matrices = {x.name: _stated(x, element) for x in layer.linears}
        norms = [_norm(n, element) for n in layer.norms]
        layers.append(_as_one(matrices, norms) if any(shared[i : i + 1]) else (matrices, norms, 0))
    bypasses = [x.bypass for x in shape.layers if x.bypass]
    exits = [(x.norm, x.head) for x in shape.exits]
    more = sum(a.params for a in bypasses) + sum(n.size + h.params for n, h in exits)
    inner = [n for x in shape.layers for n in x.all_norms[2:]]
    more += sum(x.params + x.biases for x in shape.more) + sum(n.params for n in inner)
    trains = sum(a.trainable for a in bypasses) + sum(n.params * n.trains for n in inner)
    trains += sum((x.params + x.biases) * x.trains for x in shape.more)
    trains += sum(n.size * n.trains + h.params * h.trains for n, h in exits)
    readout = shape.readout
    head = shape.embed if readout.tied else readout.head
    return {
        "layers": layers,
        "embed": shape.embed.params,
        "head": (head.d_in * head.d_out, head.trains),
        "norm": _norm(readout.norm, element),
        "beside": (more + copies[0], trains + copies[1]),
    }


def _single(adapter: Adapter | None) -> Adapter | None:
    return adapter and replace(adapter, copies=1)


def _adapted(shape: ModelShape) -> tuple[int, int]:
    """Return the parameters of adapters on linears of the blocks, and how many of them train."""
    adapters = [x.adapter for layer in shape.layers for x in layer.linears if x.adapter]
    return sum(a.params for a in adapters), sum(a.trainable for a in adapters)


def _stated(linear: Linear, element: int) -> Matrix:
    held = linear.format.bytes(linear.d_in, linear.d_out, element)
    beside = (linear.adapter.params, linear.adapter.trainable) if linear.adapter else (0, 0)
    return linear.d_in, linear.d_out, held, linear.trains, *beside


def _as_one(matrices: dict[str, Matrix], norms: list[Any]) -> tuple[dict[str, Any], list[Any], int]:
    """Return a layer whose linears are held as one: bytes of all, none of each."""
    each = {name: (*m[:2], 0, *m[3:]) for name, m in matrices.items()}
    return each, norms, sum(m[2] for m in matrices.values())


def _norm(norm: Norm, element: int) -> tuple[int, int, bool]:
    return norm.size, norm.format.bytes(1, norm.size, element), norm.trains


# -- what is there -----------------------------------------------------------------------------


def tree(model: Any) -> dict[str, Any]:
    """Return the sizes, bytes and gradients of a model's modules."""
    seen: Counter[int] = Counter()
    layers = []
    for layer in model.model.layers:
        matrices, owns = {}, []
        for part in (layer.self_attn, layer.mlp):
            for name, found in part.named_children():
                if hasattr(found, "in_features"):
                    matrices[name] = _matrix(found, seen)
                    owns.append(_own(found))
        norms = [_norm_of(n, seen) for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        whole = storage_bytes(torch.nn.ModuleList(owns))
        if whole == sum(matrix[2] for matrix in matrices.values()):
            layers.append((matrices, norms, 0))
        else:
            layers.append((_as_one(matrices, norms)[0], norms, whole))
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight
    seen.update({id(embed), id(head)})
    norm = _norm_of(model.model.norm, seen)
    rest = [p for p in model.parameters() if id(p) not in seen]
    return {
        "layers": layers,
        "embed": embed.numel(),
        "head": (head.numel(), head.requires_grad),
        "norm": norm,
        "beside": (_count(rest), _count(p for p in rest if p.requires_grad)),
    }


def _matrix(module: torch.nn.Module, seen: Counter[int]) -> Matrix:
    """Return the linear inside of whatever was put around it, and what else is there."""
    own = _own(module)
    seen.update(id(p) for p in module.parameters())
    beside = [p for p in module.parameters() if all(p is not q for q in own.parameters())]
    trains = any(p.requires_grad for p in own.parameters())
    more = _count(beside), _count(p for p in beside if p.requires_grad)
    return own.in_features, own.out_features, storage_bytes(own), trains, *more


def _own(module: torch.nn.Module) -> Any:
    """Return the linear that a wrapper holds: the first one under it that is none of an adapter."""
    plain = (torch.nn.Linear,)
    for name, inner in module.named_modules():
        if isinstance(inner, QuantisedLinear):
            return inner
        if type(inner) in plain and "lora_" not in name:
            return inner
    raise AssertionError(f"no linear in {module}")


def _norm_of(norm: Any, seen: Counter[int]) -> tuple[int, int, bool]:
    weight = norm.weight
    seen.update([id(weight)])
    return weight.numel(), weight.numel() * weight.element_size(), weight.requires_grad


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)
