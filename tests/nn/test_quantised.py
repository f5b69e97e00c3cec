"""NF4 and packed linears: numbers, gradients, memory, adapters and state."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.nn.llama.surgery import decoder_linears, replace_linears
from effbench.nn.quant import nf4
from effbench.nn.quant.formats.nf4 import NF4Format
from effbench.nn.quant.linears import (
    Backend,
    NF4Linear,
    PackedLinear,
    QuantisedLinear,
    dense_linears,
    pack_linears,
    storage_bytes,
)
from effbench.util.errors import UserError

bnb = pytest.importorskip("bitsandbytes")

BACKENDS: tuple[Backend, ...] = ("torch", "bitsandbytes")
SHAPES = [(64, 64), (256, 512), (96, 80), (5, 96), (10, 6), (7, 33), (576, 192)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tiny(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def linear(d_in: int, d_out: int, seed: int = 0, bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(d_in, d_out, bias=bias)


def quantised(kind: str, base: torch.nn.Linear) -> QuantisedLinear:
    if kind == "packed":
        return PackedLinear.quantise(base, bits=3, group_size=24)
    return NF4Linear.quantise(base, backend=kind)  # type: ignore[arg-type]


KINDS = ["torch", "bitsandbytes", "packed"]


# -- NF4 numbers ---------------------------------------------------------------------------------


def nf4_in_float64(weight: torch.Tensor) -> torch.Tensor:
    """NF4 with the scales of one level, block after block, in float64."""
    flat, out = weight.double().reshape(-1), []
    levels = torch.tensor(nf4.LEVELS, dtype=torch.float64)
    for block in flat.split(64):
        top = block.abs().max()
        nearest = (block[:, None] / top - levels).abs().argmin(1)
        out.append(levels[nearest] * top)
    return torch.cat(out).view(weight.shape)


def restored(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return what the tensors that bitsandbytes stored stand for, by their definition."""
    absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()
    size = state.shape.numel()
    weights = state.code[codes[:size].long()] * absmax.float().repeat_interleave(64)[:size]
    return weights.view(state.shape).to(state.dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_tensors_are_those_of_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    weight = (torch.randn(shape) * 0.05).to(dtype)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantise(weight)
    assert torch.equal(ours.codes, packed.view(-1))
    assert torch.equal(ours.absmax_scales, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)

    other = ours.absmax != state.absmax
    if ours.absmax.numel() > 1:  # one scale less its mean is 0, and 0 / 0 has no nearest level
        assert other.float().mean() <= 0.03
        assert ((ours.absmax.int() - state.absmax.int()).abs() <= 1).all()
    same = ours._replace(absmax=state.absmax)
    theirs = restored(packed, state)
    if shape[1] % 64 == 0:  # elsewhere bitsandbytes' own AVX512 kernel is wrong
        assert torch.equal(bnb.functional.dequantize_4bit(packed, state), theirs)
    assert torch.equal(nf4.dequantise(same, shape, dtype), theirs)
    assert torch.equal(nf4.dequantise_bitsandbytes(same, shape, dtype), theirs)


def test_scales_are_rounded_to_the_nearest_where_bitsandbytes_is_not() -> None:
    torch.manual_seed(2)
    weight = torch.randn(1024, 1024)
    _, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantise(weight)
    exact = weight.view(-1, 64).abs().amax(1)
    error = (nf4.restored_absmax(ours) - exact).abs()
    theirs = (nf4.restored_absmax(ours._replace(absmax=state.absmax)) - exact).abs()
    assert (error <= theirs + 1e-6).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    weight = torch.randn(shape)
    ours = nf4.dequantise(nf4.quantise(weight), shape, torch.float64)
    one_level = nf4_in_float64(weight)
    ratio = (ours / one_level)[one_level != 0]  # the same level times a scale rounded to 8 bits
    assert ((ratio - 1).abs() < 0.02).all()
    assert ((ours == 0) == (one_level == 0)).all()


def test_zeros_stay_zeros() -> None:
    assert not nf4.dequantise(nf4.quantise(torch.zeros(64, 64)), (64, 64), torch.float32).any()


@pytest.mark.parametrize("d_in, d_out", [(128, 128), (512, 96), (576, 1536), (33, 7), (1, 1)])
def test_nf4_bytes_are_what_is_stored(d_in: int, d_out: int) -> None:
    layer = NF4Linear.quantise(linear(d_in, d_out))
    assert nf4.nf4_bytes(d_in, d_out) == storage_bytes(layer)
    if d_in * d_out % 16384 == 0:
        per_weight = 0.5 + 1 / 64 + 4 / (64 * 256)
        assert nf4.nf4_bytes(d_in, d_out) == d_in * d_out * per_weight + 4


# -- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_a_product_with_the_dense_weight(kind: str, dtype: torch.dtype) -> None:
    layer = quantised(kind, linear(96, 40))
    x = torch.randn(2, 3, 96, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.dense_weight(dtype)))
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    layer = quantised(kind, linear(12, 5, bias=True).double())
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    layer(x).sum().backward()
    assert layer.bias.grad is not None
    assert [n for n, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_weight_waits_for_the_backward_pass(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = quantised(kind, linear(96, 40))
    made: list[weakref.ref[torch.Tensor]] = []
    expand = layer.dense_weight

    def record(dtype: torch.dtype) -> torch.Tensor:
        weight = expand(dtype)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(layer, "dense_weight", record)
    out = layer(torch.randn(3, 96, requires_grad=True))
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    out.sum().backward()
    assert len(made) == 2


def test_the_fused_product_reads_the_same_buffers() -> None:
    layer = NF4Linear.quantise(linear(128, 40))
    x = torch.randn(2, 3, 128)
    assert nf4.bitsandbytes_available()
    fused = nf4.product_bitsandbytes(x, layer.stored, (40, 128))
    assert torch.equal(fused, layer(x))


def test_compute_dtype_is_used_inside_only() -> None:
    layer = NF4Linear.quantise(linear(64, 64), compute_dtype=torch.bfloat16)
    x = torch.randn(2, 64)
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.bfloat16()).float())


@pytest.mark.parametrize("kind", KINDS)
def test_casting_the_model_keeps_the_scales(kind: str) -> None:
    layer = quantised(kind, linear(96, 40, bias=True))
    before = layer.dense_weight(torch.float32)
    layer.to(torch.bfloat16).half()
    assert torch.equal(layer.dense_weight(torch.float32), before)
    assert layer.bias.dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip_is_exact(kind: str) -> None:
    base = linear(96, 40, bias=True)
    layer = quantised(kind, base)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = linear(96, 40, seed=9, bias=True)
    fresh = (
        PackedLinear.empty(other, bits=3, group_size=24)
        if kind == "packed"
        else NF4Linear.empty(other)
    )
    fresh.load_state_dict(torch.load(file))
    x = torch.randn(4, 96)
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_first_use_under_inference_mode_does_not_spoil_training(kind: str) -> None:
    for table in (nf4._levels, nf4._pairs, nf4.dynamic_levels):
        table.cache_clear()
    layer = quantised(kind, linear(64, 64))
    with torch.inference_mode():
        layer(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.any()


# -- models --------------------------------------------------------------------------------------


def test_packing_takes_the_decoder_linears_and_nothing_else() -> None:
    model = tiny()
    kept = {n: p.clone() for n, p in model.named_parameters() if "proj" not in n}
    names = pack_linears(model, NF4Format(), torch.float32)
    assert len(names) == 14
    assert all(isinstance(m, NF4Linear) for _, m in decoder_linears(model))
    assert dict(model.named_parameters()).keys() == kept.keys()
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())


def test_backends_agree_to_the_bit() -> None:
    ids = torch.arange(20)[None]
    logits = []
    for backend in BACKENDS:
        model = tiny()
        pack_linears(model, NF4Format(backend), torch.float32)
        logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_only_dense_linears_are_quantised() -> None:
    model = tiny()
    pack_linears(model, NF4Format(), torch.float32)
    with pytest.raises(UserError, match="NF4Linear"):
        pack_linears(model, NF4Format(), torch.float32)


def test_storage_is_counted_once_and_exactly() -> None:
    model = tiny()
    params = sum(p.numel() for p in model.parameters())
    assert storage_bytes(model) == 4 * params
    sizes = [(m.in_features, m.out_features) for _, m in dense_linears(model)]
    weights = sum(d_in * d_out for d_in, d_out in sizes)
    packed = sum(nf4.nf4_bytes(*size) for size in sizes)
    pack_linears(model, NF4Format(), torch.float32)
    assert storage_bytes(model) == 4 * (params - weights) + packed
    with torch.device("meta"):
        assert storage_bytes(tiny()) == 4 * params


def test_storage_of_bitsandbytes_own_layers_is_the_same() -> None:
    model, theirs = tiny(), tiny()
    pack_linears(model, NF4Format(), torch.float32)

    def make(name: str, base: Any) -> torch.nn.Module:
        new = bnb.nn.Linear4bit(base.in_features, base.out_features, False, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(base.weight.data, quant_type="nf4")
        return new.to("cpu")

    replace_linears(theirs, make)
    assert storage_bytes(model) == storage_bytes(theirs)


# -- adapters ------------------------------------------------------------------------------------


def learns_after_evaluation(model: LlamaForCausalLM) -> None:
    """Evaluate, then train LoRA for some steps; every adapter must learn and the loss must fall."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config)
    ids = torch.randint(97, (4, 24))
    adapted.eval()
    with torch.no_grad():
        before = adapted(ids, labels=ids).loss
    adapted.train()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for step in range(6):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        for name, parameter in trained.items():
            if "lora_B" in name or step:
                assert parameter.grad is not None and parameter.grad.any(), name
        optimizer.step()
    adapted.eval()
    with torch.no_grad():
        after = adapted(ids, labels=ids).loss
    assert after < before - 0.05
    assert math.isfinite(after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_learn_after_an_evaluation(kind: str, dtype: torch.dtype) -> None:
    model = tiny()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    replace_linears(model, lambda _, base: quantised(kind, base))  # type: ignore[arg-type]
    stored = {n: b.clone() for n, b in model.named_buffers()}
    learns_after_evaluation(model)
    inside = {n.replace("base_layer.", ""): b for n, b in model.named_buffers()}
    assert all(torch.equal(inside[n], b) for n, b in stored.items())


class Trapped(NF4Linear):
    """Loses autograd for good once it has run in eval mode, as bitsandbytes does on AVX512-BF16."""

    repacked = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.repacked |= not self.training
        out = super().forward(input)
        return out.detach() if self.repacked else out


def test_the_check_above_catches_a_layer_that_loses_autograd() -> None:
    model = tiny()
    replace_linears(model, lambda _, base: Trapped.quantise(base))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="lora_"):
        learns_after_evaluation(model)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_an_adapter_is_refused_not_lost(kind: str) -> None:
    model = tiny()
    replace_linears(model, lambda _, base: quantised(kind, base))  # type: ignore[arg-type]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError):
        adapted.merge_and_unload()
