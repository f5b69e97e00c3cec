"""Linear attention in the place of Llama's: its projections, and a state for its keys and values.

For what enters a layer, x [B, T, d_model], with q, k and v projected and turned as before,

    Y = products of phi(q), phi(k), v      per query head: `products`, `features`, `decay`
    out = W_o (norm(Y) * silu(W_g x))      norm over each head's d features

Norm and gate are Retentive Network's (arXiv 2307.08621). There is no denominator and no
1 / sqrt(d): the norm takes every scale out. Features, products, state and norm are computed in
float32, whatever the compute dtype is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from effbench.nn.linear_attention import native, products, triton_products
from effbench.nn.linear_attention.decay import Decay, Fading
from effbench.nn.linear_attention.features import FeatureMap, Features, Projection, directions
from effbench.nn.linear_attention.state import state_of
from effbench.nn.llama.parts import Attention
from effbench.nn.llama.stack import decoder_layers
from effbench.nn.llama.weights import cast_parameters
from effbench.util.cpp import why_off
from effbench.util.hardware import has_triton

GATE_GAIN = 2**-2.5
"""Gain of the Xavier-uniform start of W_g, that of DiJiang's code."""


@dataclass(frozen=True)
class Design:
    """How a linear attention is made."""

    features: Features = "softmax"
    projection: Projection = "dct"
    weighted: bool = True
    """Whether directions are scaled by normal quantiles."""
    decay: Fading = "fixed"
    gate: bool = True
    """Whether there is a W_g."""
    author_groups: bool = False
    """Whether the norm has as many groups as a head has features, rather than one a head."""
    eps: float = 1e-5
    """Of the norm."""


class LinearAttention(nn.Module):
    """Llama's attention with feature maps, a decay and a state.

    Args:
        whole: What its projections and settings are taken from.
        design: How it is made.
        draws: Of directions and W_g.
    """

    def __init__(self, whole: Any, design: Design, draws: torch.Generator) -> None:
        super().__init__()
        self.config, self.head_dim, self.layer_idx = whole.config, whole.head_dim, whole.layer_idx
        self.q_proj, self.k_proj = whole.q_proj, whole.k_proj
        self.v_proj, self.o_proj = whole.v_proj, whole.o_proj
        width, size = self.q_proj.out_features, self.head_dim
        heads, self.kv_heads = width // size, self.k_proj.out_features // size
        p = directions(design.features, design.projection, design.weighted, size, draws)
        self.features = FeatureMap(design.features, p)
        positions = whole.config.max_position_embeddings
        self.decay = Decay(design.decay, self.kv_heads, positions)
        self.norm = nn.GroupNorm(size if design.author_groups else heads, width, design.eps)
        self.g_proj = _gate(self.q_proj.in_features, width, draws) if design.gate else None
        weight = self.q_proj.weight
        cast_parameters(self, weight.dtype)
        self.to(weight.device)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return the output [B, T, d_model], and no attention weights."""
        assert position_embeddings is not None
        q, k, v = self._projected(hidden_states, *position_embeddings)
        with torch.autocast(q.device.type, enabled=False):
            q, k = self._mapped(q, k, position_ids)
            real = real_tokens(attention_mask, k.shape[2])
            if real is not None:
                k = k * real[:, None, :, None]
            mixed = self._normed(self._advanced(q, k, v.to(k.dtype), past_key_values))
        if self.g_proj is not None:
            mixed = mixed * F.silu(self.g_proj(hidden_states))
        return self.o_proj(mixed.to(hidden_states.dtype)), None

    # -- token by token ------------------------------------------------------------------------

    def decode_part(self, norm: Any) -> Attention:
        """Return the projections, and itself for what is between them."""
        groups = self.q_proj.out_features // (self.kv_heads * self.head_dim)
        projections = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        scale = self.head_dim**-0.5  # of no scores, but that of blocks that have some
        return Attention(norm, *projections, self.head_dim, scale, groups, mixer=self)

    def why_not_stepped(self) -> str:
        """Return that nothing keeps a step from it."""
        return ""

    def mixed(
        self,
        inputs: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        cache: Cache,
        product: Callable[[nn.Linear, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Return what the output projection reads; see `effbench.nn.llama.parts.Mixes`."""
        if native.applies(states[0]):
            found = self._stepped(states, positions, cache)
        else:
            q, k = self._mapped(*states[:2], positions)
            found = self._normed(self._advanced(q, k, states[2].to(k.dtype), cache))
        if self.g_proj is not None:
            found = found * F.silu(product(self.g_proj, inputs))
        return found.to(inputs.dtype)

    def _stepped(
        self,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        cache: Cache,
    ) -> torch.Tensor:
        """Return the normed output of a step by the kernel, [B, 1, H d]."""
        entry = state_of(cache, self.layer_idx)
        decays = self.decay.factors(positions), self.decay.rates()
        found, state = native.step(states, self.features, *decays, self.norm, entry.state)
        entry.put(state, 1)
        return found

    # -- its parts -----------------------------------------------------------------------------

    def _projected(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries [B, H, T, d], keys and values [B, G, T, d], turned as Llama turns them."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (project(hidden).view(shape).transpose(1, 2) for project in projections)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k, v

    def _mapped(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features of queries, [B, G, R, T, d], and of keys, [B, G, T, d]."""
        q = self.features(q).unflatten(1, (self.kv_heads, -1))
        k = self.features(k)
        factors = None if positions is None else self.decay.factors(positions)
        return (q, k) if factors is None else (q * factors[0][:, :, None], k * factors[1])

    def _advanced(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        """Return Y, [B, G, R, T, d], and keep the state after it in the cache."""
        gamma = self.decay.rates().to(q.dtype)
        y: torch.Tensor
        form = forms(q.device, q.dtype)
        if cache is None:
            y, _ = form.chunked(q, k, v, gamma, ends=True)
            return y
        entry = state_of(cache, self.layer_idx)
        advance = form.step if k.shape[2] == 1 else form.chunked
        y, state = advance(q, k, v, gamma, entry.state)
        assert state is not None
        entry.put(state, k.shape[2])
        return y

    def _normed(self, y: torch.Tensor) -> torch.Tensor:
        """Return the normed output of all heads side by side, [B, T, H d]."""
        side = y.permute(0, 3, 1, 2, 4).flatten(2)
        own = self.norm
        weight, bias = own.weight.to(y.dtype), own.bias.to(y.dtype)
        normed = F.group_norm(side.flatten(0, 1), own.num_groups, weight, bias, own.eps)
        return normed.view_as(side)


def forms(device: torch.device, dtype: torch.dtype) -> Any:
    """Return the module whose `chunked` and `step` such features go through.

    Triton's on a CUDA device where nothing wants a gradient; EFFBENCH_NATIVE=0 turns it off.
    """
    fits = device.type == "cuda" and dtype == torch.float32 and not torch.is_grad_enabled()
    return triton_products if fits and has_triton() and not why_off() else products


def _gate(d_in: int, d_out: int, draws: torch.Generator) -> nn.Linear:
    """Return W_g, drawn on the CPU in float32."""
    linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=False)
    nn.init.xavier_uniform_(linear.weight, GATE_GAIN, generator=draws)
    return linear


def real_tokens(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Return which of the last `length` tokens are no padding, [B, T] bool; None for all.

    Args:
        mask: As attention has it: [B, S], or [B, 1, T, S], of booleans or added to scores.
        length: Tokens that come in, T.
    """
    if mask is None:
        return None
    if mask.ndim == 4:
        last = mask[:, 0, -1, -length:]
        return last if last.dtype == torch.bool else last == 0
    return mask[:, -length:].bool()


def convert(model: Any, layers: Collection[int], design: Design, seed: int) -> nn.Module:
    """Put linear attention into some layers of a Llama, in place; `config.state_layers` lists them.

    Args:
        model: Laid out as Llama is.
        layers: Which.
        design: How each is made.
        seed: Of what is drawn, which depends on nothing else but the layer's number.
    """
    blocks = decoder_layers(model)
    for index in layers:
        block: Any = blocks[index]
        block.self_attn = LinearAttention(block.self_attn, design, _draws(seed, index))
    if layers:
        model.config.state_layers = sorted(layers)
    whole: nn.Module = model
    return whole


def _draws(seed: int, layer: int) -> torch.Generator:
    number = hashlib.sha256(f"{seed}:linear attention:{layer}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(number, "little") >> 1)


def directions_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the fixed directions of all layers that have some, by their names in the model."""
    return {
        f"{name}.directions": module.directions
        for name, module in model.named_modules()
        if isinstance(module, FeatureMap) and module.directions is not None
    }
