"""How alike the layers of a model are on one text: attention, keys, values, what they change.

    attention   cosine between two layers' attention probabilities, flattened over heads and
                positions (EchoAtt, Rajabzadeh et al., arXiv 2409.14595)
    keys        linear CKA between two layers' keys, after the rotary positions; so are values
                (Kornblith et al., Similarity of Neural Network Representations Revisited, ICML
                2019, arXiv 1905.00414); all heads of a position make one vector
    passed      cosine between what enters a layer and what leaves it, a mean over positions; one
                minus it is the block influence of ShortGPT (Men et al., arXiv 2403.03853)
    distances   angle between what enters layer l and what enters layer m, as a share of pi (Gromov
                et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887, at
                the last position; here a mean over all)

CKA is the cosine between the centred Gram matrices of the positions, so that both kinds of cosine
are one computation. It does not change when a layer's features are rotated: what a trained
projection can absorb does not count as a difference. Layers whose maps differ in size, or that do
not attend, have nothing in common: 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import pi
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from effbench.nn.llama.shared_attention import SharingAttention
from effbench.nn.llama.stack import decoder_layers
from effbench.util.errors import UserError

PIECE = 1 << 20
"""Features of all layers that are held in float32 at a time."""


@dataclass
class Similar:
    """What was measured on one text, float32 on the CPU; L layers."""

    attention: torch.Tensor
    """[L, L], symmetric, in [0, 1], ones on the diagonal."""
    keys: torch.Tensor
    """Likewise."""
    values: torch.Tensor
    """Likewise."""
    passed: torch.Tensor
    """[L]"""
    distances: torch.Tensor
    """[L + 1, L + 1], between the inputs of the layers and the output of the last."""


@torch.no_grad()
def layer_similarity(model: Any, input_ids: torch.Tensor) -> Similar:
    """Return how alike the layers of a model are on one text.

    The attention maps of all layers are in memory at once, in the model's dtype: L H T^2 values.

    Args:
        model: A causal language model of transformers.
        input_ids: [T] int64, on the model's device.

    Raises:
        UserError: When the model does not show its attention.
    """
    layers = decoder_layers(model)
    cache = DynamicCache()
    with eager(model), watched(layers) as seen:
        decoder = getattr(model, model.base_model_prefix)
        decoder(input_ids=input_ids[None], past_key_values=cache, use_cache=True)
    if not any(m is not None for m in seen.maps):
        raise UserError(
            f"{type(model).__name__} does not show its attention probabilities.",
            "Choose a model with one of transformers' own attention implementations.",
        )
    states = torch.stack([s[0].float() for s in seen.states])
    cosines_of_states = _state_cosines(states)
    return Similar(
        attention=cosines([None if m is None else m[0].flatten() for m in seen.maps]),
        keys=cosines(_grams(layers, cache, "keys")),
        values=cosines(_grams(layers, cache, "values")),
        passed=cosines_of_states.diagonal(1, dim1=1, dim2=2).mean(0).cpu(),
        distances=(cosines_of_states.acos() / pi).mean(0).cpu(),
    )


def mean_attention(model: Any, texts: Sequence[torch.Tensor]) -> list[list[float]]:
    """Return the similarity of the attention maps of each pair of layers, a mean over texts.

    Args:
        model: As for `layer_similarity`; evaluated, and in the mode that it was in afterwards.
        texts: [T] int64 each, at least one.
    """
    training = model.training
    model.eval()
    found = [layer_similarity(model, text).attention.double() for text in texts]
    model.train(training)
    mean: list[list[float]] = (torch.stack(found).mean(0)).tolist()
    return mean


@dataclass
class Seen:
    """What the layers of one pass gave."""

    maps: list[torch.Tensor | None] = field(default_factory=list)
    """Attention probabilities of each layer, [B, H, T, T]; None where it does not attend."""
    states: list[torch.Tensor] = field(default_factory=list)
    """The input of the first layer and the output of each, [B, T, d]."""


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Let a model compute attention probabilities inside the context; fused kernels give none."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def watched(layers: nn.ModuleList) -> Iterator[Seen]:
    """Collect what decoder layers give in one pass inside the context."""
    seen = Seen(maps=[None] * len(layers))

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.states.append(args[0] if args else kwargs["hidden_states"])

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        seen.states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    for place, layer in enumerate(layers):

        def attended(_: nn.Module, __: Any, output: Any, place: int = place) -> None:
            seen.maps[place] = output[1] if isinstance(output, tuple) else None

        hooks.append(layer.register_forward_hook(leave))
        attention = _attention(layer)
        if attention is not None:
            hooks.append(attention.register_forward_hook(attended))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _attention(layer: Any) -> Any:
    """Return the attention of a decoder layer under the names that families give it, or None."""
    names = ("self_attn", "attention", "attn")
    return next((getattr(layer, n) for n in names if hasattr(layer, n)), None)


def _grams(layers: nn.ModuleList, cache: DynamicCache, name: str) -> list[torch.Tensor | None]:
    """Return the centred Gram matrix of the keys or values of each layer, [T * T] each.

    Those of a layer that takes them from another one are that one's.
    """
    found: list[torch.Tensor | None] = []
    for layer in layers:
        attention = _attention(layer)
        if isinstance(attention, SharingAttention) and attention.takes:
            own = {"keys": False, "values": attention.mode == "qk"}[name]
            attention = attention if own else _attention(layers[attention.source])
        place = getattr(attention, "layer_idx", None)
        stored = None
        if place is not None and place < len(cache.layers):
            stored = getattr(cache.layers[place], name, None)
        if stored is None or not stored.numel():
            found.append(None)
            continue
        rows = stored[0].transpose(0, 1).flatten(1).float()
        rows = rows - rows.mean(0)
        found.append((rows @ rows.T).flatten())
    return found


def cosines(vectors: list[torch.Tensor | None]) -> torch.Tensor:
    """Return the cosine between each pair of vectors of no negative product, [L, L] float32.

    Vectors of different sizes, and absent ones, have nothing in common.
    """
    found = torch.eye(len(vectors), dtype=torch.float64)
    sizes = {v.numel() for v in vectors if v is not None}
    for size in sizes:
        places = [i for i, v in enumerate(vectors) if v is not None and v.numel() == size]
        alike = [v for v in vectors if v is not None and v.numel() == size]
        products = torch.zeros(len(places), len(places), dtype=torch.float64)
        step = max(1, PIECE // len(places))
        for start in range(0, size, step):
            piece = torch.stack([v[start : start + step] for v in alike]).float()
            products += (piece @ piece.T).double().cpu()
        norms = products.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        index = torch.tensor(places)
        found[index[:, None], index] = products / norms[:, None] / norms
    found = ((found + found.T) / 2).clamp(0, 1)
    return found.fill_diagonal_(1).float()


def _state_cosines(states: torch.Tensor) -> torch.Tensor:
    """Return the cosine between each pair of [S, T, d] states at each position, [T, S, S]."""
    units = nn.functional.normalize(states, dim=-1).transpose(0, 1)
    found = (units @ units.transpose(1, 2)).clamp(-1, 1)
    found.diagonal(dim1=1, dim2=2).fill_(1)
    return found
