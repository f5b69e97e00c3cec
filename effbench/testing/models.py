"""Tiny models with a method in them, and what can be seen of them."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effbench.api import registry
from effbench.api.batch import Batch, make_batch
from effbench.api.examples import Example, Tokens
from effbench.api.method_types import Context
from effbench.api.plugins import make_method
from effbench.api.points import UNNAMED, Point
from effbench.api.shape import AnyShape, Shape
from effbench.api.spec import Plugin
from effbench.config.compose import compose, model_named
from effbench.config.composed import settings_of
from effbench.methods.base import Method
from effbench.methods.chain import resolved
from effbench.methods.compresses import Compresses, compress_whole
from effbench.methods.trains import Trains, begin_training
from effbench.models import load as models
from effbench.runner.programs import run_program
from effbench.runner.stages.batching import window


class Fresh(NamedTuple):
    """A method before anything has begun: the base as the method wants it, its shape, a context."""

    method: Method
    model: Any
    shape: AnyShape
    ctx: Context


def given(name: str, **settings: Any) -> Method:
    """Return a method with what it `needs` and these settings."""
    cls = registry.find("methods", name)
    method: Method = make_method(Plugin(name, {**settings_of(cls), **cls.needs, **settings}))
    return method


@cache
def tiny_shape() -> Shape:
    """Return the shape of the model `tiny`."""
    shape = compose("eval", ["model=tiny", "dataset=arithmetic"]).spec.model.shape
    assert shape is not None
    return shape


def fresh(name: str, dtype: str = "float32", **settings: Any) -> Fresh:
    """Return a method and its base; dropout is on, so that random numbers are drawn."""
    cls = registry.find("methods", name)
    if "dropout" in {f.name for f in fields(cls)}:
        settings.setdefault("dropout", 0.1)
    method = given(name, **settings)
    held = getattr(torch, dtype)
    spec = compose("eval", ["model=tiny", "dataset=arithmetic"]).spec.model
    loaded = models.load(spec, device="cpu", dtype=held, weights=method.weights, tokenizer=False)

    def load_model(other: str) -> torch.nn.Module:
        spec = model_named(other)
        return models.load(spec, device="cpu", dtype=held, tokenizer=False).model

    draws = torch.Generator().manual_seed(0)
    ctx = Context(0, torch.device("cpu"), held, draws, load_model, None, program=run_program)
    return Fresh(resolved(method, loaded.shape), loaded.model, loaded.shape, ctx)


def begun(method: Method, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
    """Return the model as the method trains it, or as it reads it."""
    if isinstance(method, Trains):
        return begin_training(method, model, ctx)
    return method.prepare(model, ctx)


def changed(name: str, dtype: str = "float32") -> Fresh:
    """Return a method and its model with the method in it, as its stage would put it there."""
    if issubclass(registry.find("methods", name), Compresses):
        return deepcopy(_compressed(name, dtype))
    method, model, shape, ctx = fresh(name, dtype)
    model = begun(method, model, ctx)
    if isinstance(method, Trains):
        model = method.finalize(model, ctx)
    return Fresh(method, model, shape, ctx)


@cache
def _compressed(name: str, dtype: str) -> Fresh:
    """Return a compressed model that nobody has used: what is asked for it gets a copy."""
    method, model, shape, ctx = fresh(name, dtype)
    assert isinstance(method, Compresses)
    compress_whole(method, model.requires_grad_(False), [probe()], ctx)
    return Fresh(method, model, shape, ctx)


def strengthened(name: str) -> tuple[Method, torch.nn.Module]:
    """Return a method and its model, what trains in it moved away from where it started."""
    method, model, _, _ = changed(name)
    move(model)
    return method, model.requires_grad_(False).eval()


@torch.no_grad()
def move(model: torch.nn.Module) -> None:
    """Add noise to what trains."""
    draws = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.02 * torch.randn(p.shape, generator=draws))


def step_parts(
    name: str, processes: int
) -> list[tuple[float, dict[str, torch.Tensor], torch.Tensor]]:
    """Return what each of several processes finds in its part of a method's first step.

    That is its loss, its gradients by name, and the state of its draws; nothing is summed yet.
    """
    return [_step_part(name, rank, processes) for rank in range(processes)]


def _step_part(
    name: str, rank: int, processes: int
) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    drops = "dropout" in {f.name for f in fields(registry.find("methods", name))}
    still: dict[str, Any] = {"dropout": 0.0} if drops else {}
    method, model, _, ctx = fresh(name, **still)
    assert isinstance(method, Trains)
    model, losses = begun(method, model, ctx).train(), list[float]()
    ctx.reduce = lambda _, loss: losses.append(float(loss))
    lengths = (14, 5, 9, 22, 6, 11, 17)
    rows = [Example(str(n), (Tokens([*range(n, 2 * n)], 3, n - 3),)) for n in lengths]
    batches = window(rows, range(len(rows)), 3, 0, ctx.device, rank, processes)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    ctx.evolution.before_step()
    method.update(model, optimizer, batches, ctx)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return losses[0], found, ctx.generator.get_state()


def saved(method: Method, model: torch.nn.Module, folder: Path) -> list[Path]:
    """Save what a method made of a model and return where; what makes nothing has nowhere."""
    if not isinstance(method, Trains | Compresses):
        return []
    method.save(model, folder)
    return [folder]


def probe() -> Batch:
    """Return two rows of different length, the first with a prompt that carries no loss."""
    ids = torch.randint(4, 512, (2, 14), generator=torch.Generator().manual_seed(5)).tolist()
    return make_batch([(ids[0], [-100] * 3 + ids[0][3:]), (ids[1][:9], ids[1][:9])], 0)


def as_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Return what a model of transformers reads of a batch."""
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


@torch.no_grad()
def logits(method: Method, model: torch.nn.Module, point: Point = UNNAMED) -> torch.Tensor:
    """Return evaluation logits; frozen, because torch then multiplies in one and the same order."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    out = method.logits(model.eval(), probe(), point)
    for p in trained:
        p.requires_grad_(True)
    return out


def digests(method: Method, model: torch.nn.Module) -> dict[str, str]:
    """Return a hash of the logits at every operating point."""
    training, found = model.training, {}
    for point in method.points():
        with method.at(model, point):
            seen = logits(method, model, point).numpy().tobytes()
            found[point.name] = hashlib.sha256(seen).hexdigest()
    model.train(training)
    return found


def state_hash(model: torch.nn.Module) -> str:
    """Return a hash of all that a model holds."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
