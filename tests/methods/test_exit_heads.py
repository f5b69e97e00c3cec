"""Exits with heads of their own: what trains, what a depth is, and what it costs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    SHAPE,
    adamw,
    batch_of,
    context,
    counted,
    flops,
    generator,
    stated,
    tiny_model,
    train,
)
from transformers import AutoModelForCausalLM

from effbench.api.cost import cost_of
from effbench.api.points import UNNAMED
from effbench.api.schema import build
from effbench.methods.adapters.lora import LoRA
from effbench.methods.base import Method
from effbench.methods.chain import chain_cost, shape_of
from effbench.methods.depth.exit_heads import ExitHeads
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.depth.points import Depth, Mixed
from effbench.methods.depth.sorted_lora import SortedLoRA
from effbench.methods.full import Full
from effbench.nn.decode.session import CachedSession, greedy
from effbench.nn.depth.exit_heads import own_head
from effbench.nn.depth.submodel import exit_states
from effbench.nn.quant.linears import storage_bytes
from effbench.util.errors import UserError

DEEP = replace(SHAPE, num_layers=5)
TRUNKS = pytest.mark.parametrize("trunk", ["frozen", "trained"])
TIED = pytest.mark.parametrize("tied", [False, True])
IDS = batch_of().input_ids


def base(tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = tiny_model(dtype=dtype, shape=DEEP)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def ready(tied: bool = False, **settings: Any) -> tuple[Any, Any, Any]:
    method = ExitHeads(**{"depths": (2, 3, 5), **settings}).resolve(DEEP)
    ctx = context()
    return method, method.prepare(base(tied), ctx), ctx


def moved(**settings: Any) -> tuple[Any, Any, Any]:
    """Return method and model with every exit moved away from where it started."""
    method, model, ctx = ready(**settings)
    for p in model.exit_heads.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator(3)))
    return method, model.eval().requires_grad_(False), ctx


@TIED
def test_untrained_every_exit_is_the_bases(tied: bool) -> None:
    method, model, _ = ready(tied)
    stock = base(tied).eval()
    for n in (2, 3, 5):
        stock.config.num_hidden_layers = n
        with torch.no_grad(), method.at(model.eval(), Depth(n)):
            assert method.logits(model, batch_of()).equal(Method().logits(stock, batch_of()))


@TIED
def test_an_exit_reads_with_its_own_norm_and_head(tied: bool) -> None:
    method, model, _ = moved(tied=tied)
    batch = batch_of()
    states = exit_states(model, (2, 3), batch.input_ids, batch.attention_mask)
    plain = Method().logits(model, batch)
    for n in (2, 3):
        own: Any = own_head(model, n)
        expected = own.head(own.norm(states[n]))
        with method.at(model, Depth(n)):
            assert method.logits(model, batch).equal(expected)
            assert not hasattr(model, "exit_heads")
            nll = method.token_nll(model, batch)
        targets = batch.labels[:, 1:, None].clamp(min=0)
        picked = expected[:, :-1].log_softmax(-1).gather(-1, targets)[..., 0]
        real = batch.labels[:, 1:] != -100
        torch.testing.assert_close(nll[real], -picked[real], atol=1e-5, rtol=1e-5)
    with method.at(model, Depth(5)):
        assert method.logits(model, batch).equal(plain)
    assert model.exit_heads["2"] is own_head(model, 2)


@TRUNKS
def test_the_loss_is_the_mean_over_its_exits(trunk: str) -> None:
    method, model, ctx = ready(trunk=trunk)
    loss = method.loss(model, batch_of(), ctx)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    depths = (2, 3) if trunk == "frozen" else (2, 3, 5)
    singles = []
    for n in depths:
        with method.at(model, Depth(n)):
            single = Full().loss(model, batch_of(), ctx)
        (single / len(depths)).backward()
        singles.append(single.item())
    assert loss.item() == pytest.approx(sum(singles) / len(depths), rel=1e-6)
    for name, p in model.named_parameters():
        assert (name in ours) == (p.grad is not None), name
        if name in ours:
            torch.testing.assert_close(ours[name], p.grad, atol=1e-6, rtol=1e-5)


@TRUNKS
def test_every_exit_learns_and_a_frozen_trunk_stays(trunk: str) -> None:
    method, model, ctx = ready(trunk=trunk)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = train(method, model, ctx, 9, adamw(model, weight_decay=0.1), same_batch=True)
    assert losses[-1] < losses[0] - 0.3
    for name, p in model.named_parameters():
        still = trunk == "frozen" and not name.startswith("exit_heads")
        assert p.equal(before[name]) == still, name


@TIED
@TRUNKS
def test_cost_is_what_is_counted(trunk: str, tied: bool) -> None:
    shape = replace(DEEP, tied=tied)
    method, model, _ = ready(tied, trunk=trunk, decoding=("exit", "speculative"))
    for point in (*method.points(), UNNAMED):
        with method.at(model, point):
            assert stated(method, point, shape) == counted(model), point
            if isinstance(point, Depth):
                assert chain_cost([method], shape, "float32", point).flops_per_token == flops(model)


def test_exits_are_in_float32_while_they_learn_and_short_afterwards(tmp_path: Any) -> None:
    method, ctx = ExitHeads(depths=(2, 5)), context(dtype=torch.bfloat16)
    model = method.prepare(base(dtype=torch.bfloat16), ctx)
    assert cost_of(
        shape_of(method, DEEP, phase="train"), "bfloat16"
    ).resident_bytes == storage_bytes(model)
    train(method, model, ctx, 2)
    model = method.finalize(model, ctx)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert chain_cost([method], DEEP, "bfloat16").resident_bytes == storage_bytes(model)
    method.save(model, tmp_path)
    again = method.load(base(dtype=torch.bfloat16), tmp_path, context(dtype=torch.bfloat16))
    for point in method.points():
        found = []
        for one in (model.eval().requires_grad_(False), again.eval().requires_grad_(False)):
            with method.at(one, point):
                found.append(method.logits(one, batch_of()))
        assert found[0].equal(found[1])


# -- decoding ----------------------------------------------------------------------------------


def test_leaving_early_reads_with_the_exits_own_heads() -> None:
    method, model, _ = moved(decoding=("exit",), thresholds=(0.0, 0.0))
    with method.at(model, Depth(2)):
        expected = greedy(method.session(model), IDS[:1], 12)
    with method.at(model, Mixed("exit")):
        session = method.session(model, Mixed("exit"))
        assert greedy(session, IDS[:1], 12).equal(expected)
        assert session.counts()["exit_depth"] == 2
        whole = method.logits(model, batch_of(rows=1), Mixed("exit"))
    with method.at(model, Depth(2)):
        torch.testing.assert_close(method.logits(model, batch_of(rows=1)), whole)


def test_speculation_with_an_own_head_loses_nothing() -> None:
    method, model, _ = moved(decoding=("speculative",))
    with method.at(model, Mixed("speculative")):
        session = method.session(model, Mixed("speculative"))
        found = greedy(session, IDS[:1], 20)
        drafts = session.staged.logits(0, torch.ones(1, 1, DEEP.hidden_size))
    assert found.equal(greedy(CachedSession(model), IDS[:1], 20))
    own: Any = own_head(model, 2)
    torch.testing.assert_close(drafts, own(torch.ones(1, 1, DEEP.hidden_size)))


@TIED
def test_transformers_loads_an_exported_exit(tmp_path: Any, tied: bool) -> None:
    method, model, _ = moved(tied=tied)
    model.config.tie_word_embeddings = tied
    method.export(model, Depth(3), tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval().requires_grad_(False)
    with method.at(model, Depth(3)):
        assert Method().logits(stock, batch_of()).equal(method.logits(model, batch_of()))


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"depths": [5]}, r"no exit below layer 5"),
        ({"depths": [3, 2]}, r"method\.depths"),
        ({"depths": [2, 6]}, r"depth 6"),
        ({"eval_depths": [4]}, r"method\.eval_depths names depth 4"),
        ({"decoding": ["speculative"], "draft_depth": 4}, r"method\.draft_depth names depth 4"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        build(ExitHeads, {"depths": [2, 3, 5], **settings}, "method").resolve(DEEP)


def test_a_depth_without_an_exit_is_no_point() -> None:
    method, model, _ = ready()
    with pytest.raises(ValueError, match="no exit at depth 4"), method.at(model, Depth(4)):
        pass


def test_it_goes_on_from_adapters_with_a_frozen_trunk_alone() -> None:
    ExitHeads().check_start([LoRA()])
    with pytest.raises(UserError, match=r"method\.trunk=trained needs dense"):
        ExitHeads(trunk="trained").check_start([LoRA()])
    for method in (LoRADrop(), SortedLoRA()):
        with pytest.raises(UserError, match="in a way of its own"):
            ExitHeads().check_start([method])
    ctx = context()
    model = ExitHeads(depths=(2, 5)).prepare(LoRA(rank=4).prepare(base(), ctx), ctx)
    chain = [LoRA(rank=4), ExitHeads(depths=(2, 5))]
    with chain[1].at(model, Depth(2)):
        found = chain_cost(chain, DEEP, "float32", Depth(2))
        assert (found.params, found.resident_bytes) == (
            counted(model)["params"],
            counted(model)["resident_bytes"],
        )
