"""AWQ: what folding leaves alone, what the search finds, and what is put and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, HeldBytes, batch_of, context, tiny_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from effbench.methods.compresses import compress_whole
from effbench.methods.quant.awq import AWQ
from effbench.methods.quant.rtn import RTN
from effbench.nn.quant import scaling
from effbench.nn.quant.calibration import Inputs

ROWS = [batch_of(seed) for seed in range(3)]
IDS = ROWS[0].input_ids


def biased() -> Any:
    """Return a Qwen2, which has biases on queries, keys and values."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=SHAPE.vocab_size,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def frozen(model: Any = None) -> Any:
    """Return a model whose norms differ from channel to channel."""
    model = (model or tiny_model()).eval().requires_grad_(False)
    draws = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = torch.exp(torch.randn(64, generator=draws)).to(norm.weight.dtype)
    return model


def compressed(method: Any, model: Any = None) -> Any:
    model = frozen(model)
    compress_whole(method, model, ROWS, context())
    return model


@pytest.mark.parametrize("make", [tiny_model, biased])
def test_folding_alone_leaves_the_logits_as_they_are(make: Any) -> None:
    model = frozen(make()).double()
    before, names = model(IDS).logits, []
    for block in model.model.layers:
        for fold in scaling.folds(block):
            source = block.get_submodule(fold.source)
            old = source.weight.clone()
            draws = torch.randn(scaling.channels_of(source), dtype=torch.float64)
            scales = scaling.divide(source, draws.exp())
            for name in fold.readers:
                reader = block.get_submodule(name)
                scaling.multiply(reader, fold.of_readers(scales, reader.in_features))
            assert not torch.equal(source.weight, old)
            names.append(fold.source.rpartition(".")[2])
    assert names == ["input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"] * 2
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-11, atol=1e-11)


def test_a_rounded_norm_is_made_up_for_by_its_readers() -> None:
    norm = torch.nn.RMSNorm(64).bfloat16().requires_grad_(False)
    old, scales = norm.weight.float(), torch.rand(64) + 0.5
    used = scaling.divide(norm, scales)
    torch.testing.assert_close(norm.weight.float() * used, old)
    assert not torch.equal(used, scales)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_never_ends_worse_than_it_begins_which_is_rtn(bits: int) -> None:
    draws = torch.Generator().manual_seed(bits)
    x = torch.randn(200, 64, generator=draws) * torch.exp(torch.randn(64, generator=draws))
    inputs = Inputs(x.T @ x, x.abs().mean(0))
    weight, method = torch.randn(32, 64, generator=draws), AWQ(bits=bits, group_size=32)
    fold = scaling.Fold("norm", ("linear",))
    scales, tried = scaling.search(fold, [weight], inputs, 64, method._as_rounded)

    def error(s: torch.Tensor) -> float:
        return float(((weight - method._as_rounded(weight * s) / s) @ x.T).square().sum())

    assert len(tried) == 20
    assert tried[0] == pytest.approx(error(torch.ones(64)), rel=1e-3)
    assert error(scales) == pytest.approx(min(tried), rel=1e-3)
    assert min(tried) < 0.9 * tried[0]
    assert torch.equal(next(scaling.candidates(inputs.magnitude)), torch.ones(64))


def test_heads_of_a_group_share_the_scales_of_their_values() -> None:
    fold = scaling.Fold("v", ("o",), head_dim=2)
    read = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])  # heads 0 and 1 read values 0, 2 and 3 values 1
    assert fold.of_source(read, 4).tolist() == [2, 3, 6, 7]
    assert fold.of_readers(torch.tensor([1.0, 2, 3, 4]), 8).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]


def test_without_anything_to_scale_it_is_rtn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "STEPS", 1)
    ours, plain = compressed(AWQ(bits=3)), compressed(RTN(bits=3))
    assert torch.equal(ours(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("make", [tiny_model, biased])
@pytest.mark.parametrize("propagate", [True, False])
def test_it_is_nearer_to_the_model_than_rtn(make: Any, propagate: bool) -> None:
    base = frozen(make())(IDS).logits
    ours = compressed(AWQ(bits=3, group_size=32, propagate=propagate), make())
    plain = compressed(RTN(bits=3, group_size=32), make())
    assert (ours(IDS).logits - base).norm() < 0.95 * (plain(IDS).logits - base).norm()


@pytest.mark.parametrize("make", [tiny_model, biased])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_artefact_has_its_norms_and_biases(
    make: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    method = AWQ(bits=4, group_size=32)
    model = compressed(method, make().to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    method.save(model, tmp_path)
    loaded = method.load(frozen(make().to(dtype)), tmp_path, context())
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_interrupted_after_a_block_it_ends_with_the_same_bytes() -> None:
    method, kept = AWQ(bits=3, group_size=32), dict[str, Any]()
    whole = {n: t.clone() for n, t in method.artefact_tensors(compressed(method)).items()}
    for stop in (1, 2):
        model = frozen()
        for count, part in enumerate(method.compress(model, ROWS, context()), 1):
            before = {n: t.clone() for n, t in model.state_dict().items()}
            if part.name not in kept:
                kept[part.name] = {n: t.clone() for n, t in part.make().items()}
            assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
            part.put(kept[part.name])
            if count == stop:
                break
    found = method.artefact_tensors(model)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[n], whole[n]) for n in whole)


def test_in_memory_are_two_blocks_and_the_activations_at_the_most() -> None:
    model = frozen()
    with HeldBytes() as counted:
        compress_whole(AWQ(group_size=32), model, ROWS, context())
    block = 4 * sum(p.numel() for p in frozen().model.layers[0].parameters())
    states = 4 * 64 * sum(batch.input_ids.numel() for batch in ROWS)
    assert block < counted.peak <= 2 * block + 2 * states


def test_scales_are_balanced_around_one() -> None:
    found = list(scaling.candidates(torch.tensor([0.01, 0.5, 3.0])))
    assert len(found) == 20 and found[0].equal(torch.ones(3))
    for step, scales in enumerate(found):
        assert float(scales.max() * scales.min()) == pytest.approx(1)
        assert float(scales[2] / scales[0]) == pytest.approx(300 ** (step / 20), rel=1e-5)
    dead, faint = (list(scaling.candidates(torch.tensor([m, 0.5, 3.0]))) for m in (0.0, 1e-4))
    assert all(map(torch.equal, dead, faint)), "a channel that is always 0 decides nothing"
