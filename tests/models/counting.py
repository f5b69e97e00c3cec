"""What is counted of models of other kinds, held against their modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from effbench.api import registry
from effbench.api.batch import Batch
from effbench.api.cost import Cost, cost_of
from effbench.api.method_types import Context
from effbench.api.shape import ModelShape
from effbench.methods.base import Method
from effbench.methods.chain import resolved, shape_of
from effbench.methods.trains import Trains
from effbench.models.survey import require_same_when_padded
from effbench.nn.quant.linears import storage_bytes
from effbench.resources.counting import flops, parameters
from effbench.testing.models import given
from effbench.util.errors import UserError


def context(load: Callable[[str], Any]) -> Context:
    """Return a context whose other models are those that `load` gives."""
    draws = torch.Generator().manual_seed(0)
    return Context(0, torch.device("cpu"), torch.bfloat16, draws, load)


def counted(model: Any, shape: ModelShape, one: Callable[[], Any]) -> Cost:
    """Return the cost of a shape in float32, after holding it against its model.

    Args:
        model: Of that shape.
        shape: What was surveyed.
        one: A pass over one token (of each part).
    """
    cost = cost_of(shape, "float32")
    model.set_attn_implementation("eager")  # whose products are counted
    assert cost.params == shape.params == parameters(model).total
    assert cost.resident_bytes == storage_bytes(model)
    with torch.no_grad():
        assert cost.flops_per_token + 4 * shape.attention_width == flops(one)
    require_same_when_padded(model)
    return cost


def require_counted(method: Method, model: Any, shape: ModelShape, dtype: str) -> None:
    """Hold what a method's training is counted to be against the model that it prepared."""
    working = shape_of(method, shape, phase="train")
    cost, found = cost_of(working, dtype), parameters(model)
    assert (cost.params, cost.trainable) == (found.total, found.trainable)
    assert cost.resident_bytes - working.held_bytes == storage_bytes(model)


def learn(method: Method, model: Any, batch: Batch, ctx: Context) -> None:
    """Give a model the gradients of one batch."""
    assert isinstance(method, Trains)
    batch.window_tokens = batch.loss_tokens
    ctx.aux = {"teacher": ctx.load_model("teacher")}
    method.loss(model, batch, ctx).backward()


def works(method: str, shape: ModelShape) -> bool:
    """Whether a method works on models of a shape; else it has to say so of that shape's family."""
    try:
        resolved(given(method), shape)
    except UserError as error:
        assert f"does not work on this model ({shape.family})" in error.message
        return False
    return True


def require_documented(kind: str, shapes: Mapping[str, ModelShape], one: ModelShape) -> None:
    """Hold docs/models.md against what works on a kind of model, and the linears of its models."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for name, shape in shapes.items():
        names = ", ".join(f"`{x}`" for x in shape.linear_names)
        assert f"| {name} | {names} |" in text, f"| {name} | {names} |"
    able = ", ".join(f"`{n}`" for n in registry.names("methods") if works(n, one))
    assert f"On {kind} work {able}." in " ".join(text.split()), able
