"""The invariants of the method, one test each, in the order of its specification."""

import subprocess
import sys

import pytest
import torch
from helpers import (
    SHAPE,
    adamw,
    base_for,
    batch_of,
    counted,
    generator,
    logits,
    prepared,
    stated,
    storage_hash,
    train,
)
from peft import PeftModel

from effbench.api.shape import Shape
from effbench.methods.adapters.dylora import DyLoRA
from effbench.methods.adapters.lora import Rank
from effbench.methods.adapters.qdylora import QDyLoRA
from effbench.methods.adapters.qlora import QLoRA
from effbench.methods.chain import chain_cost
from effbench.nn.adapters.lowrank import control_of, low_rank_layers
from effbench.nn.quant.formats.nf4 import NF4Format
from effbench.nn.quant.linears import NF4Linear, pack_linears, storage_bytes
from effbench.nn.quant.nf4 import nf4_bytes

SMOLLM2 = Shape(576, 1536, 30, 9, 3, 64, 49152, tied=True)
LLAMA_7B = Shape(4096, 11008, 32, 32, 32, 128, 32000)


def trained(method, steps=6):
    model, ctx = prepared(method)
    train(method, model, ctx, steps)
    return model, ctx


def test_1_untrained_it_is_the_quantised_base_at_every_rank():
    method = QDyLoRA(rank=6)
    expected = logits(base_for(method))
    model, _ = prepared(method)
    for rank in range(1, 7):
        with method.at(model, Rank(rank)):
            assert logits(model).equal(expected)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_2_a_slice_is_the_exported_adapter(tmp_path, rank):
    method = QDyLoRA(rank=8, alpha=12)
    model, _ = trained(method)
    method.export(model, Rank(rank), tmp_path)
    theirs = PeftModel.from_pretrained(base_for(method), tmp_path)
    assert theirs.peft_config["default"].r == rank
    assert theirs.peft_config["default"].lora_alpha == 12
    assert not theirs.peft_config["default"].use_rslora
    with method.at(model, Rank(rank)):
        ours = logits(model)
        torch.testing.assert_close(logits(theirs), ours, atol=1e-6, rtol=0)
    assert not torch.allclose(ours, logits(base_for(method)), atol=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_2_a_slice_gives_the_loss_that_training_saw(tmp_path, rank):
    method = QDyLoRA(rank=8, alpha=12)
    model, ctx = trained(method)
    control_of(model.train()).active = rank
    seen = method.loss(model, batch_of(), ctx)
    method.export(model, Rank(rank), tmp_path)
    theirs = PeftModel.from_pretrained(base_for(method), tmp_path).get_base_model()
    torch.testing.assert_close(method.loss(theirs, batch_of(), ctx), seen, atol=1e-6, rtol=0)


def test_3_ranks_above_do_not_matter():
    method = QDyLoRA(rank=8)
    model, ctx = trained(method)
    with method.at(model, Rank(3)):
        before = method.loss(model, batch_of(), ctx)
        for _, layer in low_rank_layers(model):
            layer.lora_A.data[3:].normal_(generator=generator(1))
            layer.lora_B.data[:, 3:].normal_(generator=generator(2))
        assert method.loss(model, batch_of(), ctx).equal(before)
        layer.lora_B.data[:, :3].normal_(generator=generator(2))
        assert not method.loss(model, batch_of(), ctx).equal(before)


@pytest.mark.parametrize("mode", ["nested", "frozen"])
def test_4_gradients_reach_the_ranks_of_the_mode_alone(mode):
    method = QDyLoRA(rank=6, mode=mode)
    model, ctx = trained(method)
    model.zero_grad()
    with method.at(model, Rank(4)):
        method.loss(model, batch_of(), ctx).backward()
    learns = [mode == "nested"] * 3 + [True] + [False] * 2
    for _, layer in low_rank_layers(model):
        assert (layer.lora_A.grad.abs().amax(1) > 0).tolist() == learns
        assert (layer.lora_B.grad.abs().amax(0) > 0).tolist() == learns


def test_4_the_loss_is_the_same_in_both_modes():
    model, ctx = trained(QDyLoRA(rank=6))
    losses = []
    for mode in ("nested", "frozen"):
        control_of(model).mode = mode
        with QDyLoRA(rank=6).at(model, Rank(4)):
            losses.append(QDyLoRA(rank=6).loss(model, batch_of(), ctx))
    assert losses[0].equal(losses[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_5_drawing_the_highest_rank_alone_is_qlora(dtype):
    losses = []
    for method in (QDyLoRA(rank=4, ranks=(4,), dropout=0.1), QLoRA(rank=4, dropout=0.1)):
        model, ctx = prepared(method, seed=2, dtype=dtype)
        torch.manual_seed(5)
        losses.append(train(method, model, ctx, 5))
    assert losses[0] == losses[1]


def ranks_above(model, rank):
    layers = [layer for _, layer in low_rank_layers(model)]
    parts = [p for n in layers for p in (n.lora_A[rank:], n.lora_B[:, rank:])]
    return [p.detach().clone() for p in parts]


@pytest.mark.parametrize("protected", [True, False])
def test_6_protection_holds_ranks_that_momentum_would_move(protected):
    method = QDyLoRA(rank=8, protect_inactive=protected)
    model, ctx = prepared(method)
    optimizer = adamw(model)
    train(method, model, ctx, 4, optimizer)
    control_of(model).active = 8
    method.update(model, optimizer, [batch_of()], ctx)
    control_of(model).active = 3
    before = ranks_above(model, 3)
    method.update(model, optimizer, [batch_of()], ctx)
    after = ranks_above(model, 3)
    assert len(after) == 28
    assert all(a.equal(b) == protected for a, b in zip(after, before, strict=True))


def test_7_the_base_never_changes():
    method = QDyLoRA(rank=8)
    model, ctx = prepared(method)
    before = storage_hash(model)
    train(method, model, ctx, 4)
    logits(model)
    assert storage_hash(model) == before
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in model.named_parameters() if "lora_" in n}


def test_8_nf4_bytes_per_weight():
    layer = torch.nn.Linear(256, 128, bias=False)
    block = torch.nn.ModuleDict({"q_proj": layer})
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block])})
    pack_linears(model, NF4Format(), torch.float32, ("q_proj",))
    assert isinstance(block["q_proj"], NF4Linear)
    exact = 256 * 128 * (0.5 + 1 / 64 + 4 / (64 * 256)) + 4  # and the mean of the scales, once
    assert storage_bytes(model) == nf4_bytes(256, 128) == exact
    cost = chain_cost([QDyLoRA(rank=1)], SMOLLM2, "bfloat16")
    dense = chain_cost([DyLoRA(rank=1)], SMOLLM2, "bfloat16")
    assert cost.params == dense.params
    saved = dense.resident_bytes - cost.resident_bytes
    assert 106_168_320 * 2 - saved == 30 * sum(
        nf4_bytes(i, o) for i, o in SMOLLM2.linear_sizes().values()
    )


@pytest.mark.parametrize(
    ("shape", "per_rank"), [(SMOLLM2, 305_280), (LLAMA_7B, 2_498_560)], ids=["smollm2", "7b"]
)
def test_9_adapter_parameters(shape, per_rank):
    assert chain_cost([QDyLoRA(rank=64)], shape, "bfloat16").trainable == per_rank * 64
    assert chain_cost([QDyLoRA(rank=64)], shape, "bfloat16", Rank(1)).trainable == per_rank * 64


def test_9_cost_is_what_is_counted():
    method = QDyLoRA(rank=6)
    model, _ = prepared(method)
    for point in method.points():
        with method.at(model, point):
            assert stated(method, point) == counted(model)
    low, high = (chain_cost([method], SHAPE, "float32", p) for p in (Rank(1), Rank(6)))
    per_rank = low.trainable // 6
    assert high.flops_per_token - low.flops_per_token == 2 * 5 * per_rank
    assert high.bytes_per_token - low.bytes_per_token == 4 * 5 * per_rank


@pytest.mark.parametrize(
    ("distribution", "weight"),
    [("uniform", lambda b: 1.0), ("inverse", lambda b: 1 / b), ("proportional", float)],
)
def test_10_ten_thousand_draws_follow_the_distribution(distribution, weight):
    method = QDyLoRA(rank=8, distribution=distribution, targets=("q_proj",))
    model, ctx = prepared(method, seed=7)
    drawn = []
    for _ in range(10_000):
        ctx.evolution.before_step()
        drawn.append(control_of(model).active)
    total = sum(weight(b) for b in range(1, 9))
    for b in range(1, 9):
        p = weight(b) / total
        assert abs(drawn.count(b) / 10_000 - p) < 4 * (p * (1 - p) / 10_000) ** 0.5


def test_10_all_layers_of_a_step_have_the_drawn_rank():
    method = QDyLoRA(rank=8, ranks="powers")
    model, ctx = prepared(method)
    seen = []
    for _ in range(40):
        ctx.evolution.before_step()
        ranks = {layer.control.active for _, layer in low_rank_layers(model)}
        assert len(ranks) == 1
        seen += ranks
    assert set(seen) == {1, 2, 4, 8}


def test_it_learns_after_an_evaluation():
    method = QDyLoRA(rank=4)
    model, ctx = prepared(method)
    before = method.loss(model.eval(), batch_of(), ctx).item()
    logits(model)
    train(method, model.train(), ctx, 16, same_batch=True)
    for point in method.points():
        with method.at(model.eval(), point):
            assert method.loss(model, batch_of(), ctx).item() < before - 0.1


def test_planning_needs_no_torch():
    code = (
        "import sys\n"
        "from effbench.api.registry import find\n"
        "from effbench.api.shape import Shape\n"
        "from effbench.methods.chain import chain_cost\n"
        "shape = Shape(64, 128, 2, 4, 2, 16, 128)\n"
        "for name in 'full lora qlora dylora qdylora kd subset'.split():\n"
        "    method = find('methods', name)()\n"
        "    method.points(), chain_cost([method], shape, 'bfloat16')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
