"""The decode engine against full passes and transformers' own loop, over several families."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoded
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from effbench.api import weights
from effbench.config.compose import compose
from effbench.models import load as models
from effbench.nn.adapters.lowrank import LowRankLinear, RankControl
from effbench.nn.decode import native, native_step, prompts
from effbench.nn.decode.cuda_graph import StaticStep
from effbench.nn.decode.native_step import NativeStep
from effbench.nn.decode.pointwise import fused
from effbench.nn.decode.policy import EVERYTHING
from effbench.nn.decode.session import CachedSession, greedy
from effbench.nn.decode.sessions import session_for
from effbench.nn.decode.staged import WholeSession
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.stack import at_layers
from effbench.nn.llama.surgery import replace_linears
from effbench.nn.llama.walk import why_not
from effbench.nn.quant import nested_linear, plane_linears
from effbench.nn.quant.formats.nf4 import NF4Format
from effbench.nn.quant.linears import NF4Linear, PackedLinear, QuantisedLinear, pack_linears
from effbench.testing.bench import Bench
from effbench.util import cpp
from effbench.util.hardware import cpu_flags

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 72,
    "intermediate_size": 106,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "max_position_embeddings": 1024,
}
"""No width is a multiple of a vector register, so that the ends of rows are tested too."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, scaled positions": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**{**SIZES, "hidden_size": 120}, use_sliding_window=False),
}
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.06}
"""Largest difference of a logit; the logits' own spread is about 1."""


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        for p in model.parameters():
            if p.ndim == 1:
                torch.nn.init.normal_(p, 1.0, 0.3)
    return model.to(dtype).eval().requires_grad_(False)


def some_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, 131, (rows, length), generator=torch.Generator().manual_seed(rows))


@pytest.fixture(params=["native", "walk"])
def way(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and native.kernels() is None:
        pytest.skip(native.why_not())
    return str(request.param)


def session_of(model: Any, way: str) -> StaticSession:
    session = StaticSession(model, use_native=way == "native")
    assert session.engine == way
    return session


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_give_what_one_pass_gives(
    family: str, rows: int, dtype: torch.dtype, way: str
) -> None:
    model, ids = random_model(FAMILIES[family], dtype), some_ids(rows, 30)
    with torch.no_grad():
        expected = model(ids).logits[:, 11:]
    found = decoded(session_of(model, way), ids, 12)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=TOLERANCES[dtype], rtol=0)
    assert expected.float().std() > 0.7


def test_a_long_context_grows_the_cache_and_is_cut_in_chunks(way: str) -> None:
    model, ids = random_model(FAMILIES["llama"]), some_ids(2, 600)
    with torch.no_grad():
        expected = model(ids).logits[:, 4:]
    session = session_of(model, way)
    torch.testing.assert_close(decoded(session, ids, 5), expected, atol=5e-5, rtol=0)
    per_token = 2 * 3 * 2 * 20 * 4  # keys and values, layers, heads, width, float32
    assert session.kv_bytes() == 2 * 600 * per_token
    assert session.reserved_bytes() >= session.kv_bytes()


def test_what_was_reserved_is_used(way: str) -> None:
    model, ids = random_model(FAMILIES["llama"]), some_ids(2, 40)
    grown, reserved = session_of(model, way), session_of(model, way)
    reserved.reserve(2, 40)
    keys = reserved.layers[0].keys
    assert decoded(reserved, ids, 8).equal(decoded(grown, ids, 8))
    assert reserved.layers[0].keys is keys


@pytest.mark.parametrize(
    "session", [CachedSession, StaticSession, lambda model: WholeSession(model, EVERYTHING)]
)
def test_the_head_reads_rows_that_lie_together(session: Any) -> None:
    model, seen = random_model(FAMILIES["llama"]), list[torch.Tensor]()
    model.lm_head.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    session(model).prefill(torch.ones(3, 40, dtype=torch.long))
    [rows] = seen
    assert rows.shape == (3, 1, rows.shape[-1]) and rows.is_contiguous()
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    if native.kernels() is None:
        pytest.skip(native.why_not())
    model, ids, before = random_model(FAMILIES["llama"]), some_ids(2, 300), torch.get_num_threads()
    torch.set_num_threads(1)
    one = decoded(session_of(model, "native"), ids, 290)
    other = session_of(model, "native")
    other.prefill(ids[:, :290])
    try:
        torch.set_num_threads(threads)
        steps = torch.stack([other.step(ids[:, t : t + 1]) for t in range(290, 300)], dim=1)
    finally:
        torch.set_num_threads(before)
    assert steps.equal(one[:, 1:])


def test_a_padded_batch_decodes_as_each_prompt_alone(way: str) -> None:
    model = random_model(FAMILIES["llama"])
    short, long = some_ids(1, 6), some_ids(1, 10) % 60 + 60
    ids = torch.zeros(2, 10, dtype=torch.long)
    ids[0, 4:], ids[1] = short, long
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    both, alone = session_of(model, way), [session_of(model, way) for _ in range(2)]
    logits = [both.prefill(ids, mask)]
    expected = [torch.cat([s.prefill(p) for s, p in zip(alone, (short, long), strict=True)])]
    for token in range(5):
        logits.append(both.step(torch.full((2, 1), 50 + token)))
        expected.append(torch.cat([s.step(torch.full((1, 1), 50 + token)) for s in alone]))
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected), atol=5e-5, rtol=0)
    both.reorder(torch.tensor([1, 0, 1]))
    both.reorder(torch.tensor([2, 2, 1, 0]))
    both.reorder(torch.tensor([3, 2, 1]))
    found = both.step(torch.full((3, 1), 9))
    again = torch.cat([s.step(torch.full((1, 1), 9)) for s in alone])
    torch.testing.assert_close(found, again[[1, 0, 1]], atol=5e-5, rtol=0)


def test_the_static_form_of_a_step_gives_the_same(way: str) -> None:
    """What is captured on a CUDA device: fixed addresses, a mask over the whole cache."""
    model, ids = random_model(FAMILIES["llama"]), some_ids(2, 14)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    session, other = session_of(model, way), session_of(model, "walk")
    session.prefill(ids[:, :9], mask), other.prefill(ids[:, :9], mask)
    with torch.inference_mode():
        static = StaticStep(other, fused(lambda function: function))
        for t in range(9, 14):
            static.token.copy_(ids[:, t : t + 1])
            found = static.logits(other)
            static.advance(other)
            expected = session.step(ids[:, t : t + 1])
            torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_may_leave_blocks_out(rows: int, way: str) -> None:
    """A prompt read by all layers and tokens by some: the others' caches do not grow."""
    model, ids = random_model(FAMILIES["llama"]), some_ids(rows, 20)
    session, other = session_of(model, way), CachedSession(model)
    session.layers[1].lane = 1
    runs = (True, False, True)
    session.prefill(ids[:, :8])
    with at_layers(model, [0, 2]):
        other.prefill(ids[:, :8])
    keys = [layer.buffers[0][:, :, :8].clone() for layer in session.layers]
    with at_layers(model, [0, 2]), torch.inference_mode():
        for cached, layer in zip(other.cache.layers, (0, 2), strict=True):
            cached.keys = keys[layer]  # as the whole model read the prompt
            cached.values = session.layers[layer].buffers[1][:, :, :8].clone()
        for t in range(8, 16):
            expected = other.step(ids[:, t : t + 1])
            found = session.advance(ids[:, t : t + 1], runs)
            torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    assert session.kv_lengths() == [16, 8, 16] and session.length == 16
    assert session.kv_bytes() == rows * (16 + 8 + 16) * 2 * 2 * 20 * 4
    full, short = session.step(ids[:, 16:17]), session.advance(ids[:, 16:17], runs)
    assert (full - short).abs().max() > 0.1
    assert session.kv_lengths() == [18, 9, 18]


@pytest.mark.parametrize("kind", ["adapters", "nf4", "one adapter"])
def test_changed_linears_are_called_as_modules(kind: str) -> None:
    model, ids = random_model(FAMILIES["llama"]), some_ids(2, 20)
    if kind == "nf4":
        pack_linears(model, NF4Format(), torch.float32)
    else:
        control = RankControl(4)
        targets = ["down_proj"] if kind == "one adapter" else ["q_proj", "gate_proj", "o_proj"]
        replace_linears(model, lambda name, m: LowRankLinear(m, control, 8.0), targets)
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.2)
    model.requires_grad_(False)
    session = session_for(model)
    assert isinstance(session, StaticSession) and session.engine == "walk"
    with torch.no_grad():
        expected = model(ids).logits[:, 6:]
    torch.testing.assert_close(decoded(session, ids, 7), expected, atol=5e-5, rtol=0)


def test_a_weight_that_changes_is_seen_at_once(way: str) -> None:
    model, ids = random_model(FAMILIES["llama"]), some_ids(1, 8)
    session = session_of(model, way)
    session.prefill(ids)
    model.lm_head.weight.zero_()
    assert not session.step(ids[:, :1]).any()


def test_nothing_is_left_on_the_model(way: str) -> None:
    model, ids = random_model(FAMILIES["llama, tied"]), some_ids(3, 12)

    def state() -> Iterator[tuple[Any, ...]]:
        for name, module in model.named_modules():
            yield name, sorted(vars(module)), len(module._forward_hooks)
        for name, p in model.named_parameters():
            yield name, p.data_ptr(), p.double().sum().item()

    before = list(state())
    first = decoded(session_of(model, way), ids, 5)
    half = session_of(model, way)
    half.prefill(some_ids(1, 3))
    assert decoded(session_of(model, way), ids, 5).equal(first)
    assert list(state()) == before


def test_models_of_another_layout_take_the_ordinary_session() -> None:
    sliding = MistralConfig(**SIZES, sliding_window=8)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    others = {
        "Qwen3": Qwen3Config(**SIZES),
        "Gemma": GemmaConfig(**SIZES),
        "sliding window": sliding,
        "rotary": LlamaConfig(**SIZES, rope_parameters=dynamic),
        "gelu": LlamaConfig(**SIZES, hidden_act="gelu"),
    }
    for words, config in others.items():
        model, ids = random_model(config), some_ids(1, 12)
        assert words in why_not(model)
        session = session_for(model)
        assert isinstance(session, CachedSession)
        with torch.no_grad():
            expected = model(ids).logits[:, 4:]
        torch.testing.assert_close(decoded(session, ids, 5), expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="does not apply"):
            StaticSession(model)


def test_a_watched_or_changed_block_is_not_passed_over() -> None:
    model = random_model(FAMILIES["llama"])
    assert why_not(model) == ""
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *a: None)
    assert "LlamaMLP is changed or watched" in why_not(model)
    hook.remove()
    model.model.layers[2].forward = lambda *a, **k: None
    assert "LlamaDecoderLayer is changed" in why_not(model)
    del model.model.layers[2].forward
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *a: None)
    assert StaticSession(model).engine == "walk"
    hook.remove()
    hook = model.model.norm.register_forward_hook(lambda *a: None)
    assert StaticSession(model).engine == "walk"
    hook.remove()
    assert why_not(model.train()) == "the model is in train mode"


def narrowed(linear: torch.nn.Linear, rows: int, columns: int) -> torch.nn.Linear:
    new = torch.nn.Linear(columns, rows, bias=False)
    new.weight = torch.nn.Parameter(linear.weight[:rows, :columns].clone(), requires_grad=False)
    return new


def test_layers_of_other_sizes_than_the_config_states(way: str) -> None:
    model, ids = random_model(FAMILIES["llama"]), some_ids(1, 12)
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = (narrowed(m, 50, 72) for m in (mlp.gate_proj, mlp.up_proj))
    mlp.down_proj = narrowed(mlp.down_proj, 72, 50)
    session = session_of(model, way)
    with torch.no_grad():
        expected = model(ids).logits[:, 4:]
    torch.testing.assert_close(decoded(session, ids, 5), expected, atol=5e-5, rtol=0)
    mlp.up_proj = narrowed(model.model.layers[0].mlp.up_proj, 51, 72)
    assert StaticSession(model).engine == "walk"  # which fails as the model itself does
    attention = model.model.layers[0].self_attn
    attention.q_proj = narrowed(attention.q_proj, 60, 72)
    assert why_not(model) == "it lacks some heads"


def test_misuse_is_refused(way: str) -> None:
    model, ids = random_model(FAMILIES["llama"]), some_ids(1, 6)
    session = session_of(model, way)
    with pytest.raises(ValueError, match="padded on the left"):
        session.prefill(ids, torch.tensor([[1, 1, 1, 1, 0, 0]]))
    session.prefill(ids)
    with pytest.raises(RuntimeError, match="reads one prompt"):
        session.prefill(ids)
    with pytest.raises(IndexError):
        session.step(torch.tensor([[131]]))
    if way == "native":
        with pytest.raises(ValueError, match="one token for each of 1"):
            session.step(torch.tensor([[1], [2]]))


# -- the kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (64, 96), (131, 77)])
def test_products_are_those_of_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    kernels = native.kernels()
    if kernels is None:
        pytest.skip(native.why_not())
    draws = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=draws).to(dtype)
    x = torch.randn(shape[1], generator=draws).to(dtype)
    expected = w.double() @ x.double()
    scale = w.double().abs() @ x.double().abs()
    error = (kernels.gemv(w, x).double() - expected).abs()
    rounding = expected.abs() * (2**-8 if dtype == torch.bfloat16 else 0)
    assert (error <= rounding + 1e-6 * scale).all()


@pytest.mark.parametrize(
    "options",
    [
        ("-mavx2", "-mfma", "-mf16c"),
        ("-mno-avx",),
        pytest.param(("-march=cascadelake",), marks=pytest.mark.slow),  # VNNI, no VBMI
    ],
    ids=str,
)
def test_other_instruction_sets_give_the_same(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What machines without AVX-512, or without its newer parts, run.

    They lie in the machine's own cache, compiled anew whenever a source or an option changes.
    """
    needed = {"avx512_vnni"} if "cascadelake" in options[0] else {"avx2", "fma", "f16c"}
    if native.kernels() is None or not needed <= cpu_flags():
        pytest.skip(f"needs a compiler and a CPU with {' and '.join(sorted(needed))}")
    monkeypatch.setattr(cpp, "NATIVE", options)
    monkeypatch.setattr(native, "_load", functools.cache(native._load.__wrapped__))
    for dtype, tolerance in TOLERANCES.items():
        model, ids = random_model(FAMILIES["llama"], dtype), some_ids(2, 16)
        with torch.no_grad():
            expected = model(ids).logits[:, 6:]
        found = decoded(session_of(model, "native"), ids, 7)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    model = packed_model("grouped")
    found = decoded(session_of(model, "native"), ids, 7)
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits[:, 6:], atol=CODES, rtol=0)
    linear = torch.nn.Linear(448, 5, bias=False)
    linear.weight.data[0] = (
        0.05  # the largest levels, which the largest numbers are multiplied with
    )
    for layer in (
        NF4Linear.quantise(linear),
        *(PackedLinear.quantise(linear, bits, 64) for bits in (2, 3, 4, 5, 6, 7, 8)),
        plane_linears.TritLinear.quantise(linear, 2, 64),
        plane_linears.BinaryLinear.quantise(linear, 5, 64, offset=True),
        nested_linear.NestedLinear.quantise(linear, 3, 6),
    ):
        x = torch.stack([torch.randn(448), torch.ones(448)])
        found = native_step.product(native.kernels(), layer, x)
        torch.testing.assert_close(found, layer(x), atol=2e-3, rtol=0)


CODES = 3e-3
"""Largest difference of a logit where packed weights are multiplied as they lie."""


def packed_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16}
    model = random_model(LlamaConfig(**{**SIZES, **sizes})).to(dtype)
    pack_linears(model, weights.find(name)(), dtype)
    return model


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("name", ["grouped", "nf4"])
def test_packed_weights_are_decoded_without_being_expanded(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.kernels() is None:
        pytest.skip(native.why_not())
    model, ids = packed_model(name), some_ids(rows, 20)
    with torch.no_grad():
        expected = model(ids).logits[:, 11:]
    session = session_of(model, "native")
    steps = [session.prefill(ids[:, :12])]
    monkeypatch.setattr(QuantisedLinear, "forward", None)
    steps += [session.step(ids[:, t : t + 1]) for t in range(12, 20)]
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, atol=CODES, rtol=0)
    assert expected.std() > 0.7


SANITISED = """
import sys
sys.path[:0] = ["tests/nn", "tests/methods"]
import pytest
import torch
from effbench.util import cpp
cpp.NATIVE = (*cpp.NATIVE, "-g", "-O1", "-fno-sanitize-recover=all", "-fsanitize=address,undefined")
from effbench.nn.decode import native
import test_engine as engine
import test_code_products as products
import test_dijiang as dijiang
import test_entries as entries
import test_most_likely as likely
import test_step_rows as rows_of_steps
assert native.kernels(), native.why_not()
for kind in products.KINDS:
    products.test_products_of_codes_are_those_of_the_expanded_weight(kind)
if products.BF16_LEVELS:
    for bits in (2, 4, 7, 8):
        products.test_nested_levels_meet_vectors_of_bfloat16_as_an_expanded_weight_does(bits)
for dtype in engine.TOLERANCES:
    model = engine.random_model(engine.FAMILIES["llama, biases"], dtype)
    for rows, length in ((1, 300), (7, 20)):
        engine.decoded(engine.session_of(model, "native"), engine.some_ids(rows, length), 5)
for dtype in engine.TOLERANCES:
    with pytest.MonkeyPatch.context() as patch:
        likely.test_the_kernel_takes_the_token_that_torch_takes(dtype, patch)
for kind in rows_of_steps.NEAR:
    with pytest.MonkeyPatch.context() as patch:
        rows_of_steps.test_any_number_of_rows_meets_any_width_of_heads(kind, patch)
for settings in dijiang.VARIANTS:
    dijiang.test_a_step_of_the_kernel_is_that_of_the_operations(settings)
entries.test_codes_that_do_not_lie_together_are_expanded_alike()
for bits, group, width in ((8, 32, 64), (4, 64, 96), (2, 32, 128), (4, 48, 48)):
    entries.test_a_step_attends_to_codes_as_to_what_they_stand_for(
        bits, group, width, 5, torch.float32
    )
draws = torch.Generator().manual_seed(0)
angles = torch.randn(40, 10, generator=draws), torch.randn(40, 10, generator=draws)
places = torch.arange(7)[None]
assert entries.entries.turned(torch.randn(2, 3, 7, 10, generator=draws), angles, places) is not None
"""


@pytest.mark.slow
def test_the_kernels_stay_within_their_memory(tmp_path: Path) -> None:
    """AddressSanitizer and UBSan, at shapes that no register divides."""
    if native.kernels() is None or not shutil.which("g++"):
        pytest.skip("needs g++")
    asan = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    paths = [str(Path(__file__).parents[1]), *sys.path]
    env = {
        **os.environ,
        "CXX": "g++",
        "EFFBENCH_CACHE": str(tmp_path),
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SANITISED]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_a_compiler_there_is_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(FAMILIES["llama"])
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(cpp, "compiler", lambda: None)
    assert native.why_not() == "there is no C++ compiler"
    assert StaticSession(model).engine == "walk"
    monkeypatch.setattr(cpp, "compiler", lambda: "false")
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(cpp, "_version", lambda program: "")
    assert "false cannot compile them" in native.why_not()
    monkeypatch.setenv("EFFBENCH_NATIVE", "0")
    assert native.why_not() == "EFFBENCH_NATIVE=0"


def test_kernels_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.kernels() is None:
        pytest.skip(native.why_not())
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(cpp, "NATIVE", ("-O0",))  # compiled in a moment
    calls = []
    run = subprocess.run

    def watched(command: list[str], **settings: Any) -> Any:
        calls.append(command)
        return run(command, **settings)

    monkeypatch.setattr(subprocess, "run", watched)
    for _ in range(2):
        native._load.cache_clear()
        assert native.kernels() is not None
    assert sum("-shared" in c for c in calls) == 1


# -- a real model ------------------------------------------------------------------------------


@pytest.mark.real
def test_the_tokens_are_those_of_generate(bench: Bench) -> None:
    spec = compose("eval", ["model=smollm2-135m"]).spec.model
    loaded = models.load(spec, device="cpu", dtype=torch.float32)
    model: Any = loaded.model.requires_grad_(False)
    ids = loaded.tokenizer("def fibonacci(n):", return_tensors="pt").input_ids
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
    )[:, ids.shape[1] :]
    assert greedy(session_for(model), ids, 24).equal(expected)


def test_the_engine_is_what_methods_decode_with() -> None:
    from effbench.methods.none import Unchanged

    model = random_model(FAMILIES["llama"])
    assert isinstance(Unchanged().session(model), StaticSession)


# -- prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "packed", "planes", "planes in float32"])
@pytest.mark.parametrize(("rows", "length"), [(1, 5), (2, 16), (1, 150)])
def test_short_or_slow_prompts_are_read_by_the_kernel(
    kind: str, rows: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes out, and what the cache holds, is what the forward pass gives."""
    monkeypatch.setattr(prompts, "native_bf16", lambda: kind == "planes")
    names = {"packed": "grouped", "planes": "any_precision", "planes in float32": "any_precision"}
    dtype = torch.bfloat16 if kind in ("bfloat16", "planes") else torch.float32
    if kind in names:
        model = packed_model(names[kind], dtype)
    else:
        model = random_model(FAMILIES["llama"]).to(dtype)
    ids, calls = some_ids(rows, length), list[int]()
    monkeypatch.setattr(
        NativeStep,
        "run_blocks",
        lambda self, session, hidden, *rest, run=NativeStep.run_blocks: (
            calls.append(hidden.shape[1]) or run(self, session, hidden, *rest)
        ),
    )
    session, other = StaticSession(model), StaticSession(model)
    found = session.prefill(ids), session.step(ids[:, :1])
    read_so = native.kernels() is not None and (length < 150 or kind == "bfloat16")
    read_so &= kind != "planes in float32"
    assert sum(calls) == (length if read_so else 0)
    monkeypatch.setattr(prompts, "takes", lambda *_: False)
    expected = other.prefill(ids), other.step(ids[:, :1])
    near = {"float32": 5e-5, "packed": CODES, "planes in float32": CODES}.get(kind, 0.05)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=near, rtol=near)
    assert session.kv_lengths() == other.kv_lengths()


def test_padded_prompts_are_read_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeStep, "run_blocks", lambda *_: pytest.fail("read by the kernel"))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    StaticSession(random_model(FAMILIES["llama"])).prefill(some_ids(2, 6), mask)
