"""A plain model and its tokenizer as one GGUF file, which llama.cpp and what is built on it read.

Names, the order of rotary halves in `llama` and the layout of blocks are those of llama.cpp's
convert_hf_to_gguf.py and ggml-common.h. Codes of round-to-nearest weights become ggml's blocks
where these hold them: a block of 32 has one float16 scale, so a group must be a multiple of 32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effbench.util.errors import UserError
from effbench.util.lazy import torch

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gpt2": "gpt2",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt_neox": "gptneox",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
"""From transformers' model types to llama.cpp's."""
SLIDING = {"gemma2": 2, "gemma3_text": 6}
"""Of so many layers the last sees all before it, and the others a window; llama.cpp knows no other
order, and scales attention by the width of a head."""
FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
"""`general.file_type` of what the matrices are held in (llama.h, enum llama_ftype)."""
BLOCK = 32
"""Weights of a block."""
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
"""Names that llama.cpp has for the expressions that cut a text before it is made tokens."""


@dataclass(frozen=True)
class Written:
    """What became of a model in a GGUF file."""

    kept: int = 0
    """Packed linears that kept their codes, as ggml's blocks."""
    tokens: str = ""
    """How the file says that texts are cut; empty when it holds no tokenizer."""


def require_known(config: Any) -> None:
    """Refuse a model that llama.cpp would not compute as transformers does, or that is not known.

    Raises:
        UserError: With those that are.
    """
    kind = config.model_type
    known = f"GGUF is written for: {', '.join(ARCHITECTURES)}. Leave --to gguf out."
    if kind not in ARCHITECTURES:
        raise UserError(f"A {kind} model is not written as GGUF.", known)
    if kind in SLIDING:
        _require_gemma(config, known)
    elif any(k != "full_attention" for k in getattr(config, "layer_types", None) or ()) or (
        kind in ("mistral", "phi3", "mixtral") and config.sliding_window
    ):
        raise UserError("Layers with a sliding window are not written as GGUF.", known)
    for wrong, what in _unusual(config):
        if wrong:
            raise UserError(f"A {kind} model with {what} is not written.", known)
    rope = _rope(config).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3"):
        raise UserError(f"Rotary positions of type {rope!r} are not written as GGUF.", known)


def _unusual(config: Any) -> list[tuple[bool, str]]:
    """Return what llama.cpp takes for granted, and whether it is otherwise."""
    kind = config.model_type
    if kind == "gpt_neox":
        return [
            (config.tie_word_embeddings, "a head that is its embedding"),
            (not config.attention_bias, "attention without biases"),
            (not config.hidden_act.startswith("gelu"), f"activation {config.hidden_act}"),
        ]
    if kind not in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return []
    found = [(config.hidden_act != "silu", f"activation {config.hidden_act}")]
    if kind != "mixtral":
        dense = bool(config.mlp_only_layers) or config.decoder_sparse_step != 1
        summed = config.norm_topk_prob != (kind == "qwen3_moe")
        found += [(dense, "layers without experts"), (summed, "norm_topk_prob the other way")]
    return found


def _require_gemma(config: Any, known: str) -> None:
    """Refuse a Gemma 2 or 3 in which something is otherwise than llama.cpp has it."""
    every, two = SLIDING[config.model_type], config.model_type == "gemma2"
    layers = range(1, config.num_hidden_layers + 1)
    kinds = [("sliding" if n % every else "full") + "_attention" for n in layers]
    local = (config.rope_parameters or {}).get("sliding_attention") or {"rope_theta": 10000.0}
    caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    for wrong, what in (
        (list(config.layer_types) != kinds, "windows in other layers"),
        (config.query_pre_attn_scalar != config.head_dim, "another query_pre_attn_scalar"),
        (None in caps if two else caps != (None, None), "other caps of logits"),
        (local["rope_theta"] != 10000.0, "another rope_theta of windows"),
        (two and not config.tie_word_embeddings, "a head of its own"),
        (config.hidden_activation != "gelu_pytorch_tanh", "another activation"),
    ):
        if wrong:
            raise UserError(f"A {config.model_type} model with {what} is not written.", known)


def _rope(config: Any) -> dict[str, Any]:
    """Return the settings of rotary positions; those of layers that see all before them."""
    rope = getattr(config, "rope_parameters", None) or {}
    return dict(rope.get("full_attention") or rope)


def write_gguf(
    model: Any,
    tokenizer: Any,
    path: Path,
    packed: Mapping[str, Any] | None = None,
    name: str = "",
) -> Written:
    """Write a model into a new file.

    Args:
        model: Of transformers' own class, on the CPU.
        tokenizer: Its tokenizer.
        path: The file.
        packed: Round-to-nearest linears by name, whose codes are kept where a format holds them.
        name: What the file says that it is.

    Raises:
        UserError: For an architecture that is not known.
    """
    import gguf

    require_known(model.config)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[model.config.model_type])
    _write_sizes(writer, model, name)
    tokens = _write_tokens(writer, tokenizer, model.config.vocab_size)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[ARCHITECTURES[model.config.model_type].upper()],
        model.config.num_hidden_layers,
    )
    kept = 0
    for own, tensor in _each(model):
        theirs = str(names.get_name(own, try_suffixes=(".weight", ".bias")))
        blocks = blocks_of((packed or {}).get(own.removesuffix(".weight")))
        if blocks is not None:
            kind, rows = blocks
            ordered = _in_pairs(own, rows, model.config).contiguous().numpy()
            writer.add_tensor(theirs, ordered, raw_dtype=gguf.GGMLQuantizationType[kind])
            kept += 1
        else:
            _add(writer, theirs, _laid_out(own, tensor, model.config))
    _write_rope(writer, model.config)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return Written(kept, tokens)


def _each(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors with their names, those of all experts of a layer as three of them, [E, o, i].

    Gates of experts are float32, whatever the other weights are.
    """
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name.endswith("experts.gate_up_proj"):
            for part, own in zip(("gate_proj", "up_proj"), tensor.chunk(2, 1), strict=True):
                yield f"{name.removesuffix('gate_up_proj')}{part}.weight", own
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", tensor
        elif name.endswith("mlp.shared_expert_gate.weight"):
            yield name, tensor[0]
        else:
            yield name, tensor.float() if name.endswith("mlp.gate.weight") else tensor


def _add(writer: Any, name: str, tensor: torch.Tensor) -> None:
    """Add a dense tensor; vectors are always float32."""
    import gguf

    if tensor.ndim == 1:
        tensor = tensor.float()
    if tensor.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, tensor.contiguous().view(torch.uint8).numpy(), raw_dtype=kind)
    else:
        writer.add_tensor(name, tensor.contiguous().numpy())


def _laid_out(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """Return a tensor as llama.cpp holds it: matrices [d_out, d_in], norms with all gain."""
    if config.model_type == "gpt2" and tensor.ndim == 2 and ".h." in name:
        return tensor.t()
    if config.model_type.startswith("gemma") and tensor.ndim == 1:
        return tensor.float() + 1
    if config.model_type == "gpt_neox" and ".query_key_value." in name:
        # Queries, keys and values of one head after the other become those of all heads.
        heads = tensor.view(config.num_attention_heads, 3, -1, *tensor.shape[1:])
        return heads.transpose(0, 1).reshape(tensor.shape)
    return _in_pairs(name, tensor, config)


def _in_pairs(name: str, rows: torch.Tensor, config: Any) -> torch.Tensor:
    """Return the rows of a matrix in the order that llama.cpp has for rotary pairs.

    Its `llama` turns neighbouring rows of a head together, transformers' the two halves.
    """
    if ARCHITECTURES[config.model_type] != "llama":
        return rows
    part = name.split(".")[-2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if part not in heads:
        return rows
    halves = rows.reshape(heads[part], 2, rows.shape[0] // heads[part] // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


# -- sizes -------------------------------------------------------------------------------------


def _write_sizes(writer: Any, model: Any, name: str) -> None:
    config = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(name or config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    writer.add_feed_forward_length(inner or 4 * config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    elif config.model_type == "gpt_neox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
        _write_positions(writer, config, width)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        _write_positions(writer, config, width)
    if config.model_type in SLIDING:
        _write_windows(writer, config)
    _write_experts(writer, config)
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    writer.add_file_type(FILE_TYPES[dtype])


def _write_experts(writer: Any, config: Any) -> None:
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not count:
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type != "mixtral":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _write_windows(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_positions(writer: Any, config: Any, width: int) -> None:
    rope = _rope(config)
    writer.add_rope_dimension_count(int(width * (rope.get("partial_rotary_factor") or 1)))
    writer.add_rope_freq_base(float(rope.get("rope_theta") or 10000.0))
    if rope.get("rope_type") == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _write_rope(writer: Any, config: Any) -> None:
    """Add what Llama 3's scaling divides each rotary frequency by, [head_dim / 2]."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    writer.add_tensor("rope_freqs.weight", (plain / scaled.double()).float().numpy())


# -- codes -------------------------------------------------------------------------------------


def blocks_of(linear: Any) -> tuple[str, torch.Tensor] | None:
    """Return a round-to-nearest matrix as ggml's blocks, or None where no format holds its codes.

    Args:
        linear: A packed linear, or anything else.

    Returns:
        The format's name, and [d_out, bytes of a row] uint8. `Q4_0`, `Q5_0` and `Q8_0` hold
        symmetric codes as they are; `Q4_1` and `Q5_1` round scale x zero point to float16.
    """
    from effbench.nn.quant.linears import PackedLinear
    from effbench.nn.quant.packing import unpack

    if not isinstance(linear, PackedLinear):
        return None
    kind = _format_for(linear.bits, linear.symmetric)
    if linear.in_features % BLOCK or linear.group_size % BLOCK or not kind:
        return None
    rows, groups = linear.scales.shape
    codes = unpack(linear.codes.cpu(), linear.bits, rows * linear.in_features)
    codes = codes.view(rows, -1, BLOCK).to(torch.int16)
    each = linear.group_size // BLOCK
    count = codes.shape[1]
    scales = linear.scales.cpu().repeat_interleave(each, 1)[:, :count]
    head = [scales]
    if linear.zeros is None:
        codes = codes + _middle(kind) - (2 ** (linear.bits - 1) - 1)
    else:
        zeros = unpack(linear.zeros.cpu(), linear.bits, rows * groups).view(rows, groups)
        zeros = zeros.repeat_interleave(each, 1)[:, :count]
        head.append((-scales.float() * zeros).to(torch.float16))
    parts = [h.contiguous().view(torch.uint8).view(rows, count, 2) for h in head]
    return kind, torch.cat([*parts, *_digits(kind, codes)], 2).view(rows, -1)


def _format_for(bits: int, symmetric: bool) -> str:
    """Return the smallest format that holds all codes; empty when none does."""
    if bits > 5:
        return "Q8_0" if symmetric else ""
    return f"Q{max(4, bits)}_{0 if symmetric else 1}"


def _middle(kind: str) -> int:
    return {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}[kind]


def _digits(kind: str, codes: torch.Tensor) -> list[torch.Tensor]:
    """Return codes [rows, blocks, 32] as the bytes of a block, in the order that they stand in."""
    if kind == "Q8_0":
        return [codes.to(torch.int8).view(torch.uint8)]
    low = codes & 15
    nibbles = (low[..., :16] | low[..., 16:] << 4).to(torch.uint8)
    if kind.startswith("Q4"):
        return [nibbles]
    bits = (codes >> 4 & 1).view(*codes.shape[:2], 4, 8)
    high = (bits << torch.arange(8, dtype=torch.int16)).sum(3).to(torch.uint8)
    return [high, nibbles]


# -- tokens ------------------------------------------------------------------------------------


def _write_tokens(writer: Any, tokenizer: Any, vocab_size: int) -> str:
    """Write the vocabulary; return the name of how texts are cut, empty where it is not known."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    values = json.loads(inner.to_str()) if inner is not None else {}
    kind = pre_tokenizer_of(values)
    if not kind:
        writer.add_tokenizer_model("none")
        return ""
    tokens, types = _vocabulary(tokenizer, vocab_size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in values["model"].get("merges") or ()]
    if kind == "spm":
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix("Prepend" in json.dumps(values.get("normalizer")))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _write_special(writer, tokenizer)
    return kind


def _write_special(writer: Any, tokenizer: Any) -> None:
    for name in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    first = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(bool(first) and first == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer_of(values: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer cuts texts: `spm` for pieces of SentencePiece.

    Args:
        values: Its `tokenizer.json`.

    Returns:
        Empty where llama.cpp has no name for it.
    """
    model, pre = values.get("model") or {}, values.get("pre_tokenizer") or {}
    if model.get("type") != "BPE":
        return ""
    if model.get("byte_fallback"):
        return "spm"
    steps = pre.get("pretokenizers") or [pre]
    kinds = [step.get("type") for step in steps]
    patterns = [(step.get("pattern") or {}).get("Regex") for step in steps]
    if kinds == ["Split", "ByteLevel"]:
        return SPLITS.get(str(patterns[0]), "")
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm" if steps[1].get("use_regex", True) else ""
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    return ""


def _vocabulary(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """Return the tokens by number, and what kind each is (gguf.TokenType)."""
    import gguf

    known = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(size):
        token, kind = known.get(number), gguf.TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{number}]", gguf.TokenType.UNUSED
        elif number in added:
            special = added[number].special
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        elif token.startswith("<0x") and len(token) == 6:
            kind = gguf.TokenType.BYTE
        if number == tokenizer.unk_token_id and kind == gguf.TokenType.NORMAL:
            kind = gguf.TokenType.UNKNOWN
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return the score of each token: the earlier it is merged, the higher."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]
