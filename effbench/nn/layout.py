"""Models that are laid out as Llama is, and the modules of which their blocks are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

FAMILIES = ("Llama", "Mistral", "Qwen2")
"""Families of transformers whose blocks compute what Llama's do (biases aside)."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary positions whose angles depend on nothing but the position."""
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""Implementations of one and the same attention."""


@dataclass(frozen=True)
class Block:
    """The modules of one decoder block, in the order they run."""

    attention_norm: Any
    q: torch.nn.Module
    k: torch.nn.Module
    v: torch.nn.Module
    o: torch.nn.Module
    mlp_norm: Any
    gate: torch.nn.Module
    up: torch.nn.Module
    down: torch.nn.Module

    def linears(self) -> tuple[torch.nn.Module, ...]:
        """Return the seven linears."""
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down


def blocks_of(model: Any) -> list[Block]:
    """Return the blocks of a model laid out as Llama is."""
    return [
        Block(
            layer.input_layernorm,
            layer.self_attn.q_proj,
            layer.self_attn.k_proj,
            layer.self_attn.v_proj,
            layer.self_attn.o_proj,
            layer.post_attention_layernorm,
            layer.mlp.gate_proj,
            layer.mlp.up_proj,
            layer.mlp.down_proj,
        )
        for layer in model.model.layers
    ]


def why_not(model: torch.nn.Module) -> str:
    """Return what keeps a step from walking through `model`'s blocks; empty when nothing does.

    The last norm may be watched, for a step calls it as the module that it is unless all is plain.
    """
    name = type(model).__name__
    family = name.removesuffix("ForCausalLM")
    ours = type(model).__module__.startswith("transformers.models.")
    if family not in FAMILIES or not ours:
        return f"{name} is not laid out as Llama is"
    if model.training:
        return "the model is in train mode"
    if reason := _config_reason(model):
        return reason
    last: Any = model.model.norm
    for module, kind in _containers(model):
        if type(module).__name__ != family + kind:
            return f"a {type(module).__name__} stands where a {family + kind} should"
        if not untouched(module) and module is not last:
            return f"the forward pass of a {type(module).__name__} is changed or watched"
    return "" if all(_whole_heads(model, b) for b in blocks_of(model)) else "it lacks some heads"


def _whole_heads(model: Any, block: Block) -> bool:
    """Whether queries, keys and values of a block have all heads that the config states."""
    width, config = model.model.layers[0].self_attn.head_dim, model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    projections: Any = (block.q, block.k, block.v)
    return [getattr(m, "out_features", 0) for m in projections] == [
        width * n for n in (heads, kv_heads, kv_heads)
    ]


def _config_reason(model: Any) -> str:
    config = model.config
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "sliding_window", None) is not None
    if any(k != "full_attention" for k in kinds) if kinds else slides:
        return "some layers see a sliding window"
    if config.hidden_act != "silu":
        return f"its MLP has {config.hidden_act}"
    if config._attn_implementation not in ATTENTION:
        return f"its attention is {config._attn_implementation}"
    rope = getattr(model.model.rotary_emb, "rope_type", "")
    return "" if rope in STATIC_ROPE else f"its rotary positions are {rope or 'unknown'}"


def _containers(model: Any) -> Iterator[tuple[torch.nn.Module, str]]:
    """Yield the modules that a step passes over, with the kind that each has to be."""
    inner = model.model
    yield model, "ForCausalLM"
    yield inner, "Model"
    yield inner.norm, "RMSNorm"
    yield inner.rotary_emb, "RotaryEmbedding"
    for layer in inner.layers:
        yield layer, "DecoderLayer"
        yield layer.self_attn, "Attention"
        yield layer.mlp, "MLP"
        yield layer.input_layernorm, "RMSNorm"
        yield layer.post_attention_layernorm, "RMSNorm"


def untouched(module: torch.nn.Module) -> bool:
    """Whether calling the module runs its class's `forward` and nothing else."""
    watched = module._forward_hooks or module._forward_pre_hooks
    return not watched and "forward" not in vars(module)


def plain(module: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether the module is y = W x + b with a dense W in `dtype`."""
    if type(module) is not torch.nn.Linear or not untouched(module):
        return False
    parts = [module.weight] if module.bias is None else [module.weight, module.bias]
    return all(p.dtype == dtype and p.is_contiguous() for p in parts)


def fresh_norm(norm: Any, dtype: torch.dtype) -> torch.nn.Module:
    """Return an RMS norm with a copy of a norm's weight in `dtype`, which nothing watches."""
    new: torch.nn.Module = type(norm)(len(norm.weight), eps=norm.variance_epsilon)
    new.weight = torch.nn.Parameter(norm.weight.detach().to(dtype, copy=True))
    return new.train(norm.training)
