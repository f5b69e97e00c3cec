"""Round-to-nearest: numbers, cost, resume and artefact."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.api.batch import make_batch
from effbench.api.method_types import Context
from effbench.api.registry import find
from effbench.api.shape import Shape
from effbench.methods.chain import chain_cost
from effbench.methods.compresses import compress_whole
from effbench.methods.none import Unchanged
from effbench.methods.quant.rtn import RTN
from effbench.nn.quant import groupwise
from effbench.nn.quant.linears import PackedLinear, storage_bytes
from effbench.util.errors import UserError

SHAPE = Shape(
    hidden_size=72,
    intermediate_size=136,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=18,
    vocab_size=97,
    tied=True,
)
IDS = torch.arange(40).view(2, 20)


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        vocab_size=SHAPE.vocab_size,
        tie_word_embeddings=SHAPE.tied,
    )
    model = LlamaForCausalLM(config).eval()
    model.to(dtype=dtype)
    return model


def context() -> Context:
    def load_model(name: str) -> torch.nn.Module:
        raise AssertionError(name)

    return Context(
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        generator=torch.Generator(),
        load_model=load_model,
    )


def compressed(method: RTN, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model = tiny(dtype=dtype)
    compress_whole(method, model, [], context())
    return model


def reference(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    """The equations of the method in float64, weight by weight."""
    out = torch.zeros(weight.shape, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            w = [float(v) for v in weight[row, start : start + group]]
            if symmetric:
                zero = 2 ** (bits - 1) - 1
                top, span = 2 * zero, max(abs(v) for v in w) / zero
            else:
                top = 2**bits - 1
                span = (max(0.0, *w) - min(0.0, *w)) / top
            scale = float(torch.tensor(span).half())
            if not symmetric:
                zero = min(max(round(-min(0.0, *w) / scale), 0), top)
            for i, v in enumerate(w):
                code = min(max(round(v / scale) + zero, 0), top)
                out[row, start + i] = scale * (code - zero)
    return out


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [16, 13, 64])
def test_agrees_with_float64_exactly(bits: int, symmetric: bool, group: int) -> None:
    torch.manual_seed(bits)
    base = torch.nn.Linear(48, 6, bias=False)
    layer = PackedLinear.quantise(base, bits, group, symmetric)
    expected = reference(base.weight.detach(), bits, group, symmetric)
    assert torch.equal(layer.dense_weight(torch.float64), expected)
    assert torch.equal(layer.dense_weight(torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("symmetric", [False, True])
def test_error_shrinks_with_every_bit(symmetric: bool) -> None:
    base = torch.nn.Linear(256, 64, bias=False)
    weight = base.weight.detach()
    errors = []
    for bits in range(2, 9):
        rounded = PackedLinear.quantise(base, bits, 64, symmetric).dense_weight(torch.float32)
        errors.append(float((rounded - weight).norm() / weight.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.006


def test_eight_bits_are_close_to_the_base_model() -> None:
    base = tiny()(IDS).logits.softmax(-1)
    eight = compressed(RTN(bits=8, group_size=32))(IDS).logits.softmax(-1)
    two = compressed(RTN(bits=2, group_size=32))(IDS).logits.softmax(-1)
    near, far = (base - eight).abs().sum(-1).mean(), (base - two).abs().sum(-1).mean()
    assert near < 0.01 and far > 5 * near


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_power_of_two_changes_the_scales_only(symmetric: bool) -> None:
    weight = torch.randn(8, 64)
    one = groupwise.quantise(weight, 4, 16, symmetric)
    four = groupwise.quantise(4 * weight, 4, 16, symmetric)
    assert torch.equal(one.codes, four.codes)
    assert torch.equal(4 * one.scales, four.scales)
    if not symmetric:
        assert one.zeros is not None and four.zeros is not None
        assert torch.equal(one.zeros, four.zeros)


def test_symmetric_levels_mirror_and_are_a_fixed_point() -> None:
    weight = torch.randn(8, 64)

    def rounded(w: torch.Tensor) -> torch.Tensor:
        return groupwise.dequantise(groupwise.quantise(w, 4, 16, True), 64, 4, 16, torch.float32)

    assert torch.equal(rounded(-weight), -rounded(weight))
    assert torch.equal(rounded(rounded(weight)), rounded(weight))


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_are_independent_and_zeros_exact(symmetric: bool) -> None:
    weight = torch.randn(4, 40)
    weight[:, 16:32] = 0
    weight[0, 0] = 1000

    def rounded(w: torch.Tensor) -> torch.Tensor:
        stored = groupwise.quantise(w, 3, 16, symmetric)
        return groupwise.dequantise(stored, w.shape[1], 3, 16, torch.float32)

    assert not rounded(weight)[:, 16:32].any()
    assert torch.equal(rounded(weight)[:, 32:], rounded(weight[:, 32:]))


@pytest.mark.parametrize("bits, group", [(2, 16), (3, 128), (4, 32), (5, 7), (6, 72), (8, 128)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cost_is_what_is_stored(bits: int, group: int, symmetric: bool, dtype: str) -> None:
    method = RTN(bits=bits, group_size=group, symmetric=symmetric)
    model = compressed(method, getattr(torch, dtype))
    cost = chain_cost([method], SHAPE, dtype)
    assert cost.resident_bytes == storage_bytes(model)
    assert cost.bytes_per_token == storage_bytes(model)  # tied: the head is read, and all is
    assert cost.saving == "physical" and cost.trainable == 0


def test_no_dense_weight_stays() -> None:
    state = compressed(RTN()).state_dict()
    assert not [n for n in state if n.endswith("proj.weight")]
    floats = [t for n, t in state.items() if "proj." in n and t.dtype != torch.uint8]
    assert {t.dtype for t in floats} == {torch.float16}


def test_resumed_after_any_part_it_ends_the_same() -> None:
    method = RTN(bits=3, group_size=32)
    whole = compressed(method).state_dict()
    for stop in (1, 6, 14):
        parts = itertools.islice(method.compress(tiny(), [], context()), stop)
        finished = {part.name: part.make() for part in parts}
        model, made = tiny(), 0
        for part in method.compress(model, [], context()):
            if part.name in finished:
                model.get_parameter(f"{part.name}.weight").data.zero_()  # is not needed any more
            part.put(finished.get(part.name) or part.make())
            made += 1
        assert made == 14
        state = model.state_dict()
        assert state.keys() == whole.keys()
        assert all(torch.equal(state[n], whole[n]) for n in whole)


def test_artefact_gives_the_same_logits(tmp_path: Path) -> None:
    method = RTN(bits=3, group_size=32)
    model = compressed(method)
    method.save(model, tmp_path)
    loaded = method.load(tiny(), tmp_path, context())
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(UserError, match="does not fit"):
        RTN(bits=4, group_size=32).load(tiny(), tmp_path, context())


def test_it_needs_dense_layers() -> None:
    method = find("methods", "rtn")()
    with pytest.raises(UserError, match="rtn cannot go on from what rtn left"):
        method.check_start([method])
    with pytest.raises(UserError, match="PackedLinear"):
        compress_whole(RTN(), compressed(RTN()), [], context())


def test_cost_needs_no_torch() -> None:
    program = (
        "import sys; from effbench.methods.quant.rtn import RTN;"
        "from effbench.api.shape import Shape; from effbench.methods.chain import chain_cost;"
        "chain_cost([RTN()], Shape(64, 128, 2, 4, 2, 16, 97), 'bfloat16');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unchanged_is_the_identity(tmp_path: Path) -> None:
    method, model = Unchanged(), tiny()
    before = model(IDS).logits
    assert torch.equal(method.load(model, tmp_path, context())(IDS).logits, before)
    assert not any(p.requires_grad for p in model.parameters())
    cost = chain_cost([method], SHAPE, "float32")
    assert cost.resident_bytes == storage_bytes(model)
    assert cost.trainable == 0 and cost.saving == "none"
    Unchanged().check_start([RTN()])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["rtn", "gptq", "awq", "hqq", "ptqtp", "lut_gemm"])
def test_a_weight_that_is_not_finite_is_refused_and_nothing_is_changed(
    name: str, bad: float
) -> None:
    model = tiny()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = bad
    before = dict(model.named_modules())
    first = model.model.layers[0].self_attn.q_proj
    method, rows = (
        find("methods", name)(group_size=24),
        [make_batch([([3, 4, 5, 6], [3, 4, 5, 6])], 0)],
    )
    with pytest.raises(UserError, match="not finite"):
        for part in method.compress(model, rows, context()):
            part.put(part.make())
    broken = model.model.layers[1].mlp.down_proj
    assert broken is before["model.layers.1.mlp.down_proj"]
    assert model.model.layers[0].self_attn.q_proj is not first, "what came before was done"


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq", "hqq", "ptqtp", "lut_gemm"])
def test_rows_of_zeros_stay_zeros(name: str) -> None:
    model = tiny()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[2] = 0.0
    rows = [make_batch([([3, 4, 5, 6], [3, 4, 5, 6])], 0)]
    compress_whole(find("methods", name)(group_size=24), model, rows, context())
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.dense_weight(torch.float32)
        assert weight.isfinite().all() and weight[3].any() and not weight[2].any()
