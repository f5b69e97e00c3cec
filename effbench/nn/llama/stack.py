"""The decoder layers of a model, all of them or some alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from effbench.api.shape import LAYERS_DIFFER
from effbench.util.errors import UserError


def require_plain_layers(model: torch.nn.Module) -> None:
    """Refuse a model whose layers cannot be called one by one as Llama's can.

    Raises:
        UserError: When the model is laid out differently or some layer sees a sliding window.
    """
    decoder = getattr(model, "model", None)
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    if not hasattr(model, "lm_head") or not all(hasattr(decoder, p) for p in parts):
        raise UserError(
            f"{type(model).__name__} is not laid out as Llama is: its layers cannot be left out.",
            "Choose a model of the Llama family.",
        )
    config: Any = model.config
    if getattr(config, "layer_sources", None):
        raise UserError(
            "Some layers of this model take states from others, which may not be left out.",
            "Choose another method, or a model whose layers do not share.",
        )
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "sliding_window", None) is not None
    if any(k != "full_attention" for k in kinds) if kinds else slides:
        raise UserError(
            "Layers with a sliding attention window cannot be left out: their cache would have "
            "gaps that the window does not know of.",
            "Choose a model whose layers attend to the whole context.",
        )


def require_layers_alike(model: torch.nn.Module) -> None:
    """Refuse a model that has no plain layers or whose layers differ in size, as slices' may.

    In one whose layers differ, some have no place in the cache, and counts go layer by layer.

    Raises:
        UserError: When a depth would not be a number of equal layers.
    """
    require_plain_layers(model)
    config: Any = model.config
    if getattr(config, "layer_sizes", None):
        raise UserError(*LAYERS_DIFFER)


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """Return the decoder blocks of a causal language model, in the order they run."""
    causal: Any = model
    layers: torch.nn.ModuleList = getattr(causal, causal.base_model_prefix).layers
    return layers


@contextmanager
def at_layers(model: torch.nn.Module, kept: Sequence[int]) -> Iterator[None]:
    """Make `model` the sub-model of the layers `kept` inside the context.

    Layers are numbered anew, since a cache has one entry for each layer that runs. The config is
    shared by all of the model's parts: no other thread may use the model meanwhile.

    Args:
        model: A Llama-style causal language model.
        kept: Indices of layers, ascending.
    """
    root: Any = model
    decoder, config = root.model, root.config
    every = decoder.layers
    if list(kept) == list(range(len(every))):
        yield
        return
    before = {k: getattr(config, k, None) for k in ("num_hidden_layers", "layer_types")}
    places = [layer.self_attn.layer_idx for layer in every]
    try:
        decoder.layers = torch.nn.ModuleList(every[i] for i in kept)
        config.num_hidden_layers = len(kept)
        if before["layer_types"]:
            config.layer_types = [before["layer_types"][i] for i in kept]
        for place, index in enumerate(kept):
            every[index].self_attn.layer_idx = place
        yield
    finally:
        decoder.layers = every
        config.num_hidden_layers = before["num_hidden_layers"]
        if before["layer_types"]:
            config.layer_types = before["layer_types"]
        for layer, place in zip(every, places, strict=True):
            layer.self_attn.layer_idx = place
