import json

import pytest
import torch
from helpers import SHAPE, base_for, counted, logits, prepared, stated, tiny_model, train
from peft import LoraConfig, PeftModel, inject_adapter_in_model

from effbench.api.points import UNNAMED
from effbench.api.shape import LINEARS
from effbench.methods.adapters.lora import LoRA, Rank
from effbench.methods.adapters.rslora import RankStabilisedLoRA as RsLoRA
from effbench.methods.chain import chain_cost
from effbench.nn.adapters.peft_lora import peft_adapters


def test_the_untrained_adapter_changes_nothing():
    model, _ = prepared(RsLoRA(rank=4))
    assert logits(model).equal(logits(tiny_model()))


@pytest.mark.parametrize("rank", [3, 16])
def test_it_is_lora_with_alpha_times_the_root_of_the_rank(rank):
    losses, models = [], []
    for method in (RsLoRA(rank=rank, alpha=2), LoRA(rank=rank, alpha=2 * rank**0.5)):
        model, ctx = prepared(method)
        losses.append(train(method, model, ctx, 3))
        models.append(model)
    assert losses[0] == losses[1]
    assert logits(models[0]).equal(logits(models[1]))
    plain, ctx = prepared(LoRA(rank=rank, alpha=2))
    assert train(LoRA(rank=rank, alpha=2), plain, ctx, 3) != losses[0]


def test_same_losses_as_peft():
    method = RsLoRA(rank=8)
    model, ctx = prepared(method)
    config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=list(LINEARS))
    theirs = inject_adapter_in_model(config, tiny_model())
    for (_, a, _), (_, other, _) in zip(peft_adapters(model), peft_adapters(theirs), strict=True):
        other.weight.data.copy_(a.weight)
    ours = train(method, model, ctx, 4)
    assert ours == pytest.approx(train(method, theirs, prepared(method)[1], 4), rel=1e-6)


@pytest.mark.parametrize("point", [UNNAMED, Rank(2)])
def test_peft_loads_the_export(tmp_path, point):
    method = RsLoRA(rank=8, alpha=4, eval_ranks=(2,))
    model, ctx = prepared(method)
    train(method, model, ctx, 3)
    method.export(model, point, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(4 / 8**0.5)
    theirs = PeftModel.from_pretrained(base_for(method), tmp_path)
    with method.at(model, point):
        torch.testing.assert_close(logits(theirs), logits(model), atol=1e-6, rtol=0)


def test_cost_is_that_of_lora():
    method = RsLoRA(rank=4)
    assert stated(method) == counted(prepared(method)[0]) == stated(LoRA(rank=4))
    assert chain_cost([method], SHAPE, "bfloat16") == chain_cost([LoRA(rank=4)], SHAPE, "bfloat16")
