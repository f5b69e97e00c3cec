import json

import pytest
import torch
from helpers import (
    SHAPE,
    base_for,
    check_cost,
    context,
    logits,
    prepared,
    stated,
    tiny_model,
    train,
)
from peft import LoraConfig, PeftModel, get_peft_model

from effbench.api.points import UNNAMED
from effbench.api.schema import build
from effbench.api.shape import LINEARS
from effbench.methods.adapters.lora import LoRA, Rank
from effbench.methods.chain import chain_cost
from effbench.nn.adapters.lowrank import init_a, svd_truncate, truncate
from effbench.nn.adapters.peft_lora import peft_adapters
from effbench.util.errors import UserError


def trained(method, steps=4, **settings):
    model, ctx = prepared(method, **settings)
    train(method, model, ctx, steps)
    return model


def test_the_untrained_adapter_changes_nothing():
    model, _ = prepared(LoRA(rank=4))
    assert logits(model).equal(logits(tiny_model()))


def test_the_model_keeps_its_class_and_its_base():
    base = tiny_model()
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    model, ctx = prepared(LoRA(rank=4))
    assert type(model) is type(base)
    train(LoRA(rank=4), model, ctx, 3)
    after = {
        n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora" not in n
    }
    assert before.keys() == after.keys()
    assert all(before[n].equal(p) and not p.requires_grad for n, p in after.items())


def test_training_learns():
    model, ctx = prepared(LoRA(rank=4))
    losses = train(LoRA(rank=4), model, ctx, 10, same_batch=True)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_losses_as_a_plain_peft_run(dtype):
    method = LoRA(rank=4, dropout=0.1)
    model, ctx = prepared(method, dtype=dtype)
    config = LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.1, target_modules=list(LINEARS), task_type="CAUSAL_LM"
    )
    other = get_peft_model(tiny_model(dtype=dtype), config)
    start = {n: (a.weight, b.weight) for n, a, b in peft_adapters(model)}
    for name, a, b in peft_adapters(other):
        ours = start[name.removeprefix("base_model.model.")]
        a.weight.data, b.weight.data = (t.detach().clone() for t in ours)
    torch.manual_seed(5)
    ours = train(method, model, ctx, 4)
    torch.manual_seed(5)
    theirs = train(method, other.get_base_model(), context(dtype=dtype), 4)
    assert ours == theirs


def test_the_start_depends_on_seed_and_layer_alone():
    torch.manual_seed(1)
    first, _ = prepared(LoRA(rank=4))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, _ = prepared(LoRA(rank=4))
    assert torch.get_rng_state().equal(state)
    third, _ = prepared(LoRA(rank=4), seed=1)
    a, b, c = ({n: x.weight for n, x, _ in peft_adapters(m)} for m in (first, second, third))
    assert all(a[n].equal(b[n]) and not a[n].equal(c[n]) for n in a)
    assert not a["model.layers.0.self_attn.q_proj"].equal(a["model.layers.1.self_attn.q_proj"])


def test_the_start_is_kaiming_uniform():
    drawn = torch.empty(400, 50)
    init_a(drawn, 0, "layer")
    bound = 50**-0.5
    assert bound * 0.99 < drawn.abs().max() <= bound
    assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_adapters_are_float32_on_a_bfloat16_base():
    model, _ = prepared(LoRA(rank=4), dtype=torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora" not in n} == {torch.bfloat16}


@pytest.mark.parametrize("point", [UNNAMED, Rank(2)])
def test_cost_is_what_is_counted(point):
    method = LoRA(rank=8, targets=("q_proj", "down_proj"), eval_ranks=(2,))
    check_cost(method, prepared(method)[0], point)
    rank = 2 if point.name else 8
    assert stated(method, point)["trainable"] == 2 * rank * (64 + 64 + 128 + 64)


def test_plain_truncation_keeps_the_first_ranks_at_the_trained_scale():
    method = LoRA(rank=8, eval_ranks=(3, 8))
    assert method.points() == (Rank(3), Rank(8))
    model = trained(method)
    whole = logits(model)
    factors = [(a.weight.detach().clone(), b.weight.detach().clone()) for _, a, b in _all(model)]
    with method.at(model, Rank(3)):
        cut = logits(model)
    with method.at(model, Rank(8)):
        assert logits(model).equal(whole)
    for (_, a, b), (old_a, old_b) in zip(_all(model), factors, strict=True):
        assert a.weight.equal(old_a)
        assert b.weight.equal(old_b)
        a.weight.data[3:] = 0
    assert not torch.allclose(whole, cut, atol=1e-3)
    torch.testing.assert_close(logits(model), cut, atol=1e-5, rtol=0)


def test_the_same_parameters_are_back_even_after_an_error():
    method = LoRA(rank=8, eval_ranks=(3,))
    model, _ = prepared(method)
    before = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError), method.at(model, Rank(3)):
        raise RuntimeError
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(p is q for p, q in zip(before, after, strict=True))


def test_svd_truncation_is_the_best_of_its_rank():
    a, b = torch.randn(8, 40), torch.randn(30, 8)
    near_a, near_b = svd_truncate(a, b, 3)
    assert near_a.shape == (3, 40)
    assert near_b.shape == (30, 3)
    u, s, vh = torch.linalg.svd((b @ a).double())
    best = (u[:, :3] * s[:3]) @ vh[:3]
    torch.testing.assert_close((near_b @ near_a).double(), best, atol=1e-4, rtol=0)
    plain_a, plain_b = truncate(a, b, 3)
    assert (b @ a - near_b @ near_a).norm() < (b @ a - plain_b @ plain_a).norm()
    full_a, full_b = svd_truncate(a, b, 8)
    torch.testing.assert_close(full_b @ full_a, b @ a, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("truncation", ["plain", "svd"])
@pytest.mark.parametrize("point", [UNNAMED, Rank(3)])
def test_peft_loads_the_export(tmp_path, truncation, point):
    method = LoRA(rank=8, alpha=12, eval_ranks=(3,), truncation=truncation)
    model = trained(method)
    method.export(model, point, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == (3 if point.name else 8)
    assert config["lora_alpha"] / config["r"] == 12 / 8
    theirs = PeftModel.from_pretrained(base_for(method), tmp_path)
    with method.at(model, point):
        torch.testing.assert_close(logits(theirs), logits(model), atol=1e-6, rtol=0)


def test_save_and_load_give_the_same_logits(tmp_path):
    method = LoRA(rank=4)
    model = trained(method)
    method.save(model, tmp_path)
    again = method.load(base_for(method), tmp_path, context(seed=9))
    assert logits(again).equal(logits(model))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 0}, "method.rank"),
        ({"dropout": 1.0}, "method.dropout"),
        ({"targets": []}, "method.targets"),
        ({"targets": ["q_porj"]}, "q_proj"),
        ({"eval_ranks": [4, 32]}, "method.eval_ranks"),
        ({"eval_ranks": [4, 2]}, "method.eval_ranks"),
        ({"truncation": "best"}, "method.truncation"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, named):
    with pytest.raises(UserError, match=named):
        build(LoRA, settings, "method").resolve(SHAPE)


def test_a_rank_above_what_a_layer_can_have_is_refused():
    LoRA(rank=64, targets=("q_proj",)).resolve(SHAPE)
    with pytest.raises(UserError, match=r"method\.rank=33 .* k_proj"):
        LoRA(rank=33).resolve(SHAPE)


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_was_not_trained_is_refused(rank):
    with pytest.raises(ValueError, match=f"no rank {rank}"):
        chain_cost([LoRA(rank=8)], SHAPE, "float32", Rank(rank))


def _all(model):
    return list(peft_adapters(model))
