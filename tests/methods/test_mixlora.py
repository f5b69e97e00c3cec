"""MixLoRA: the authors' numbers, and what a mixture of low-rank experts promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import adamw, batch_of, context, counted, logits, prepared, stated, tiny_model, train
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from effbench.api.batch import Batch
from effbench.methods.adapters.lora import LoRA
from effbench.methods.experts.mixlora import MixLoRA
from effbench.nn.adapters.mixture import MixtureMLP, balance, mixtures, router_logits
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

TRUTH = Path(__file__).parents[3] / "shared" / "truth"
"""What TUDB-Labs/MixLoRA (d59d09b) and MoE-PEFT (40f8cb7) compute."""
METHOD = MixLoRA(rank=2)


def shaken(model: Any, seed: int = 3) -> Any:
    """Return the model with updates that do something and a router that chooses."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mixture in mixtures(model):
            mixture.router.weight.normal_(generator=draws)
            for part in (mixture.gate_proj, mixture.up_proj, mixture.down_proj):
                part.lora_B.normal_(0, 0.3, generator=draws)
    return model


def naive(mixture: MixtureMLP, x: torch.Tensor) -> torch.Tensor:
    """Return the mixture token by token and expert by expert, with weights of their own."""
    out = torch.zeros_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        p = (mixture.router.weight @ x[place]).softmax(-1)
        top, chosen = p.topk(mixture.top_k)
        for weight, e in zip(top / top.sum(), chosen.tolist(), strict=True):
            gate, up, down = (
                part.base.weight + mixture.scale * part.lora_B[e] @ part.lora_A[e]
                for part in (mixture.gate_proj, mixture.up_proj, mixture.down_proj)
            )
            out[place] += weight * (down @ (nn.functional.silu(gate @ x[place]) * (up @ x[place])))
    return out


# -- the authors' numbers ----------------------------------------------------------------------


@pytest.mark.skipif(not TRUTH.is_dir(), reason="the authors' numbers are not there")
@pytest.mark.parametrize(
    ("name", "rank", "scale"), [("a", 3, 2.0), ("b", 2, 8 / 2**0.5), ("c", 2, 2.0)]
)
def test_the_mixture_is_that_of_the_authors(name: str, rank: int, scale: float) -> None:
    numbers = np.load(TRUTH / "mixlora_forward.npz")
    read = {
        k.removeprefix(f"{name}_"): torch.from_numpy(numbers[k])
        for k in numbers
        if k.startswith(f"{name}_")
    }
    experts, hidden = read["gate"].shape
    config = type("Config", (), {"hidden_size": hidden, "mlp_bias": False, "hidden_act": "silu"})
    config.intermediate_size = len(read["gate_proj"])
    top_k = read["selected"].shape[-1]
    mixture = MixtureMLP(LlamaMLP(config()), experts, top_k, rank, scale, 0.0, 0, "mlp")
    with torch.no_grad():
        mixture.router.weight.copy_(read["gate"])
        for part in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(mixture, part)
            linear.base.weight.copy_(read[part])
            for e in range(experts):
                linear.lora_A[e] = read[f"{part}_A{e}"]
                linear.lora_B[e] = read[f"{part}_B{e}"]
        weights, chosen = mixture.route(read["x"].flatten(0, 1))
        torch.testing.assert_close(mixture(read["x"]), read["y"], atol=1e-6, rtol=1e-5)
    assert chosen.equal(read["selected"].view_as(chosen))
    theirs = read["weights"].view_as(weights).to(weights.dtype)
    torch.testing.assert_close(weights, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not TRUTH.is_dir(), reason="the authors' numbers are not there")
def test_the_balance_is_that_of_the_authors() -> None:
    numbers = np.load(TRUTH / "mixlora_aux.npz")
    found, mask = (torch.from_numpy(numbers[k]) for k in ("logits", "mask"))
    every, layers = torch.ones(len(found)), len(found) // mask.numel()
    assert float(balance(found, every, 2)) == pytest.approx(float(numbers["loss"]), rel=1e-6)
    masked = balance(found, mask.flatten().repeat(layers), 2)
    assert float(masked) == pytest.approx(float(numbers["loss_masked"]), rel=1e-6)


# -- the mixture -------------------------------------------------------------------------------


def test_untrained_it_is_the_base_for_any_routing() -> None:
    plain, _ = prepared(LoRA(rank=2))
    for seed in range(3):
        model, _ = prepared(METHOD, seed)
        with torch.no_grad():
            for mixture in mixtures(model):
                mixture.router.weight.mul_(50)
        torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-5)


def test_what_is_shared_is_computed_once_and_changes_nothing() -> None:
    model, _ = prepared(METHOD)
    for mixture in mixtures(shaken(model)):
        with torch.no_grad():
            mixture.router.weight[1] = -1e3 * torch.ones(64)  # for positive x nobody chooses it
            x = torch.rand(2, 5, 64, generator=torch.Generator().manual_seed(1))
            assert 1 not in mixture.route(x.flatten(0, 1))[1]
            torch.testing.assert_close(mixture(x), naive(mixture, x), atol=1e-5, rtol=1e-4)


def test_each_token_has_k_experts_whose_weights_are_one() -> None:
    model, _ = prepared(replace(METHOD, top_k=3))
    for mixture in mixtures(shaken(model)):
        weights, chosen = mixture.route(torch.randn(50, 64))
        assert all(len(set(row)) == 3 for row in chosen.tolist())
        torch.testing.assert_close(weights.sum(-1), torch.ones(50))


def test_an_expert_without_tokens_has_gradients_all_the_same() -> None:
    model, ctx = prepared(METHOD)
    with torch.no_grad():
        for mixture in mixtures(shaken(model)):
            mixture.router.weight.zero_()  # ties: always the same two
    METHOD.loss(model, batch_of(), ctx).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_one_expert_is_lora_on_all_linears() -> None:
    method = MixLoRA(experts=1, top_k=1, rank=4, alpha=16.0, balance=0.0)
    runs = []
    for one in (method, LoRA(rank=4, alpha=16.0)):
        model, ctx = prepared(one)
        runs.append((train(one, model, ctx, 4, adamw(model)), logits(model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    torch.testing.assert_close(runs[0][1], runs[1][1], atol=1e-4, rtol=1e-3)


# -- the balance -------------------------------------------------------------------------------


def test_even_use_costs_k_and_uneven_use_more() -> None:
    even = torch.zeros(8, 4)
    assert float(balance(even, torch.ones(8), 2)) == pytest.approx(2)
    uneven = even.clone()
    uneven[:, :2] = 5.0
    assert float(balance(uneven, torch.ones(8), 2)) > 3.5


def test_the_balance_reaches_the_router_alone_and_not_the_loss() -> None:
    model, ctx = prepared(METHOD)
    heavy = replace(METHOD, balance=1e3)
    grads = []
    for method in (heavy, replace(METHOD, balance=0.0)):
        model.zero_grad()
        shaken(model)
        loss = method.loss(model, batch_of(), ctx)
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        grads[-1]["loss"] = loss.detach()
    assert grads[0].pop("loss") == grads[1].pop("loss")
    last = len(mixtures(model)) - 1  # below it, states depend on nothing that the last router does
    for name, gradient in grads[0].items():
        if name == f"model.layers.{last}.mlp.router.weight":
            assert not torch.allclose(gradient, grads[1][name], atol=1e-4)
        elif f"layers.{last}.mlp" in name:
            torch.testing.assert_close(gradient, grads[1][name])
    assert ctx.evolution.metrics()["expert_balance"] > METHOD.top_k


def test_padding_changes_no_balance() -> None:
    model, ctx = prepared(METHOD)
    shaken(model)
    batch = batch_of(rows=1)
    short = Batch(*(t[:, :10] for t in (batch.input_ids, batch.attention_mask, batch.labels)), [0])
    short.window_tokens = batch.window_tokens = 10
    for one in (batch, short):
        METHOD.loss(model, one, ctx)
    assert ctx.evolution.seen[0] == pytest.approx(ctx.evolution.seen[1], rel=1e-5)


def test_the_term_evens_the_use_out() -> None:
    """By itself: on tokens that stay the same, the use of a lopsided router becomes even."""
    draws = torch.Generator().manual_seed(2)
    x, router = torch.randn(64, 16, generator=draws), torch.randn(4, 16, generator=draws)
    router[0] += x.mean(0) + 0.5
    router.requires_grad_(True)
    optimizer, seen = torch.optim.Adam([router], lr=0.05), []
    for _ in range(100):
        optimizer.zero_grad()
        term = balance(x @ router.T, torch.ones(64), 2)
        term.backward()
        optimizer.step()
        seen.append(float(term.detach()))
    assert seen[-1] < 2.01 < 2.05 < seen[0]


# -- artefact, costs, settings -----------------------------------------------------------------


def test_the_base_stays_and_the_artefact_is_the_rest(tmp_path: Path) -> None:
    model, ctx = prepared(METHOD)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    train(METHOD, model, ctx, 3, adamw(model))
    assert all(p.equal(frozen[n]) for n, p in model.named_parameters() if n in frozen)
    METHOD.save(model, tmp_path)
    loaded = METHOD.load(tiny_model(), tmp_path, context(seed=9))
    assert logits(loaded).equal(logits(model))


def test_nobody_collects_after_a_loss() -> None:
    model, ctx = prepared(METHOD)
    with pytest.raises(ZeroDivisionError), router_logits(model):
        raise ZeroDivisionError
    METHOD.loss(model, batch_of(), ctx)
    assert all(m.seen is None for m in mixtures(model))


def test_cost_is_what_is_counted() -> None:
    model, _ = prepared(METHOD)
    assert stated(METHOD) == counted(model)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"top_k=5 is more than method\.experts=4"):
        MixLoRA(top_k=5)


def test_steps_say_the_balance(bench: Bench) -> None:
    from effbench.results.events import read_events

    job = bench.job("train", "method=mixlora", "train.max_steps=2", "evaluator=[]")
    bench.go(job)
    events = read_events(bench.folder(job).path / "events.jsonl", "step")
    assert all(e["expert_balance"] >= 1 for e in events)
