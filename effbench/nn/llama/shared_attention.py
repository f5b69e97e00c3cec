"""Layers that take keys and values, or the attention map, from an earlier layer.

The states go from layer to layer in a dictionary that lives for one forward pass and is handed down
as an argument (as transformers' Gemma does it), so that nothing of a pass stays on a module and
gradients reach the layer that made the states. What a consumer has no use for is removed from it.
A consumer may also be on its way: with a in [0, 1] it computes

    (1 - a) own + a taken

of both states, which is the unchanged layer at a = 0 and the converted one at a = 1.

Caches number their entries by the layers that have one. In `kv` mode consumers have none; in `qk`
mode theirs holds values alone (`ValueLayer`). All sources have equal lengths, so one mask is right
for every layer; layer 0 always makes its own states, for lengths and masks are taken from it.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    eager_attention_forward,
    rotate_half,
)

from effbench.api.shape import AnyShape, ModelShape
from effbench.api.sharing import TAKEN, LayerMap, Mode, shared_shape, written
from effbench.nn.llama.attention import require_llama
from effbench.nn.llama.parts import Attention, attention_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
States = tuple[torch.Tensor, ...]
"""What a source gives. `kv`: keys and values of the new positions, keys and values of all. `qk`:
queries and keys of the new positions, keys of all, and the attention map where it is copied."""
SharedStates = UserDict[str, States]
"""What each source gave in one forward pass; no `dict`, so that nothing copies it on the way."""


class ValueLayer(DynamicLayer):
    """A growing cache of values [B, H_kv, T, D] whose keys have no width.

    transformers takes a layer's length from its keys, and would leave this one out of reordering.
    """

    def get_seq_length(self) -> int:
        """Return the cached positions."""
        values = self.values
        return values.shape[-2] if values is not None and values.ndim > 1 else 0


class SharingAttention(LlamaAttention):
    """Llama's attention in a model whose layers share states.

    Args:
        whole: What its projections and settings are taken from.
        layer: Its index.
        sharing: The map that it is to follow, once it is converted.
    """

    def __init__(self, whole: LlamaAttention, layer: int, sharing: LayerMap) -> None:
        nn.Module.__init__(self)
        self.config, self.head_dim, self.scaling = whole.config, whole.head_dim, whole.scaling
        self.attention_dropout, self.is_causal = whole.attention_dropout, whole.is_causal
        self.num_key_value_groups = whole.num_key_value_groups
        self.q_proj, self.k_proj = whole.q_proj, whole.k_proj
        self.v_proj, self.o_proj = whole.v_proj, whole.o_proj
        self.layer_idx = layer
        """Its entry in a cache."""
        self.layer, self.sharing = layer, sharing
        self.source = sharing.sources[layer]
        self.gives = layer in sharing.givers
        self.share = 0.0
        """a, how much of its states it takes; 1 once its own projections are removed."""
        self.copies = False
        """Whether an attention map is handed on as it is, rather than computed again."""

    @property
    def mode(self) -> Mode:
        """What is shared."""
        return self.sharing.mode

    @property
    def takes(self) -> bool:
        """Whether it is a consumer that has no states of its own left."""
        return self.source != self.layer and not hasattr(self, TAKEN[self.mode][0])

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        shared_states: SharedStates | None = None,
        **context: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output [B, T, d] and, from eager attention, the attention map."""
        assert position_embeddings is not None
        own = self._projected(hidden_states, *position_embeddings)
        given = self._given(shared_states)
        if given is not None:
            self._mix(own, given)
        q, k, v = (own.get(name) for name in PROJECTIONS)
        if q is None:
            assert given is not None
            q = given[0]
        keys, values = self._all(k, v, given, past_key_values)
        weights = self._weights(q, keys, given, attention_mask)
        if self.gives and shared_states is not None:
            states = (k, v, keys, values) if self.mode == "kv" else (q, k, keys, weights)
            shared_states[str(self.layer)] = tuple(t for t in states if t is not None)
        if weights is not None:
            mixed = mixed_values(weights, values)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            mixed, weights = attend(
                self,
                q,
                keys,
                values,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **context,
            )
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights

    def decode_part(self, norm: Any) -> Attention:
        """Return its modules, and the block whose states it takes once it is converted."""
        return attention_of(self, norm, self.source if self.takes else None)

    def why_not_stepped(self) -> str:
        """Return that it is on its way, or hands attention maps on."""
        undecided = self.copies or (self.share > 0 and not self.takes)
        reason = "some of its layers are half converted, or hand attention maps on"
        return reason if undecided else ""

    def _projected(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return its own states [B, H, T, D] by projection, queries and keys turned.

        They have one dtype, or else attention would keep a cast of them for each consumer.
        """
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        own = {
            name: getattr(self, name)(hidden).view(shape).transpose(1, 2)
            for name in PROJECTIONS
            if hasattr(self, name)
        }
        for name in ("q_proj", "k_proj"):
            if name in own:
                own[name] = _turned(own[name], cos, sin).to(own[name].dtype)
        return own

    def _given(self, shared_states: SharedStates | None) -> States | None:
        """Return what its source gave, None where it takes nothing."""
        if self.source == self.layer or not self.share:
            return None
        if shared_states is None or str(self.source) not in shared_states:
            raise RuntimeError(
                f"layer {self.layer} takes states of layer {self.source}, which has not given any"
            )
        return tuple(shared_states[str(self.source)])

    def _mix(self, own: dict[str, torch.Tensor], given: States) -> None:
        for name, taken in zip(TAKEN[self.mode], given[:2], strict=True):
            if name in own:
                own[name] = torch.lerp(own[name], taken.to(own[name].dtype), self.share)

    def _all(
        self,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        given: States | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all positions, and put in the cache what is its own."""
        if k is not None and v is not None:
            return (k, v) if cache is None else cache.update(k, v, self.layer_idx)
        assert given is not None
        if v is None:
            return given[2], given[3]
        return given[2], v if cache is None else cached_values(cache, v, self.layer_idx)

    def _weights(
        self, q: torch.Tensor, keys: torch.Tensor, given: States | None, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the attention map where maps are copied, and this layer is part of that."""
        if not self.copies:
            return None
        if given is not None and self.takes:
            return given[3]
        return attention_map(q, keys, mask, self.scaling) if self.gives else None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return [B, H, T, D] at the rotary positions of cos and sin, [B, T, D]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned: torch.Tensor = x * cos + rotate_half(x) * sin
    return turned


def cached_values(cache: Cache, values: torch.Tensor, place: int) -> torch.Tensor:
    """Put values [B, H_kv, T, D] in an entry without keys, and return all that it has."""
    layers: list[Any] = cache.layers
    if place == len(layers):
        layers.append(ValueLayer())
    elif type(layers[place]) is DynamicLayer and not layers[place].is_initialized:
        layers[place] = ValueLayer()
    return cache.update(values[..., :0], values, place)[1]


# -- attention maps that are handed on ---------------------------------------------------------


def attention_map(
    q: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Return softmax(q k^T scaling + mask), [B, H, T, S], in the dtype of the queries.

    Args:
        q: [B, H, T, D].
        keys: [B, H_kv, S, D]; H is a multiple of H_kv.
        mask: [B, 1, T, S], true for what is seen or added to the scores; None is causal.
        scaling: Of the scores.
    """
    rows, heads, width, size = q.shape
    groups, length = keys.shape[1:3]
    grouped = q.reshape(rows, groups, -1, size)
    scores = (grouped @ keys.transpose(-1, -2)).view(rows, heads, width, length)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    if mask is None and width > 1:
        mask = torch.ones(width, length, dtype=torch.bool, device=q.device).tril(length - width)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(q.dtype)


def mixed_values(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return weights [B, H, T, S] times values [B, H_kv, S, D], as [B, T, H, D]."""
    rows, heads, width, length = weights.shape
    grouped = weights.reshape(rows, values.shape[1], -1, length).to(values.dtype)
    return (grouped @ values).view(rows, heads, width, -1).transpose(1, 2)


@contextmanager
def copying(model: nn.Module) -> Iterator[None]:
    """Hand attention maps on inside the context; in `qk` mode alone there are any.

    Every source then computes its map in full, [B, H, T, S], which fused attention never does.
    """
    layers = [m for m in sharing_layers(model) if m.mode == "qk"]
    before = [m.copies for m in layers]
    try:
        for layer in layers:
            layer.copies = True
        yield
    finally:
        for layer, copied in zip(layers, before, strict=True):
            layer.copies = copied


# -- conversion --------------------------------------------------------------------------------


def put_sharing(model: Any, sharing: LayerMap) -> nn.Module:
    """Make a Llama ready to share, in place, with all projections and as if nothing were shared.

    Raises:
        UserError: When the model's blocks are not Llama's own.
    """
    require_llama(model)
    if len(sharing.sources) != len(model.model.layers):
        raise ValueError(f"a map of {len(sharing.sources)} layers does not fit this model")
    if sharing.consumers:
        for index, layer in enumerate(model.model.layers):
            layer.self_attn = SharingAttention(layer.self_attn, index, sharing)
        model.model.register_forward_pre_hook(_hand_down, with_kwargs=True)
    return _settled(model)


def convert(model: nn.Module, layer: int) -> list[nn.Parameter]:
    """Remove the projections that a consumer has no use for, and return their parameters."""
    attention = next(m for m in sharing_layers(model) if m.layer == layer)
    removed = [p for name in TAKEN[attention.mode] for p in getattr(attention, name).parameters()]
    for name in TAKEN[attention.mode]:
        delattr(attention, name)
    attention.share = 1.0
    _settled(model)
    return removed


def share(model: nn.Module, sharing: LayerMap) -> nn.Module:
    """Turn a Llama into one that follows a layer map, in place, at once."""
    put_sharing(model, sharing)
    for layer in sharing.consumers:
        convert(model, layer)
    return model


def sharing_layers(model: Any) -> list[SharingAttention]:
    """Return the attention modules of a model that shares or is to share; else none."""
    attentions = [layer.self_attn for layer in getattr(model.model, "layers", ())]
    return [m for m in attentions if isinstance(m, SharingAttention)]


def map_of(model: nn.Module) -> LayerMap | None:
    """Return the map that a model follows now, None where no layer takes from another."""
    layers = sharing_layers(model)
    taking = [m.layer for m in layers if m.takes]
    return layers[0].sharing.only(taking) if taking else None


def shape_shared(model: nn.Module, shape: AnyShape) -> ModelShape:
    """Return `shape` with the sharing that a model has now."""
    sharing = map_of(model)
    return shared_shape(shape, sharing) if sharing else ModelShape.of(shape)


def _settled(model: Any) -> nn.Module:
    """Number the entries of a cache, and let the config say what the modules do."""
    place, sharing = 0, map_of(model)
    for attention in sharing_layers(model):
        attention.layer_idx = place
        place += hasattr(attention, "v_proj")
    values = written(sharing) if sharing else {"sharing_mode": None, "layer_sources": None}
    for name, value in values.items():
        if sharing or hasattr(model.config, name):
            setattr(model.config, name, value)
    whole: nn.Module = model
    return whole


def hands_down(inner: nn.Module) -> bool:
    """Whether nothing but the dictionary of shared states is added to a model's forward pass."""
    before = list(inner._forward_pre_hooks.values())
    return not inner._forward_hooks and before == [_hand_down] and "forward" not in vars(inner)


def tail_of(model: Any) -> int:
    """Return how many layers at the top need a prompt's last position alone."""
    sharing = map_of(model) if hasattr(model, "model") else None
    return sharing.tail if sharing else 0


def _hand_down(inner: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a pass its dictionary.

    Raises:
        RuntimeError: Under reentrant checkpointing, which would cut a source off its gradients.
    """
    first = inner.layers[0]
    if inner.training and first.gradient_checkpointing:
        settings = getattr(first._gradient_checkpointing_func, "keywords", {})
        if settings.get("use_reentrant", True):
            raise RuntimeError("shared states need gradient checkpointing with use_reentrant=False")
    return args, {"shared_states": SharedStates(), **kwargs}


# -- reading a prompt --------------------------------------------------------------------------


def last_logits(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    cache: Cache,
) -> torch.Tensor:
    """Read prompts into an empty cache; return the logits after the last position, [B, V].

    Layers that leave nothing in a cache read the last position alone (YOCO, arXiv 2405.05254).

    Args:
        model: A Llama that shares.
        input_ids: [B, P].
        attention_mask: [B, P], 1 for real tokens; None for all.
        positions: [B, P], None for 0 … P - 1.
        cache: Without any position.
    """
    inner = model.model
    first = len(inner.layers) - tail_of(model)
    hidden = inner.embed_tokens(input_ids)
    if positions is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    real = None if attention_mask is None or attention_mask.all() else attention_mask
    mask: Any = create_causal_mask(
        config=inner.config,
        inputs_embeds=hidden,
        attention_mask=real,
        past_key_values=None,
        position_ids=positions,
    )
    rotary = inner.rotary_emb(hidden, position_ids=positions)
    states = SharedStates()
    for index, layer in enumerate(inner.layers):
        if index == first:
            hidden, positions = hidden[:, -1:], positions[:, -1:]
            rotary = (rotary[0][:, -1:], rotary[1][:, -1:])
            # One query without a mask sees all keys; a 2-d mask says which of them are real.
            mask = mask[..., -1:, :] if mask is not None and mask.ndim > 2 else mask
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=rotary,
            past_key_values=cache,
            use_cache=True,
            shared_states=states,
        )
    logits: torch.Tensor = model.lm_head(inner.norm(hidden[:, -1:]))
    return logits[:, -1]
