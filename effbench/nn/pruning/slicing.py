"""Physical slicing of a Llama-style model: what is pruned is gone, and the rest is dense.

Whole key/value groups go with their query heads, or single query heads where every group of a
layer keeps the same number; MLP neurons go layer by layer; dimensions of the residual stream go
everywhere at once: embedding, norms, inputs and outputs of all linears, head. Head width and rotary
positions stay. Norms then take the mean of squares over the dimensions that are left, for that is
all they see. A layer without heads or neurons adds nothing to the residual stream.

Key/value caches count the layers that attend, not all layers: a layer without heads has no entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from effbench.api.parts import LayerSize
from effbench.api.shape import AnyShape, ModelShape
from effbench.api.slices import sliced_shape
from effbench.nn.adapters.lowrank import LowRankLinear
from effbench.nn.llama.attention import NoAttention, NoMLP, SlicedAttention, require_llama
from effbench.nn.llama.swap import Replace
from effbench.nn.pruning.blocks import Layout
from effbench.util.errors import UserError


@dataclass(frozen=True)
class KeptLayer:
    """What one layer keeps; rising indices, int64."""

    queries: torch.Tensor
    """Query heads."""
    groups: torch.Tensor
    """Key/value heads."""
    neurons: torch.Tensor
    """MLP neurons."""

    @property
    def size(self) -> LayerSize:
        """Sizes of what is left."""
        return LayerSize(len(self.queries), len(self.groups), len(self.neurons))


@dataclass(frozen=True)
class Kept:
    """What a model keeps."""

    dims: torch.Tensor
    """Dimensions of the residual stream, rising, int64."""
    layers: tuple[KeptLayer, ...]

    def plain(self) -> dict[str, Any]:
        """Return it as plain values, for files and checkpoints."""
        layers = [{n: t.tolist() for n, t in vars(layer).items()} for layer in self.layers]
        return {"dims": self.dims.tolist(), "layers": layers}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Kept:
        """Return what `plain` was made from."""
        layers = [{n: _index(v) for n, v in layer.items()} for layer in values["layers"]]
        return cls(_index(values["dims"]), tuple(KeptLayer(**layer) for layer in layers))


def _index(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def kept_blocks(layout: Layout, kept: torch.Tensor) -> Kept:
    """Return the indices of blocks that stay, each group with all of its query heads.

    Args:
        layout: The blocks.
        kept: [N] bool.
    """
    layers = []
    for size, part in zip(layout.layers, layout.views(kept.cpu()), strict=True):
        groups = part.groups.nonzero()[:, 0]
        ratio = size.num_heads // max(1, size.num_kv_heads)
        queries = (groups[:, None] * ratio + torch.arange(ratio)).reshape(-1)
        layers.append(KeptLayer(queries, groups, part.neurons.nonzero()[:, 0]))
    return Kept(layout.dims(kept.cpu()).nonzero()[:, 0], tuple(layers))


def layer_sizes(model: Any) -> tuple[LayerSize, ...]:
    """Return the sizes of each block, from the modules themselves."""
    width, found = model.config.head_dim, []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        heads = (0, 0)
        if not isinstance(attention, NoAttention):
            heads = attention.q_proj.out_features // width, attention.k_proj.out_features // width
        neurons = 0 if isinstance(mlp, NoMLP) else mlp.down_proj.in_features
        found.append(LayerSize(*heads, neurons))
    return tuple(found)


def layout_of(model: Any) -> Layout:
    """Return the blocks of a model."""
    return Layout(layer_sizes(model), model.config.head_dim, model.config.hidden_size)


def shape_left(model: Any, shape: AnyShape) -> ModelShape:
    """Return `shape` with the width and the blocks that a model has now."""
    return sliced_shape(shape, model.config.hidden_size, layer_sizes(model))


# -- slicing -----------------------------------------------------------------------------------


def slice_model(model: Any, kept: Kept, replace: Replace | None = None) -> Any:
    """Slice a model in place, module by module, and return it.

    Args:
        model: A `LlamaForCausalLM`; its linears may carry `LowRankLinear` adapters.
        kept: What stays.
        replace: Told of each parameter that is replaced, for an optimiser that trains it.

    Raises:
        UserError: When the model is not Llama's, its linears are packed, or a part that goes whole
            has a bias that would have to stay.
        ValueError: When the groups of a layer would keep different numbers of query heads.
    """
    require_llama(model)
    before = layer_sizes(model)
    for index, (size, part) in enumerate(zip(before, kept.layers, strict=True)):
        _check_groups(index, size, part)
    cut = partial(_cut_module, replace=replace)
    inner, width = model.model, model.config.head_dim
    tied = model.lm_head.weight is inner.embed_tokens.weight
    inner.embed_tokens = cut(inner.embed_tokens, None, kept.dims)
    if tied:  # at once, so that the old table is not held beside the new one
        model.lm_head.weight = inner.embed_tokens.weight
        model.lm_head.in_features = len(kept.dims)
    for layer, part in zip(inner.layers, kept.layers, strict=True):
        heads = {
            "q_proj": (_spread(part.queries, width), kept.dims),
            "k_proj": (_spread(part.groups, width), kept.dims),
            "v_proj": (_spread(part.groups, width), kept.dims),
            "o_proj": (kept.dims, _spread(part.queries, width)),
        }
        neurons = {
            "gate_proj": (part.neurons, kept.dims),
            "up_proj": (part.neurons, kept.dims),
            "down_proj": (kept.dims, part.neurons),
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, norm, cut(getattr(layer, norm), kept.dims, None))
        for owner, sizes, units in (
            ("self_attn", heads, part.queries),
            ("mlp", neurons, part.neurons),
        ):
            parent = getattr(layer, owner)
            if isinstance(parent, NoAttention | NoMLP):
                continue
            if not len(units):
                _require_no_bias(parent)
                continue
            for name, (rows, columns) in sizes.items():
                setattr(parent, name, cut(getattr(parent, name), rows, columns))
    inner.norm = cut(inner.norm, kept.dims, None)
    if not tied:
        model.lm_head = cut(model.lm_head, None, kept.dims)
    _settle(model, [part.size for part in kept.layers], len(kept.dims))
    return model


def _require_no_bias(part: nn.Module) -> None:
    """Refuse to do without a part that adds something even when all it computes is zero."""
    last: Any = getattr(part, "o_proj", None) or getattr(part, "down_proj", None)
    if getattr(last, "bias", None) is not None:
        raise UserError(
            f"A {type(part).__name__} whose output has a bias cannot be left out altogether.",
            "Keep some of it, or prune a model without biases.",
        )


def _check_groups(index: int, size: LayerSize, part: KeptLayer) -> None:
    ratio = size.num_heads // max(1, size.num_kv_heads)
    counts = torch.bincount(part.queries // max(1, ratio), minlength=size.num_kv_heads)
    left = counts[part.groups]
    if int(counts.sum()) != int(left.sum()) or (len(left) and int(left.min()) != int(left.max())):
        raise ValueError(f"layer {index}: each kept group must keep the same number of query heads")
    if len(left) and not int(left.min()):
        raise ValueError(f"layer {index}: a group without query heads must go")


def _spread(heads: torch.Tensor, width: int) -> torch.Tensor:
    """Return the features of heads."""
    return (heads[:, None] * width + torch.arange(width)).reshape(-1)


def _settle(model: Any, sizes: Sequence[LayerSize], hidden_size: int) -> None:
    """Make config and attention modules say the sizes that the linears have.

    A model whose layers are alike stays one of transformers' own. Else `config.layer_sizes` lists
    heads, key/value heads and neurons of each layer, and attention modules have their own counts.
    """
    config, largest = (
        model.config,
        LayerSize(
            *(max(1, *(getattr(s, f) for s in sizes)) for f in LayerSize.__dataclass_fields__)
        ),
    )
    config.hidden_size = hidden_size
    config.num_attention_heads = largest.num_heads
    config.num_key_value_heads = largest.num_kv_heads
    config.intermediate_size = largest.intermediate_size
    config.num_hidden_layers = len(sizes)
    alike = all(size == largest for size in sizes)
    config.layer_sizes = None if alike else [list(vars(s).values()) for s in sizes]
    model.model.embed_tokens.embedding_dim = hidden_size
    place = 0
    for layer, size in zip(model.model.layers, sizes, strict=True):
        layer.hidden_size = hidden_size
        if not size.num_heads:
            layer.self_attn = NoAttention()
        elif alike:
            layer.self_attn.num_key_value_groups = size.num_heads // size.num_kv_heads
        else:
            layer.self_attn = SlicedAttention(layer.self_attn, place)
        place += bool(size.num_heads)
        if not size.intermediate_size:
            layer.mlp = NoMLP()


def _cut_module(
    module: Any,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
    replace: Replace | None,
) -> nn.Module:
    """Return a module with some rows and columns of its weight; None keeps all of them."""
    if isinstance(module, LowRankLinear):
        module.base = _cut_module(module.base, rows, columns, replace)
        module.lora_A = _cut_parameter(module.lora_A, None, columns, replace)
        module.lora_B = _cut_parameter(module.lora_B, rows, None, replace)
        module.in_features, module.out_features = module.lora_A.shape[1], len(module.lora_B)
        return module
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        raise UserError(
            f"A {type(module).__name__} cannot be sliced: its weight is packed or adapted.",
            "Prune the dense model first, and quantise or adapt it afterwards.",
        )
    module.weight = _cut_parameter(module.weight, rows, columns, replace)
    if getattr(module, "bias", None) is not None:
        module.bias = _cut_parameter(module.bias, rows, None, replace)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    return module


def _cut_parameter(
    old: nn.Parameter,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
    replace: Replace | None,
) -> nn.Parameter:
    wanted = (len(old) if rows is None else len(rows), *old.shape[1:])
    if columns is not None:
        wanted = (wanted[0], len(columns))
    if wanted == old.shape:
        return old

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        if rows is not None:
            tensor = tensor.index_select(0, rows.to(tensor.device))
        if columns is not None:
            tensor = tensor.index_select(1, columns.to(tensor.device))
        return tensor

    new = nn.Parameter(cut(old.detach()), requires_grad=old.requires_grad)
    if replace is not None and old.requires_grad:
        replace(old, new, cut)
    return new


def resize(model: Any, hidden_size: int, sizes: Sequence[LayerSize]) -> nn.Module:
    """Give a model the sizes of a sliced one, in place, with the first weights of each matrix.

    This is how the structure of a sliced model is made before its tensors are read.

    Args:
        model: At least as large in everything.
        hidden_size: Width of the residual stream.
        sizes: Sizes of each layer.
    """
    layers = []
    for old, new in zip(layer_sizes(model), sizes, strict=True):
        ratio = old.num_heads // max(1, old.num_kv_heads)
        groups, each = torch.arange(new.num_kv_heads), new.num_heads // max(1, new.num_kv_heads)
        queries = (groups[:, None] * ratio + torch.arange(each)).reshape(-1)
        layers.append(KeptLayer(queries, groups, torch.arange(new.intermediate_size)))
    return slice_model(model, Kept(torch.arange(hidden_size), tuple(layers)))
