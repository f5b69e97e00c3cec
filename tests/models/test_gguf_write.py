"""What is written as GGUF is read back as the same model, and llama.cpp decodes the same tokens."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from effbench.config.compose import compose
from effbench.models import load as models
from effbench.models.gguf_header import config_in, read_header
from effbench.models.gguf_write import blocks_of, pre_tokenizer_of, require_known, write_gguf
from effbench.nn.quant.linears import PackedLinear
from effbench.util.errors import UserError

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
}
GEMMA = {**SIZES, "sliding_window": 4, "query_pre_attn_scalar": 16}
LOCAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
}
EXPERTS = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
NEOX = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
IDS = torch.arange(12).reshape(2, 6) % 60 + 3
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3": lambda: LlamaConfig(**SIZES, rope_parameters=SCALED),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=4, n_inner=96
    ),
    "gemma": lambda: GemmaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "gemma2": lambda: Gemma2Config(**GEMMA),
    "gemma3": lambda: Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 7}),
    "phi3": lambda: Phi3Config(
        **{k: v for k, v in SIZES.items() if k != "head_dim"}, pad_token_id=0
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**NEOX),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=48),
    "qwen3_moe": lambda: Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.load_tokenizer(compose("eval", ["model=tiny", "dataset=arithmetic"]).spec.model)


def byte_pairs() -> Any:
    """Return a tokenizer of 299 letters and pairs of them, of a kind that llama.cpp knows."""
    pairs = (a + b for a in ascii_uppercase for b in ascii_lowercase)
    tokens = [*ascii_lowercase, "he", *islice(pairs, 272)]
    inner = Tokenizer(BPE({token: n for n, token in enumerate(tokens)}, [("h", "e")]))
    inner.decoder = decoders.ByteLevel()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_transformers_reads_it_back(name: str, tmp_path: Path, tokenizer: Any) -> None:
    model = made(name)
    write_gguf(model, tokenizer, tmp_path / "x.gguf", name="mine")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5, rtol=1e-5
        )
    stated = config_in(read_header(tmp_path / "x.gguf"))
    assert stated["tie_word_embeddings"] == (name == "llama")
    assert {k: v for k, v in SIZES.items() if k in stated} == {
        k: v for k, v in stated.items() if k in SIZES
    }


def test_tensors_of_other_architectures_are_as_llama_cpp_holds_them(
    tmp_path: Path, tokenizer: Any
) -> None:
    for name, own, theirs in (
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", "blk.0.ffn_up.weight"),
        ("gemma", "model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
        ("gemma2", "model.layers.0.pre_feedforward_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("gemma3", "model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", "blk.0.attn_qkv.weight"),
    ):
        model = made(name)
        write_gguf(model, tokenizer, tmp_path / f"{name}.gguf")
        weight = model.get_parameter(own)
        wanted = {"gpt2": weight.t(), "phi3": weight}.get(name, weight + 1)
        found = tensors(tmp_path / f"{name}.gguf")
        np.testing.assert_array_equal(found[theirs].data, wanted.numpy())
        assert len(found) == len(list(model.parameters()))


def test_fused_queries_and_experts_are_as_llama_cpp_holds_them(
    tmp_path: Path, tokenizer: Any
) -> None:
    for name in ("gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe"):
        write_gguf(made(name), tokenizer, tmp_path / f"{name}.gguf")
    found, neox = tensors(tmp_path / "gpt_neox.gguf"), made("gpt_neox").gpt_neox.layers[1]
    fused = neox.attention.query_key_value.weight  # queries, keys and values of head 0, of head 1
    keys = torch.cat([fused[48 * head + 16 : 48 * head + 32] for head in range(4)])
    assert np.array_equal(found["blk.1.attn_qkv.weight"].data[64:128], keys.numpy())
    assert np.array_equal(found["blk.1.ffn_norm.bias"].data, neox.post_attention_layernorm.bias)
    for name, inner in (("mixtral", 96), ("qwen2_moe", 32), ("qwen3_moe", 32)):
        found, mlp = tensors(tmp_path / f"{name}.gguf"), made(name).model.layers[0].mlp
        up = mlp.experts.gate_up_proj[3, inner:]
        assert np.array_equal(found["blk.0.ffn_up_exps.weight"].data[3], up.numpy())
        assert np.array_equal(found["blk.0.ffn_gate_inp.weight"].data, mlp.gate.weight.numpy())
        stated = config_in(read_header(tmp_path / f"{name}.gguf"))
        assert stated.get("num_experts_per_tok", 2) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*CONFIGS} - {"llama3", "qwen2"}))
def test_llama_cpp_decodes_the_same_tokens_of_every_architecture(name: str, tmp_path: Path) -> None:
    """Of random weights, in float32; the wheel is no dependency: `pip install xllamacpp`."""
    llama = pytest.importorskip("xllamacpp")
    model = made(name)
    size = 0.1 if name == "gpt_neox" else 0.3  # whose layers add up float16 steps of llama.cpp
    with torch.no_grad():
        for parameter in model.parameters():  # else the same token comes again and again
            parameter.add_(size * torch.randn(parameter.shape))
    tokenizer = byte_pairs()
    write_gguf(model, tokenizer, tmp_path / "x.gguf", name="mine")
    ids = torch.tensor([[66, 70, 75, 90, 101, 120, 84]])  # more than a window
    own = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    params = llama.CommonParams()
    params.model.path = str(tmp_path / "x.gguf")
    params.n_ctx, params.warmup, params.n_gpu_layers = 64, False, 0
    server = llama.Server(params)
    asked = {"prompt": ids[0].tolist(), "max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    [said] = server.handle_completions(asked | {"logprobs": 5})["choices"]
    assert said["text"] == tokenizer.decode(own[0, ids.shape[1] :])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    for first in said["logprobs"]["content"][0]["top_logprobs"]:
        if first["id"] < len(tokenizer) - 1:  # its end is no token that ignore_eos leaves
            assert first["logprob"] == pytest.approx(float(expected[first["id"]]), abs=0.01)


def test_scaled_positions_are_written_as_what_divides_them(tmp_path: Path, tokenizer: Any) -> None:
    model = made("llama3")
    write_gguf(model, tokenizer, tmp_path / "x.gguf")
    divided = torch.tensor(tensors(tmp_path / "x.gguf")["rope_freqs.weight"].data)
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / divided, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes_keep_their_bits(dtype: torch.dtype, tmp_path: Path, tokenizer: Any) -> None:
    model = made("qwen3").to(dtype)
    write_gguf(model, tokenizer, tmp_path / "x.gguf")
    found = tensors(tmp_path / "x.gguf")
    row = found["blk.1.ffn_down.weight"]
    values = gguf.quants.dequantize(row.data, row.tensor_type)
    assert torch.tensor(values).equal(model.model.layers[1].mlp.down_proj.weight.float())
    assert found["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize(
    ("bits", "symmetric", "kind"),
    [
        (2, True, "Q4_0"),
        (4, True, "Q4_0"),
        (5, True, "Q5_0"),
        (8, True, "Q8_0"),
        (4, False, "Q4_1"),
        (5, False, "Q5_1"),
        (8, False, ""),
    ],
)
def test_codes_become_blocks(bits: int, symmetric: bool, kind: str) -> None:
    torch.manual_seed(0)
    linear = PackedLinear.quantise(torch.nn.Linear(192, 6), bits, 64, symmetric)
    found = blocks_of(linear)
    if not kind:
        assert found is None
        return
    assert found is not None and found[0] == kind
    values = gguf.quants.dequantize(found[1].numpy(), gguf.GGMLQuantizationType[kind])
    dense = linear.dense_weight(torch.float32)
    if symmetric:
        assert np.array_equal(values, dense.numpy())
    else:  # scale x zero point is rounded to float16
        torch.testing.assert_close(torch.tensor(values), dense, atol=2e-4, rtol=0)


def test_a_group_that_no_block_divides_is_not_kept() -> None:
    assert blocks_of(PackedLinear.quantise(torch.nn.Linear(192, 6), 4, 48, True)) is None
    assert blocks_of(PackedLinear.quantise(torch.nn.Linear(40, 6), 4, 32, True)) is None
    assert blocks_of(torch.nn.Linear(64, 6)) is None


def test_what_llama_cpp_would_compute_otherwise_is_refused() -> None:
    for config, why in (
        (Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1), "sliding"),
        (
            LlamaConfig(
                **SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
            ),
            "yarn",
        ),
        (Gemma2Config(**GEMMA, layer_types=["full_attention"] * 2), "windows in other layers"),
        (Gemma2Config(**{**GEMMA, "query_pre_attn_scalar": 64}), "another query_pre_attn_scalar"),
        (Gemma2Config(**GEMMA, final_logit_softcapping=None), "other caps of logits"),
        (Gemma2Config(**GEMMA, tie_word_embeddings=False), "a head of its own"),
        (Gemma3TextConfig(**GEMMA, attn_logit_softcapping=50.0), "other caps of logits"),
        (Gemma3TextConfig(**GEMMA, hidden_activation="silu"), "another activation"),
        (Gemma3TextConfig(**GEMMA, rope_parameters=LOCAL), "another rope_theta of windows"),
        (MixtralConfig(**SIZES, sliding_window=8), "sliding window"),
        (Qwen2MoeConfig(**EXPERTS, mlp_only_layers=[0]), "layers without experts"),
        (Qwen3MoeConfig(**EXPERTS, norm_topk_prob=False), "norm_topk_prob the other way"),
        (GPTNeoXConfig(**NEOX, attention_bias=False), "attention without biases"),
        (GPTNeoXConfig(**NEOX, hidden_act="relu"), "activation relu"),
    ):
        with pytest.raises(UserError, match=why):
            require_known(config)


def test_how_texts_are_cut_is_found_by_what_cuts_them() -> None:
    level = {"type": "ByteLevel", "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    for model, pre, name in (
        ({"type": "BPE"}, level, "gpt-2"),
        ({"type": "BPE"}, {"type": "Sequence", "pretokenizers": [digits, level]}, "smollm"),
        ({"type": "BPE", "byte_fallback": True}, {}, "spm"),
        ({"type": "Unigram"}, level, ""),
        ({"type": "BPE"}, {"type": "Whitespace"}, ""),
    ):
        assert pre_tokenizer_of({"model": model, "pre_tokenizer": pre}) == name


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("text", ["The capital of France is", "def add(a, b):\n    return"])
def test_llama_cpp_decodes_the_same_tokens(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The wheel is no dependency: `pip install xllamacpp`."""
    llama = pytest.importorskip("xllamacpp")
    spec = compose("eval", ["model=smollm2-135m", "dataset=arithmetic"]).spec.model
    loaded = models.load(spec, device="cpu", dtype=torch.float32)
    folder = tmp_path_factory.mktemp("gguf")
    written = write_gguf(loaded.model, loaded.tokenizer, folder / "x.gguf")
    assert written.tokens == "gpt-2"
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    own = loaded.model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    params = llama.CommonParams()
    params.model.path = str(folder / "x.gguf")
    params.n_ctx, params.warmup, params.n_gpu_layers = 256, False, 0
    server = llama.Server(params)
    asked = {"prompt": text, "max_tokens": 24, "temperature": 0.0, "return_tokens": True}
    answer = server.handle_completions(asked)
    assert answer["choices"][0]["text"] == loaded.tokenizer.decode(own, skip_special_tokens=True)
