"""Models that are laid out as Llama is, and the modules of which their blocks are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from effbench.nn.llama.attention import NoAttention, NoMLP, SlicedAttention
from effbench.nn.llama.shared_attention import SharingAttention, hands_down

FAMILIES = ("Llama", "Mistral", "Qwen2")
"""Families of transformers whose blocks compute what Llama's do (biases aside)."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary positions whose angles depend on nothing but the position."""
OURS = {"Attention": (SlicedAttention, NoAttention, SharingAttention), "MLP": (NoMLP,)}
"""What slicing and sharing put in the place of modules of transformers, by kind."""
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""Implementations of one and the same attention."""


@dataclass(frozen=True)
class Attention:
    """The modules of one block's attention, in the order they run.

    Those whose states come from another block are None.
    """

    norm: Any
    q: Any
    k: Any
    v: Any
    o: Any
    head_dim: int
    scaling: float
    """What scores are multiplied by."""
    groups: int
    """Query heads of each key/value head."""
    source: int | None = None
    """The block that the states come from which it does not make."""

    def linears(self) -> tuple[torch.nn.Module, ...]:
        """Return the linears that are there."""
        return tuple(m for m in (self.q, self.k, self.v, self.o) if m is not None)

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.o.in_features) // self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.heads // self.groups


@dataclass(frozen=True)
class MLP:
    """The modules of one block's gated MLP, in the order they run."""

    norm: Any
    gate: Any
    up: Any
    down: Any

    def linears(self) -> tuple[torch.nn.Module, ...]:
        """Return the three linears."""
        return self.gate, self.up, self.down

    @property
    def inner(self) -> int:
        """Neurons."""
        return int(self.gate.out_features)


@dataclass(frozen=True)
class Block:
    """A decoder block. What was pruned away altogether is None."""

    attention: Attention | None
    mlp: MLP | None

    def parts(self) -> list[Attention | MLP]:
        """Return what is there, in the order it runs."""
        return [part for part in (self.attention, self.mlp) if part is not None]


def blocks_of(model: Any) -> list[Block]:
    """Return the blocks of a model laid out as Llama is, sliced or not."""
    return [Block(_attention(layer), _mlp(layer)) for layer in model.model.layers]


def _attention(layer: Any) -> Attention | None:
    own = layer.self_attn
    if isinstance(own, NoAttention):
        return None
    q, k, v, o = (getattr(own, f"{n}_proj", None) for n in "qkvo")
    takes = isinstance(own, SharingAttention) and own.takes
    return Attention(
        layer.input_layernorm,
        q,
        k,
        v,
        o,
        own.head_dim,
        own.scaling,
        own.num_key_value_groups,
        own.source if takes else None,
    )


def _mlp(layer: Any) -> MLP | None:
    own = layer.mlp
    if isinstance(own, NoMLP):
        return None
    return MLP(layer.post_attention_layernorm, own.gate_proj, own.up_proj, own.down_proj)


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
    inner: Any = model.model
    for module, kind in _containers(model):
        if type(module).__name__ != family + kind and type(module) not in OURS.get(kind, ()):
            return f"a {type(module).__name__} stands where a {family + kind} should"
        known = module is inner.norm or (module is inner and hands_down(inner))
        if not untouched(module) and not known:
            return f"the forward pass of a {type(module).__name__} is changed or watched"
    attending = [x.self_attn for x in inner.layers if type(x.self_attn) is not NoAttention]
    if not attending:
        return "none of its layers attends"
    if any(isinstance(m, SharingAttention) and m.undecided for m in attending):
        return "some of its layers are half converted, or hand attention maps on"
    return "" if all(map(_whole_heads, attending)) else "it lacks some heads"


def _whole_heads(attention: Any) -> bool:
    """Whether keys and values have the same whole heads, and queries as many for each of them."""
    if isinstance(attention, SharingAttention) and attention.takes:
        return True  # its source has them
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (getattr(m, "out_features", 0) for m in projections)
    whole = k > 0 and k % attention.head_dim == 0
    return whole and k == v and q == k * attention.num_key_value_groups


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
