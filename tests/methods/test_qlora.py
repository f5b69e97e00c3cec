import pytest
import torch
from helpers import (
    SHAPE,
    adamw,
    base_for,
    batch_of,
    context,
    counted,
    logits,
    prepared,
    stated,
    storage_hash,
    train,
)
from peft import PeftModel

from effbench.methods.adapters.lora import LoRA, Rank
from effbench.methods.adapters.qlora import QLoRA
from effbench.methods.chain import chain_cost
from effbench.nn.adapters.peft_lora import peft_adapters
from effbench.nn.quant.linears import NF4Linear


def test_the_base_is_nf4_and_the_adapters_start_as_those_of_lora():
    quantised, _ = prepared(QLoRA(rank=4))
    dense, _ = prepared(LoRA(rank=4))
    assert sum(isinstance(m, NF4Linear) for m in quantised.modules()) == 14
    starts = [{n: a.weight for n, a, _ in peft_adapters(m)} for m in (quantised, dense)]
    assert starts[0].keys() == starts[1].keys()
    assert all(starts[0][n].equal(starts[1][n]) for n in starts[0])


def test_the_untrained_adapter_changes_nothing():
    model, _ = prepared(QLoRA(rank=4))
    assert logits(model).equal(logits(base_for(QLoRA())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_after_an_evaluation(dtype):
    # Some 4-bit layers repack themselves for inference at the first forward pass in eval mode and
    # pass no gradients on from then: a run that validates before it trains would learn nothing.
    method = QLoRA(rank=4)
    model, ctx = prepared(method, dtype=dtype)
    model.eval()
    before = method.loss(model, batch_of(), ctx).item()
    logits(model)
    train(method, model.train(), ctx, 1, adamw(model), same_batch=True)
    for name, _, b in peft_adapters(model):
        assert b.weight.grad is not None, name
        assert b.weight.grad.abs().max() > 0, name
    model.eval()
    method.loss(model, batch_of(), ctx)
    train(method, model.train(), ctx, 9, same_batch=True)
    assert method.loss(model.eval(), batch_of(), ctx).item() < before - 0.1


def test_the_base_is_never_touched():
    method = QLoRA(rank=4)
    model, ctx = prepared(method)
    before = storage_hash(model)
    train(method, model, ctx, 3)
    logits(model)
    assert storage_hash(model) == before
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_cost_is_what_is_counted():
    method = QLoRA(rank=4, targets=("v_proj", "up_proj"))
    model, _ = prepared(method)
    assert stated(method) == counted(model)
    assert chain_cost([method], SHAPE, "float32").saving == "physical"


def test_peft_loads_the_export_on_the_quantised_base(tmp_path):
    method = QLoRA(rank=8, eval_ranks=(2,), truncation="svd")
    model, ctx = prepared(method)
    train(method, model, ctx, 3)
    method.export(model, Rank(2), tmp_path)
    theirs = PeftModel.from_pretrained(base_for(method), tmp_path)
    with method.at(model, Rank(2)):
        torch.testing.assert_close(logits(theirs), logits(model), atol=1e-6, rtol=0)


def test_save_and_load_give_the_same_logits(tmp_path):
    method = QLoRA(rank=4)
    model, ctx = prepared(method)
    train(method, model, ctx, 2)
    method.save(model, tmp_path)
    again = method.load(base_for(method), tmp_path, context(seed=9))
    assert logits(again).equal(logits(model))


def test_a_finished_run_is_cut_in_both_ways(bench):
    words = ["dataset.limit.test=12", "hardware.device=cpu", "hardware.dtype=float32"]
    run = bench.run("train", "method=qlora", "method.rank=4", "train.max_steps=4", *words)
    ranks = ["method.eval_ranks=[1,2,4]", *words]
    cut = {
        how: bench.run("eval", f"from={run.key}", f"method.truncation={how}", *ranks)
        for how in ("plain", "svd")
    }
    assert len({run.key, *(record.key for record in cut.values())}) == 3
    found = {
        how: {m.point: m.value for m in record.metrics if m.name == "loss"}
        for how, record in cut.items()
    }
    (whole,) = [m.value for m in run.metrics if m.name == "loss"]
    assert found["plain"]["r4"] == found["svd"]["r4"] == whole
    assert found["plain"].keys() == {"r1", "r2", "r4"}
    assert found["plain"]["r1"] != found["svd"]["r1"]
    assert {o.ids for record in (run, *cut.values()) for o in record.outcomes} == {
        run.outcomes[0].ids
    }
