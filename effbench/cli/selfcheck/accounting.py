"""What is counted and predicted, against what torch counts and the system measures.

FLOPs, bytes of weights and of the cache are held to every method at every operating point on a
random model. Peaks are those of whole runs in processes of their own, on a model whose tensors
outweigh the process; there the C library gives blocks back at once (`run.exact_memory`), for the
pieces that it would keep otherwise depend on the order of all allocations before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from effbench.api import registry
from effbench.api.batch import Batch
from effbench.api.cost import Cost
from effbench.api.footprint import Pass, held_flops, step_flops, training_of
from effbench.api.method_types import Context
from effbench.api.plugins import make_method
from effbench.api.points import Point
from effbench.api.shape import AnyShape, ModelShape, Shape
from effbench.api.spec import Plugin
from effbench.api.weights import find, is_packed
from effbench.cli.selfcheck.base import Check
from effbench.config.compose import compose
from effbench.methods.base import Method
from effbench.methods.chain import chain_shapes, inference_cost, resolved, shape_of
from effbench.methods.compresses import Compresses, compress_whole
from effbench.methods.trains import Trains, begin_training
from effbench.results.records import Record
from effbench.runner.programs import run_program

SHAPE = Shape(
    hidden_size=96,
    intermediate_size=256,
    num_layers=4,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
    vocab_size=512,
    tied=True,
)
ROWS, TOKENS = 2, 48
CYCLES = 24
"""Tokens after the prompt: whole cycles of the methods that treat tokens in turn."""
DRAWS = 6
"""Micro-batches of training: whole cycles of the methods that draw what they train."""
FLOPS_BOUND, PEAK_BOUND = 0.01, 0.10
SHORT = ("full", "qlora")
"""Methods whose peaks the short form measures."""
REAL: dict[str, dict[str, Any]] = {
    "kd": {"teacher": "smollm2-135m"},
    "structured": {"criterion": "wanda"},  # reads rows before it cuts
}
"""Settings for the real model."""
RUN = ("run.progress=false", "run.exact_memory=true", "train.max_steps=3", "dataset.limit.test=4")


def run(short: bool) -> Iterator[Check]:
    """Yield the checks; the short form measures the peaks of two methods only."""
    for name in _methods():
        yield from _counts(name)
    for name in SHORT if short else _methods():
        yield from _peaks(name)


def _methods() -> list[str]:
    return [n for n in registry.names("methods") if n not in registry.plugins("methods")]


# -- counts ------------------------------------------------------------------------------------


def _counts(name: str) -> Iterator[Check]:
    """Yield the checks of FLOPs, weights and cache of one method."""
    method = resolved(make_method(Plugin(name, registry.find("methods", name).needs)), SHAPE)
    model, ctx = _model(method)
    if isinstance(method, Trains):
        if runs_blocks(method):
            yield _step(name, method, model, ctx)
        model = method.finalize(model, ctx)
    model.eval().requires_grad_(False)
    with TemporaryDirectory() as folder:
        if method.stage != "eval":
            method.save(model, Path(folder))
        yield from _in_use(name, method, model, Path(folder))


def _in_use(name: str, method: Method, model: Any, folder: Path) -> Iterator[Check]:
    """Yield the checks of what a method made, whose artefact lies in `folder`."""
    from effbench.nn.quant.linears import storage_bytes

    (shape,), where = chain_shapes([method], SHAPE, [folder]), name
    for point in method.points():
        where = f"{name} {point}".strip()
        with method.at(model, point):
            cost = inference_cost([method], SHAPE, "float32", point, [folder])
            first, second = (_forward(method, model, point) for _ in range(2))
            expected = ROWS * TOKENS * _parallel(method, shape, model, cost, point)
            yield _near(f"forward FLOPs, {where}", expected, first, FLOPS_BOUND)
            yield _near(f"forward FLOPs again, {where}", second, first, 0)
            yield _cache(where, method, model, cost, point)
    whole = inference_cost([method], SHAPE, "float32", method.full_point(shape), [folder])
    held = storage_bytes(model)
    yield _near(f"bytes of weights, {where}", whole.resident_bytes, held, 0)


def runs_blocks(method: Trains) -> bool:
    """Whether a training step runs any block; else it learns from states that are there."""
    layers = ModelShape.of(shape_of(method, SHAPE, phase="train")).layers
    return any(layer.runs for layer in layers)


def _step(name: str, method: Trains, model: Any, ctx: Context) -> Check:
    """Return the check of a training step's FLOPs."""
    import torch

    from effbench.resources.counting import flops

    batch = _batch()
    shape = shape_of(method, SHAPE, phase="train")
    training = training_of(shape, "float32")
    one = Pass("train", ROWS, TOKENS, batch.loss_tokens)
    expected = step_flops(training, one, square=True)
    others = held_flops(SHAPE, shape, TOKENS) * one.size * len(method.holds())

    def step() -> None:
        for _ in range(0 if training.forwards else training.passes):
            method.loss(model, batch, ctx).backward()
        with torch.no_grad():
            for _ in range(training.forwards):
                method.loss(model, batch, ctx)

    work = [flops(step) for _ in range(DRAWS)]
    counted = sum(work) / DRAWS
    return _near(f"training FLOPs, {name}", expected + others, counted, FLOPS_BOUND)


def _forward(method: Method, model: Any, point: Point) -> int:
    """Return torch's count of the FLOPs of a teacher-forced pass."""
    import torch

    from effbench.resources.counting import flops

    with torch.no_grad():
        return flops(lambda: method.logits(model, _batch(), point))


def _parallel(method: Method, shape: AnyShape, model: Any, cost: Cost, point: Point) -> float:
    """Return the FLOPs per token of a teacher-forced pass; torch counts attention as full squares.

    It is what decoding costs, except where decoding skips what one parallel pass has to compute.
    """
    dense = shape.flops_per_token()
    layers = len(model.model.layers)
    attention = (shape.pass_flops_per_token(TOKENS) - dense) * layers / shape.num_layers
    if cost.flops_per_token < dense and not method.forward(point).shares_prefixes:
        head = 2 * shape.vocab_size * shape.hidden_size
        working = training_of(shape_of(method, SHAPE, phase="train"), "float32")
        return working.forward + head + attention
    return cost.flops_per_token + attention


def _cache(where: str, method: Method, model: Any, cost: Cost, point: Point) -> Check:
    """Return the check of the cache: what the tokens after the prompt add to it, cycles whole.

    Tokens before it grows evenly do not count.
    """
    import torch

    session = method.session(model, point)
    settled, period = method.decoder(point).cache.cycle()
    steps = -(CYCLES // -period) * period
    token = session.prefill(_batch().input_ids).argmax(-1, keepdim=True)
    with torch.inference_mode():
        for _ in range(settled - TOKENS):
            token = session.step(token).argmax(-1, keepdim=True)
        before = session.kv_bytes()
        for _ in range(steps):
            token = session.step(token).argmax(-1, keepdim=True)
    expected = cost.kv_bytes_per_token * ROWS * steps
    return _near(f"bytes of cache, {where}", expected, session.kv_bytes() - before, 0)


def _model(method: Method) -> tuple[Any, Context]:
    """Return the random model as the method trains, compresses or finds it, and its context."""
    import torch

    from effbench.nn.quant.linears import pack_linears

    model = _random()
    if is_packed(method.weights):
        pack_linears(model, find(method.weights)(), torch.float32)
    generator = torch.Generator().manual_seed(0)
    place = torch.device("cpu")
    ctx = Context(0, place, torch.float32, generator, lambda name: _random(), total_steps=DRAWS)
    ctx.program = run_program
    if isinstance(method, Compresses):
        compress_whole(method, model, [_batch()], ctx)
        return model, ctx
    if isinstance(method, Trains):
        return begin_training(method, model, ctx).train(), ctx
    return method.prepare(model, ctx), ctx


def _random() -> Any:
    """Return the random model; its attention is made of products that torch's counter knows."""
    import torch

    from effbench.models.random import random_model

    model = random_model(SHAPE, 0, "cpu", torch.float32)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    return model


def _batch() -> Batch:
    from effbench.api.batch import make_batch

    rows = [[(7 * i + 3 * j) % SHAPE.vocab_size for j in range(TOKENS)] for i in range(ROWS)]
    batch = make_batch([(ids, ids) for ids in rows], 0)
    batch.window_tokens, batch.window_examples = batch.loss_tokens, 1
    batch.sizes = [ROWS]  # one example for a loss that compares, which others do not look at
    return batch


# -- peaks -------------------------------------------------------------------------------------


def _peaks(name: str) -> Iterator[Check]:
    """Yield the checks of the peaks of one method's run, phase by phase."""
    record = _ran(name)
    for phase, found in record.plan["phases"].items():
        if "error" in found:
            detail = (
                f"{found['measured_bytes'] / 2**20:.0f} MiB measured, of which the process had "
                f"{record.plan['base_bytes'] / 2**20:.0f} before; error beyond those "
                f"{found['own_error']:+.1%}"
            )
            yield Check(
                f"peak of {phase}, {name}", found["error"], -PEAK_BOUND, PEAK_BOUND, "", detail
            )


def _ran(name: str) -> Record:
    """Run a method on the real model, in a process of its own."""
    from effbench.runner.local import execute

    cls = registry.find("methods", name)
    own = {**cls.needs, **REAL.get(name, {})}
    words = [f"method={name}", *RUN, *(f"method.{k}={v}" for k, v in own.items())]
    with TemporaryDirectory() as folder:
        return execute(compose(cls.stage, [*words, f"run.results={folder}"]))


def _near(name: str, expected: float, found: float, bound: float) -> Check:
    """Return a check that `expected` is within `bound` of what was found, relative to it."""
    error = expected / found - 1 if found else float(expected != 0)
    return Check(name, error, -bound, bound, "", f"{expected:.6g} counted, {found:.6g} found")
