"""The decoder layers of a model, all of them or some alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from effbench.api.shape import LAYERS_DIFFER
from effbench.nn.llama.experts import split_experts
from effbench.nn.model_kinds.base import kind_of
from effbench.util.errors import UserError

SINES = "SinusoidalPositionalEmbedding"
"""How the classes of such tables end."""


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
    require_no_states(model)
    if slides(config):
        raise UserError(
            "Layers with a sliding attention window cannot be left out: their cache would have "
            "gaps that the window does not know of.",
            "Choose a model whose layers attend to the whole context.",
        )


def keeps_states(model: torch.nn.Module) -> bool:
    """Whether some layer of a model keeps a state in the place of keys and values."""
    config: Any = model.config
    return bool(getattr(config, "state_layers", None))


def require_no_states(model: torch.nn.Module) -> None:
    """Refuse a model some of whose layers keep states.

    Raises:
        UserError: When there are such layers.
    """
    if keeps_states(model):
        raise UserError(
            "Some layers of this model keep a state in the place of keys and values, from which "
            "no token can be taken back or left out.",
            "Use the method first, and linear attention afterwards.",
        )


def slides(config: Any) -> bool:
    """Whether some layer of a model sees a window of the context only."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


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
    """Return the blocks of a model, in the order they run.

    Raises:
        UserError: When it has no list of blocks.
    """
    return kind_of(model).blocks(model)


def as_linears(model: torch.nn.Module) -> None:
    """Put plain linears in the place of GPT-2's, whose weights are held as [d_in, d_out], and of
    the tensors that hold all experts of a layer.
    """
    split_experts(model)
    for parent in model.modules():
        for name, module in parent.named_children():
            if isinstance(module, Conv1D):
                setattr(parent, name, _as_linear(module))


def fix_positions(model: torch.nn.Module) -> None:
    """Hold tables of sines, which transformers holds as parameters, as what never trains."""
    for module in model.modules():
        if type(module).__name__.endswith(SINES) and isinstance(module, torch.nn.Embedding):
            table = module.weight.detach()
            del module.weight
            module.register_buffer("weight", table)


def turned_in_files(model: torch.nn.Module) -> bool:
    """Whether linears of a model are held as [d_in, d_out] in its files, as GPT-2's are."""
    return any(getattr(module, "turned_in_files", False) for module in model.modules())


def base_name(model: torch.nn.Module) -> str:
    """Return where the model's config says that it came from."""
    return str(getattr(model.config, "name_or_path", ""))


def _as_linear(module: Any) -> torch.nn.Linear:
    d_in, d_out = module.weight.shape
    with torch.device("meta"):
        linear = torch.nn.Linear(d_in, d_out)
    linear.weight = torch.nn.Parameter(module.weight.detach().t().contiguous())
    linear.bias = module.bias
    vars(linear)["turned_in_files"] = True
    return linear.train(module.training)


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
