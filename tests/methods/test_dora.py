from dataclasses import replace

import pytest
import torch
from helpers import (
    SHAPE,
    base_for,
    batch_of,
    context,
    counted,
    flops,
    logits,
    prepared,
    stated,
    storage_hash,
    tiny_model,
    train,
)
from peft import LoraConfig, PeftModel, inject_adapter_in_model

from effbench.api.points import UNNAMED
from effbench.api.shape import LINEARS
from effbench.methods.adapters.dora import DoRA
from effbench.methods.adapters.lora import LoRA, Rank
from effbench.methods.chain import chain_cost
from effbench.methods.full import Full
from effbench.nn.adapters.dora import DoRALinear, dora_layers
from effbench.nn.adapters.peft_lora import peft_adapters
from effbench.nn.quant.linears import PackedLinear


def trained(method, steps=4, **settings):
    model, ctx = prepared(method, **settings)
    train(method, model, ctx, steps)
    return model


def weight_of(layer):
    """Return the weight that a layer stands for, by the formula of the paper, in float64."""
    a, b = layer.lora_A.weight.double(), layer.lora_B.weight.double()
    v = layer.base.weight.double() + layer.scale * b @ a
    return layer.lora_magnitude.double()[:, None] * v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_untrained_adapter_changes_nothing(dtype):
    method = DoRA(rank=4)
    model, _ = prepared(method, dtype=dtype)
    expected = logits(tiny_model(dtype=dtype))
    assert logits(model).equal(expected)
    with method.at(model, UNNAMED):
        assert logits(model).equal(expected)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_it_starts_as_lora_does_and_draws_nothing():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model, _ = prepared(DoRA(rank=4))
    assert torch.get_rng_state().equal(state)
    start = {n: layer.lora_A.weight for n, layer in dora_layers(model)}
    expected = {n: a.weight for n, a, _ in peft_adapters(prepared(LoRA(rank=4))[0])}
    assert start.keys() == expected.keys()
    assert all(start[n].equal(expected[n]) for n in start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_losses_and_weights_as_peft(dtype):
    method = DoRA(rank=4)
    model, ctx = prepared(method, dtype=dtype)
    config = LoraConfig(r=4, lora_alpha=16, use_dora=True, target_modules=list(LINEARS))
    theirs = inject_adapter_in_model(config, tiny_model(dtype=dtype))
    ours = dict(dora_layers(model))
    for name, a, b in peft_adapters(theirs):
        a.float().weight.data.copy_(ours[name].lora_A.weight)
        b.float()
        vector = theirs.get_submodule(name).lora_magnitude_vector["default"].float()
        vector.weight.data.copy_(ours[name].lora_magnitude)
    losses = train(method, model, ctx, 5)
    expected = train(Full(), theirs, context(dtype=dtype), 5)
    assert losses == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 2e-3)
    if dtype == torch.float32:
        for name, _, b in peft_adapters(theirs):
            vector = theirs.get_submodule(name).lora_magnitude_vector["default"].weight
            torch.testing.assert_close(ours[name].lora_magnitude, vector, atol=1e-3, rtol=0)
            torch.testing.assert_close(ours[name].lora_B.weight, b.weight, atol=1e-3, rtol=0)


def test_everything_of_it_learns_and_the_base_does_not():
    method = DoRA(rank=4)
    model, ctx = prepared(method)
    before = storage_hash(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = train(method, model, ctx, 10, same_batch=True)
    assert losses[-1] < losses[0] - 0.1
    assert storage_hash(model) == before
    assert all("lora_" in n for n in start)
    after = dict(model.named_parameters())
    assert not any(after[n].equal(t) for n, t in start.items())


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_the_formula_and_its_norms_are_constants(bias):
    torch.manual_seed(0)
    base = torch.nn.Linear(12, 7, bias=bias).requires_grad_(False)
    layer = DoRALinear(base, 3, 0.7, 0.0, 0, "x")
    layer.lora_B.weight.data.normal_()
    layer.lora_magnitude.data.normal_()
    x = torch.randn(5, 12)
    expected = x.double() @ weight_of(layer).T + (base.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
    layer(x).sum().backward()
    gain = layer.lora_magnitude.detach() / layer.norms()
    by_hand = layer.scale * gain[:, None] * (layer.lora_A.weight @ x.sum(0))[None, :]
    torch.testing.assert_close(layer.lora_B.weight.grad, by_hand.detach())


def test_at_a_point_the_norms_are_computed_once_and_not_kept():
    method = DoRA(rank=4)
    model = trained(method)
    outside = logits(model)
    with method.at(model, UNNAMED):
        assert logits(model).equal(outside)
        more = chain_cost([method], SHAPE, "float32").flops_per_token - SHAPE.flops_per_token()
        assert flops(model.eval()) - flops(tiny_model()) == more
    model.train()
    assert all(layer.gain is None for _, layer in dora_layers(model))
    with torch.no_grad():
        for _, layer in dora_layers(model):
            layer.lora_magnitude.mul_(2)
    with method.at(model, UNNAMED):
        assert not torch.allclose(logits(model), outside)


def test_a_lower_rank_has_norms_of_its_own():
    method = DoRA(rank=8, eval_ranks=(3,))
    model = trained(method)
    whole = logits(model)
    with method.at(model, Rank(3)):
        cut = logits(model)
    assert logits(model).equal(whole)
    for _, layer in dora_layers(model):
        layer.lora_B.weight.data[:, 3:] = 0
    torch.testing.assert_close(logits(model), cut, atol=1e-5, rtol=0)


@pytest.mark.parametrize("point", [UNNAMED, Rank(3)])
def test_peft_loads_the_export(tmp_path, point):
    method = DoRA(rank=8, alpha=12, eval_ranks=(3,))
    model = trained(method)
    method.export(model, point, tmp_path)
    theirs = PeftModel.from_pretrained(base_for(method), tmp_path)
    assert theirs.peft_config["default"].use_dora
    with method.at(model, point):
        torch.testing.assert_close(logits(theirs), logits(model), atol=2e-6, rtol=1e-5)
        assert not torch.allclose(logits(model), logits(tiny_model()), atol=1e-3)


@pytest.mark.parametrize("point", [UNNAMED, Rank(2)])
def test_cost_is_what_is_counted(point):
    method = DoRA(rank=8, targets=("q_proj", "down_proj"), eval_ranks=(2,))
    model, _ = prepared(method)
    with method.at(model, point):
        assert stated(method, point) == counted(model)
    rank = 2 if point.name else 8
    per_block = rank * (64 + 64 + 128 + 64) + 64 + 64
    assert stated(method, point)["trainable"] == 2 * per_block


def test_on_a_packed_base():
    method = DoRA(rank=4)
    assert method.accepts == {"dense", "packed"}
    base = tiny_model()
    for name, linear in list(base.named_modules()):
        if name.rpartition(".")[2] in LINEARS:
            base.set_submodule(name, PackedLinear.quantise(linear, 4, 32))
    expected = logits(base)
    model = method.prepare(base, context())
    assert logits(model).equal(expected)
    _, layer = next(dora_layers(model))
    norms = layer.base.dense_weight(torch.float32).norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude.detach(), norms)
    losses = train(method, model, context(), 8, same_batch=True)
    assert losses[-1] < losses[0] - 0.1


def test_save_and_load_give_the_same_logits(tmp_path):
    method = DoRA(rank=4)
    model = trained(method)
    method.save(model, tmp_path)
    again = method.load(base_for(method), tmp_path, context(seed=9))
    assert logits(again).equal(logits(model))


def test_dropout_is_on_the_input_of_a_alone():
    method = DoRA(rank=4, dropout=0.5)
    model, ctx = prepared(method)
    batch = replace(batch_of(), window_tokens=1)
    torch.manual_seed(0)
    first = method.loss(model, batch, ctx).item()
    assert first == method.loss(model, batch, ctx).item()  # B is zero: nothing to drop yet
    train(method, model, ctx, 2)
    assert method.loss(model, batch, ctx).item() != method.loss(model, batch, ctx).item()
