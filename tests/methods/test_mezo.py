"""MeZO: the authors' numbers, and the promises of training without gradients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SHAPE, adamw, batch_of, begun, prepared, tiny_model, train, window
from torch.utils._python_dispatch import TorchDispatchMode

from effbench.api.footprint import training_of
from effbench.methods.adapters.lora import LoRA
from effbench.methods.base import Method
from effbench.methods.chain import shape_of
from effbench.methods.zeroth_order.mezo import MeZO
from effbench.nn.zeroth_order.two_point import Estimate, Step, descend, directions, estimate
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

ADAPTERS = MeZO(rank=4).resolve(SHAPE)
FULL = MeZO(trains="full").resolve(SHAPE)


def steps_of(tensors: list[torch.Tensor], rate: float = 0.0, decay: float = 0.0) -> list[Step]:
    return [Step(t, rate, decay) for t in tensors]


# -- the authors' numbers ----------------------------------------------------------------------


AUTHORS = Path(__file__).parents[3] / "shared" / "truth" / "mezo.npz"
"""What princeton-nlp/MeZO (552cb1b, large_models/trainer.py) computes for `net`."""
SHAPES = ((5, 6), (5,), (5,), (5,), (5,), (3, 5))


def net(theta: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the loss of head(norm(tanh(layer_norm(fc x)))), both norms being layer norms."""
    weight, bias, gain, shift, norm, head = theta
    hidden = torch.nn.functional.layer_norm(x @ weight.T + bias, (5,), gain, shift).tanh()
    hidden = torch.nn.functional.layer_norm(hidden, (5,), norm)
    return float(torch.nn.functional.cross_entropy(hidden @ head.T, y))


@pytest.mark.skipif(not AUTHORS.is_file(), reason="the authors' numbers are not there")
@pytest.mark.parametrize(("name", "epsilon", "decay"), [("a", 1e-3, 0.0), ("b", 1e-2, 0.1)])
def test_steps_are_those_of_the_authors(name: str, epsilon: float, decay: float) -> None:
    numbers = {k: v for k, v in np.load(AUTHORS).items() if k.startswith(f"{name}_")}
    read = {k.removeprefix(f"{name}_"): torch.from_numpy(v) for k, v in numbers.items()}
    sizes = [int(np.prod(s)) for s in SHAPES]
    theta = [t.reshape(s).clone() for t, s in zip(read["theta0"].split(sizes), SHAPES, strict=True)]
    for number, seed in enumerate(read["seeds"].tolist()):
        rate = float(read["lr"][number])
        # They decay all but biases and what is called layer_norm: the last norm is decayed.
        steps = [Step(t, rate, decay * (i in (0, 4, 5))) for i, t in enumerate(theta)]
        found = estimate(steps, lambda: net(theta, read["x"], read["y"]), seed, epsilon)
        assert found.gradient == pytest.approx(float(read["g"][number]), rel=2e-3)
        descend(steps, Estimate(seed, float(read["g"][number]), 0.0))
        torch.testing.assert_close(
            torch.cat([t.flatten() for t in theta]), read["theta"][number], atol=1e-6, rtol=1e-5
        )


def test_the_directions_are_those_of_the_global_generator() -> None:
    """MeZO seeds torch's own generator and draws with `torch.normal`, tensor by tensor."""
    tensors = [torch.zeros(5, 6), torch.zeros(5), torch.zeros(3, 5)]
    torch.manual_seed(77)
    theirs = [torch.normal(mean=0, std=1, size=t.shape, dtype=t.dtype) for t in tensors]
    ours = [z for _, z in directions(steps_of(tensors), 77)]
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


# -- the estimate ------------------------------------------------------------------------------


def test_the_estimate_is_the_slope_along_z() -> None:
    model, batch = tiny_model().double().eval(), batch_of()
    trained = list(model.parameters())

    def loss() -> torch.Tensor:  # in float64 to its end
        logits = Method().logits(model, batch)[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten())

    with torch.no_grad():
        found = estimate(steps_of(trained), lambda: float(loss()), 5, 1e-4)
    loss().backward()
    slope = sum(float((z * s.tensor.grad).sum()) for s, z in directions(steps_of(trained), 5))
    assert found.gradient == pytest.approx(slope, rel=1e-3)


def test_the_tensors_come_back() -> None:
    model = tiny_model().eval()
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        estimate(steps_of(list(model.parameters())), lambda: 0.0, 3, 1e-3)
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, atol=1e-6, rtol=0)


def test_a_step_goes_down_the_slope_and_decays() -> None:
    start = torch.randn(4, 3, dtype=torch.float64)
    tensor = start.clone()
    descend([Step(tensor, 0.1, 0.5)], Estimate(9, 2.0, 0.0))
    [(_, z)] = directions([Step(start, 0, 0)], 9)
    torch.testing.assert_close(tensor, start - 0.1 * (2.0 * z + 0.5 * start))


def test_many_steps_find_a_minimum() -> None:
    target = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.zeros(6, dtype=torch.float64)
    for seed in range(400):
        slope = estimate(
            steps_of([found]), lambda: float((found - target).square().sum()), seed, 1e-3
        )
        descend([Step(found, 0.05, 0.0)], slope)
    assert (found - target).norm() < 0.05 * target.norm()


# -- a step ------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made inside the context."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


@pytest.mark.parametrize("method", [ADAPTERS, FULL])
def test_there_are_no_gradients_no_moments_and_one_tensor_of_noise(method: MeZO) -> None:
    model, ctx = prepared(method)
    optimizer = adamw(model)
    with Largest() as largest:
        losses = train(method, model, ctx, 2, optimizer)
    assert all(np.isfinite(losses))
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    logits = 2 * 12 * SHAPE.vocab_size
    assert largest.size <= max(logits, *(p.numel() for p in model.parameters()))


def test_what_is_frozen_stays_and_tied_weights_move_once() -> None:
    model, ctx = prepared(ADAPTERS)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(ADAPTERS, model, ctx, 2, torch.optim.SGD(_trained(model), lr=1e-3))
    for name, p in model.named_parameters():
        assert p.equal(before[name]) != p.requires_grad, name
    tied = tiny_model(shape=replace(SHAPE, tied=True))
    tied = begun(FULL, tied, ctx)
    assert (
        len({id(p) for p in _trained(tied)}) == len(_trained(tied)) == len(list(tied.parameters()))
    )


def test_a_run_is_replayed_from_its_events() -> None:
    model, ctx = prepared(ADAPTERS)
    again, _ = prepared(ADAPTERS)
    optimizer, seen = torch.optim.SGD(_trained(model), lr=1e-2), []
    for _ in range(4):
        train(ADAPTERS, model, ctx, 1, optimizer)
        seen.append(json.loads(json.dumps(ctx.evolution.metrics())))
    with torch.no_grad():
        for event in seen:  # perturbed and restored, for its rounding, and then moved
            steps = steps_of(_trained(again), rate=1e-2)
            estimate(steps, lambda: 0.0, int(event["seed"]), 1e-2)
            descend(steps, Estimate(int(event["seed"]), event["projected_gradient"], 0.0))
    for p, q in zip(_trained(model), _trained(again), strict=True):
        assert p.equal(q)


def test_several_perturbations_are_a_mean_at_one_place() -> None:
    method = replace(ADAPTERS, perturbations=2)
    model, ctx = prepared(method)
    train(method, model, ctx, 1, torch.optim.SGD(_trained(model), lr=1e-2))
    event = ctx.evolution.metrics()
    assert event.keys() == {"seed", "projected_gradient", "seed_2", "projected_gradient_2"}
    again, other = prepared(method)
    batches, steps = window(0), steps_of(_trained(again), rate=5e-3)

    def loss() -> float:
        return sum(float(method.loss(again, b, other)) for b in batches)

    again.eval()
    with torch.no_grad():
        found = [estimate(steps, loss, int(event[f"seed{end}"]), 1e-2) for end in ("", "_2")]
        for slope in found:
            descend(steps, slope)
    assert found[1].gradient == event["projected_gradient_2"]
    assert all(p.equal(q) for p, q in zip(_trained(model), _trained(again), strict=True))


def test_dropout_is_off_while_it_is_estimated() -> None:
    method = MeZO(rank=4, dropout=0.9).resolve(SHAPE)
    runs = []
    for one in (method, ADAPTERS):
        model, ctx = prepared(one)
        runs.append(train(one, model, ctx, 3, torch.optim.SGD(_trained(model), lr=1e-2)))
        assert model.training
    assert runs[0] == runs[1]


def _trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# -- settings and costs ------------------------------------------------------------------------


def test_epsilon_follows_what_trains() -> None:
    assert (ADAPTERS.epsilon, FULL.epsilon) == (1e-2, 1e-3)
    assert MeZO(epsilon=0.5).resolve(SHAPE).epsilon == 0.5
    with pytest.raises(UserError, match="eval_ranks cuts adapters"):
        MeZO(trains="full", eval_ranks=(2,)).resolve(SHAPE)


def test_a_step_keeps_nothing_for_a_backward_pass() -> None:
    mezo, lora = (
        training_of(shape_of(m, SHAPE, phase="train"), "float32") for m in (ADAPTERS, LoRA(rank=4))
    )
    assert lora.layers > 0 and lora.gradient > 0
    assert (mezo.layers, mezo.gradient, mezo.forwards) == (0, 0, 2)
    largest = max(p.numel() for p in _trained(prepared(ADAPTERS)[0]))
    assert mezo.noise == largest


def test_the_record_has_no_bytes_of_gradients_and_moments(bench: Bench) -> None:
    record = bench.run("train", "method=mezo", "train.max_steps=3", "evaluator=[]")
    found = {m.name: m.value for m in record.metrics}
    assert (found["gradient_bytes"], found["optimizer_bytes"]) == (0, 0)
    assert found["trainable_bytes"] > 0
    assert found["train_layer_forwards"] >= 2 * 2 * found["train_tokens"]  # two passes, two layers
