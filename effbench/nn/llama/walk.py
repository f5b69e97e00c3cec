"""Models that are laid out as Llama is, and the modules of which their blocks are made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch

from effbench.nn.llama.parts import MLP, Attention, Block, attention_of, mlp_of, offers
from effbench.nn.llama.shared_attention import hands_down
from effbench.nn.llama.stack import slides

FAMILIES = ("Llama", "Mistral", "Qwen2")
"""Families of transformers whose blocks compute what Llama's do (biases aside)."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary positions whose angles depend on nothing but the position."""
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""Implementations of one and the same attention."""


def blocks_of(model: Any) -> list[Block]:
    """Return the blocks of a model laid out as Llama is, sliced or not."""
    return [Block(_attention(layer), _mlp(layer)) for layer in model.model.layers]


def _attention(layer: Any) -> Attention | None:
    own, norm = layer.self_attn, layer.input_layernorm
    part: Attention | None = own.decode_part(norm) if offers(own) else attention_of(own, norm)
    return part


def _mlp(layer: Any) -> MLP | None:
    own, norm = layer.mlp, layer.post_attention_layernorm
    part: MLP | None = own.decode_part(norm) if offers(own) else mlp_of(own, norm)
    return part


def is_llama(model: torch.nn.Module) -> bool:
    """Whether the model is of a class of transformers whose blocks compute what Llama's do."""
    family = type(model).__name__.removesuffix("ForCausalLM")
    return family in FAMILIES and type(model).__module__.startswith("transformers.models.")


def why_not(model: torch.nn.Module, mixers: bool = False) -> str:
    """Return what keeps a step from walking through `model`'s blocks; empty when nothing does.

    The last norm may be watched, for a step calls it as the module that it is unless all is plain.

    Args:
        model: Any.
        mixers: Whether blocks may mix values otherwise than by a softmax over scores.
    """
    if not is_llama(model):
        return f"{type(model).__name__} is not laid out as Llama is"
    family = type(model).__name__.removesuffix("ForCausalLM")
    if model.training:
        return "the model is in train mode"
    if reason := _config_reason(model):
        return reason
    inner: Any = model.model
    for module, kind in _containers(model):
        if offers(module):
            if reason := cast(Any, module).why_not_stepped():
                return str(reason)
        elif type(module).__name__ != family + kind:
            return f"a {type(module).__name__} stands where a {family + kind} should"
        known = module is inner.norm or (module is inner and hands_down(inner))
        if not untouched(module) and not known:
            return f"the forward pass of a {type(module).__name__} is changed or watched"
    attending = [part for layer in inner.layers if (part := _attention(layer)) is not None]
    if not attending:
        return "none of its layers attends"
    if not mixers and any(part.mixer for part in attending):
        return "some layers keep a state instead of keys"
    return "" if all(map(_whole_heads, attending)) else "it lacks some heads"


def _whole_heads(part: Attention) -> bool:
    """Whether keys and values have the same whole heads, and queries as many for each of them."""
    if part.source is not None:
        return True  # its source has them
    q, k, v = (getattr(m, "out_features", 0) for m in (part.q, part.k, part.v))
    whole = k > 0 and k % part.head_dim == 0
    return whole and k == v and q == k * part.groups


def _config_reason(model: Any) -> str:
    config = model.config
    if slides(config):
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
