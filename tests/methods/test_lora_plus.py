import pytest
import torch
from helpers import SHAPE, counted, logits, prepared, stated, tiny_model, train
from peft.optimizers import create_loraplus_optimizer

from effbench.api.footprint import training_of
from effbench.api.schema import build
from effbench.methods.adapters.lora import LoRA
from effbench.methods.adapters.lora_plus import LoRAPlus
from effbench.methods.chain import shape_of
from effbench.nn.adapters.peft_lora import peft_adapters
from effbench.util.errors import UserError

SMALL = [
    "dataset=arithmetic",
    "train.max_steps=3",
    "train.batch_size=2",
    "train.learning_rate=0.01",
    "+dataset.limit.train=16",
    "evaluator=[]",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
]


def optimizer(method, model, rate=1e-2):
    groups = [{"params": p, "lr": rate * share} for p, share in method.param_groups(model)]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def test_the_untrained_adapter_changes_nothing():
    model, _ = prepared(LoRAPlus(rank=4))
    assert logits(model).equal(logits(tiny_model()))


def test_the_groups_hold_every_factor_once():
    model, _ = prepared(LoRAPlus(rank=4, ratio=8))
    (first, one), (second, more) = LoRAPlus(rank=4, ratio=8).param_groups(model)
    assert (one, more) == (1.0, 8)
    pairs = [(a.weight, b.weight) for _, a, b in peft_adapters(model)]
    assert all(p is a for p, (a, _) in zip(first, pairs, strict=True))
    assert all(p is b for p, (_, b) in zip(second, pairs, strict=True))
    assert len(first) + len(second) == sum(p.requires_grad for p in model.parameters())


def test_same_weights_as_with_the_optimiser_of_peft():
    method = LoRAPlus(rank=4)
    ours, ctx = prepared(method)
    losses = train(method, ours, ctx, 4, optimizer(method, ours))
    theirs, ctx = prepared(method)
    other = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, weight_decay=0.0
    )
    assert train(method, theirs, ctx, 4, other) == losses
    trained = [p for p in ours.parameters() if p.requires_grad]
    expected = [p for p in theirs.parameters() if p.requires_grad]
    assert all(p.equal(q) for p, q in zip(trained, expected, strict=True))


def test_the_first_step_moves_b_by_the_ratio():
    method = LoRAPlus(rank=4)
    model, ctx = prepared(method)
    train(method, model, ctx, 1, optimizer(method, model, 1e-3))
    for _, _, b in peft_adapters(model):
        assert b.weight.abs().max().item() == pytest.approx(16e-3, rel=1e-2)


def test_at_ratio_1_a_run_is_that_of_lora(bench):
    made = []
    for words in (["method=lora_plus", "method.ratio=1"], ["method=lora"]):
        record = bench.run("train", *words, *SMALL)
        folder = bench.store.run(record.key)
        made.append((folder.artefact / "weights.safetensors").read_bytes())
    assert made[0] == made[1]
    record = bench.run("train", "method=lora_plus", *SMALL)
    folder = bench.store.run(record.key)
    assert (folder.artefact / "weights.safetensors").read_bytes() != made[0]


def test_cost_is_that_of_lora():
    method = LoRAPlus(rank=4)
    assert stated(method) == counted(prepared(method)[0]) == stated(LoRA(rank=4))
    assert training_of(shape_of(method, SHAPE, phase="train"), "float32") == training_of(
        shape_of(LoRA(rank=4), SHAPE, phase="train"), "float32"
    )


def test_a_ratio_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"method\.ratio"):
        build(LoRAPlus, {"ratio": 0}, "method")
