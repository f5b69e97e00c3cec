"""A model at work turned into one of transformers' own that computes the same.

Adapters are added to their weights, packed weights are expanded, and the layers of a slice are
filled up with zeros to the width of the widest. Zeros change nothing: a query head without an
output, a key/value head without values and a neuron without an output add nothing. Of a wider
residual stream the norms would take the mean over more dimensions; with d of d' dimensions in use

    norm'(x) = w √(d / d') x / √(Σ x² / d' + ε d / d') = norm(x)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from effbench.api.parts import LayerSize
from effbench.nn.adapters.merge import bias_of, is_adapted, merged_weight, update_of
from effbench.nn.llama.experts import stacked
from effbench.nn.llama.stack import fix_positions, keeps_states
from effbench.nn.model_kinds.base import CAUSAL, kind_of
from effbench.nn.pruning.checkpoint import stock
from effbench.nn.pruning.slicing import layer_sizes
from effbench.nn.quant.embedding import PackedEmbedding, is_tied
from effbench.nn.quant.linears import QuantisedLinear
from effbench.util.errors import UserError
from effbench.util.hf import quiet

OURS = ("layer_sizes", "layer_sources", "sharing_mode", "kept_layers")
"""Entries of a config that are not transformers'."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Plain:
    """A model of transformers' own, and what it took to make it."""

    model: Any
    merged: int = 0
    """Linears whose adapter was added to their weight."""
    expanded: int = 0
    """Linears whose packed weight was expanded."""
    filled: int = 0
    """Weights that are zero because a layer was narrower."""
    packed: Mapping[str, QuantisedLinear] = field(default_factory=dict)
    """Packed linears without an adapter, by name; the model has them expanded."""


def plain_model(model: Any, dtype: torch.dtype | None = None) -> Plain:
    """Return a model of transformers' own class with the weights of `model` as it is now.

    Args:
        model: At one operating point.
        dtype: Of all weights; None takes float32 where adapters or codes were multiplied out, and
            else what they are held in.

    Raises:
        UserError: When transformers' class has no place for some part of it.
    """
    if keeps_states(model):
        raise UserError(
            "Some layers of this model keep a state in the place of keys and values, and no class "
            "of transformers has this one.",
            "Its artefact can be used through `effbench eval from=RUN` and `effbench generate`.",
        )
    if any(isinstance(m, QuantisedLinear) and m.rounds_inputs for m in model.modules()):
        raise UserError(
            "Linears of this model round what they multiply, which no class of transformers does.",
            "Compress with method.threshold=0, which gives the same weights, to have these alone.",
        )
    linears = dict(_changed(model))
    packed = {n: x for n, x in linears.items() if isinstance(x, QuantisedLinear)}
    if dtype is None:
        dtype = torch.float32 if linears else model.get_input_embeddings().weight.dtype
    tensors = dict(_tensors(model, linears, dtype))
    config = _config(model, dtype)
    before = sum(t.numel() for t in tensors.values())
    if not stock(model.config):
        _require_unshared(model)
        fill_up(config, layer_sizes(model), tensors)
    after = sum(t.numel() for t in tensors.values())
    made = _made(model, config, tensors)
    merged = len(linears) - len(packed)
    expanded = len(packed) + sum(_on_packed(x) for x in linears.values())
    return Plain(made, merged, expanded, after - before, packed)


def _changed(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield each linear with an adapter or packed weights, and nothing that is inside of one.

    A packed embedding's table has the embedding's name, the head's too where that is the same one.
    """
    inside, tables = "\n", set()
    for name, module in model.named_modules():
        if isinstance(module, PackedEmbedding):
            inside = f"{name}."
            tables.add(module.table)
            yield name, module.table
        elif (
            not name.startswith(inside)
            and module not in tables
            and (isinstance(module, QuantisedLinear) or is_adapted(module))
        ):
            inside = f"{name}."
            yield name, module


def _on_packed(linear: torch.nn.Module) -> bool:
    found = update_of(linear) if is_adapted(linear) else None
    return found is not None and isinstance(found[0], QuantisedLinear)


def _tensors(
    model: torch.nn.Module, linears: Mapping[str, torch.nn.Module], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight by its name in a plain model; a linear's is [d_out, d_in]."""
    inside = tuple(f"{name}." for name in linears)
    for name, parameter in model.named_parameters():
        if not name.startswith(inside):
            yield name, parameter.detach().to("cpu", dtype)
    for name, linear in linears.items():
        yield f"{name}.weight", merged_weight(linear).to("cpu", dtype)
        bias = bias_of(linear)
        if bias is not None:
            yield f"{name}.bias", bias.detach().to("cpu", dtype)


def _config(model: Any, dtype: torch.dtype) -> Any:
    config = copy.deepcopy(model.config)
    for name in OURS:
        if hasattr(config, name):
            delattr(config, name)
    if kind_of(model).name == CAUSAL:
        config.tie_word_embeddings = _tied(model)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    return config


def _tied(model: Any) -> bool:
    return is_tied(model)


def _require_unshared(model: Any) -> None:
    if getattr(model.config, "layer_sources", None):
        raise UserError(
            "Some layers of this model take states from others, and no class of transformers does.",
            "Leave --to out for a folder that model=folder loads.",
        )


def _made(model: Any, config: Any, tensors: Tensors) -> Any:
    """Return the model of a config with the given weights."""
    attention = "sdpa" if type(model)._supports_sdpa else "eager"
    with torch.device("meta"), no_init_weights():
        new: Any = type(model)._from_config(config, attn_implementation=attention)
    new.tie_weights()
    fix_positions(new)
    kind_of(new).adjust(new, {"tie_word_embeddings": _tied(model)})
    wanted = dict(new.named_parameters())
    tensors = stacked(new, tensors)
    turned = {n for n, module in new.named_modules() if isinstance(module, Conv1D)}
    ready = {
        name: tensor.t().contiguous() if _is_turned(name, turned) else tensor.contiguous()
        for name, tensor in tensors.items()
        if name in wanted
    }
    _require_all(type(model).__name__, wanted, ready)
    new.load_state_dict(ready, strict=False, assign=True)
    new.tie_weights(recompute_mapping=False)
    _fill_buffers(new, model)
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(model.generation_config)
    return new.eval().requires_grad_(False)


def _is_turned(name: str, turned: set[str]) -> bool:
    owner, _, last = name.rpartition(".")
    return last == "weight" and owner in turned


def _require_all(kind: str, wanted: Tensors, found: Tensors) -> None:
    odd = [n for n in wanted if n not in found or found[n].shape != wanted[n].shape]
    if odd:
        raise UserError(
            f"{kind} of transformers cannot hold this: {len(odd)} of its weights are not there in "
            f"its form, the first is {odd[0]}.",
            "Its artefact can be used through `effbench eval from=RUN` and `effbench generate`.",
        )


def _fill_buffers(new: Any, old: Any) -> None:
    """Give what a model makes anew when it is built (rotary angles) the old one's values."""
    values = dict(old.named_buffers())
    for name, buffer in list(new.named_buffers()):
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            new.get_submodule(owner)._buffers[last] = values[name].detach().cpu().clone()


def write(plain: Plain, folder: Path) -> None:
    """Write a plain model into an existing folder, as transformers does."""
    with quiet():
        plain.model.save_pretrained(folder)
    stated = kind_of(plain.model).stated(plain.model)
    if stated:
        path = folder / "config.json"
        both = {**json.loads(path.read_text()), **stated}
        path.write_text(json.dumps(both, indent=2, sort_keys=True) + "\n")


# -- layers that differ ------------------------------------------------------------------------


def fill_up(config: Any, sizes: tuple[LayerSize, ...], tensors: Tensors) -> None:
    """Give all layers of a sliced Llama the sizes of the largest, in place, by adding zeros.

    Args:
        config: Gets the sizes.
        sizes: Of each layer.
        tensors: The weights by name; a layer without heads or neurons has none of theirs.
    """
    width = config.head_dim
    groups = max(1, *(s.num_kv_heads for s in sizes))
    ratio = max(1, *(s.num_heads // max(1, s.num_kv_heads) for s in sizes))
    neurons = max(1, *(s.intermediate_size for s in sizes))
    old, heads = config.hidden_size, groups * ratio
    new = -(-old // heads) * heads
    config.num_attention_heads, config.num_key_value_heads = heads, groups
    config.intermediate_size, config.hidden_size = neurons, new
    config.rms_norm_eps = config.rms_norm_eps * old / new
    for name, tensor in list(tensors.items()):
        if "layers." not in name or "norm" in name:
            tensors[name] = _wider(tensor, new, old if "norm" in name else 0)
    like = tensors["model.embed_tokens.weight"]
    for index, size in enumerate(sizes):
        prefix = f"model.layers.{index}."
        rows = {
            "self_attn.q_proj": _Heads(size.num_heads, size.num_kv_heads, width, ratio, groups),
            "self_attn.k_proj": _Heads(size.num_kv_heads, size.num_kv_heads, width, 1, groups),
            "self_attn.v_proj": _Heads(size.num_kv_heads, size.num_kv_heads, width, 1, groups),
            "mlp.gate_proj": _Heads(size.intermediate_size, size.intermediate_size, 1, 1, neurons),
            "mlp.up_proj": _Heads(size.intermediate_size, size.intermediate_size, 1, 1, neurons),
        }
        for name, part in rows.items():
            tensors[f"{prefix}{name}.weight"] = part.rows(
                tensors.get(f"{prefix}{name}.weight"), old, new, like
            )
        for name, source in (
            ("self_attn.o_proj", rows["self_attn.q_proj"]),
            ("mlp.down_proj", rows["mlp.up_proj"]),
        ):
            out = tensors.get(f"{prefix}{name}.weight")
            turned = None if out is None else out.t()
            tensors[f"{prefix}{name}.weight"] = source.rows(turned, old, new, like).t()


def _wider(tensor: torch.Tensor, new: int, normed: int) -> torch.Tensor:
    """Return a tensor [..., d] as [..., d']; `normed` is d for the weight of a norm, else 0."""
    if normed:
        tensor = (tensor.double() * (normed / new) ** 0.5).to(tensor.dtype)
    return F.pad(tensor, (0, new - tensor.shape[-1]))


@dataclass(frozen=True)
class _Heads:
    """The rows of a matrix: `count` units of `width` rows, in `groups` of equally many."""

    count: int
    groups: int
    width: int
    each: int
    """Units of a group when it is full."""
    wanted: int
    """Groups when all are there."""

    def rows(
        self, weight: torch.Tensor | None, old: int, new: int, like: torch.Tensor
    ) -> torch.Tensor:
        """Return [rows, d] as [all rows, d'] with zeros where nothing was."""
        full = like.new_zeros(self.wanted, self.each, self.width, new)
        if weight is not None and self.count:
            each = self.count // self.groups
            full[: self.groups, :each, :, :old] = weight.reshape(self.groups, each, self.width, old)
        return full.view(-1, new)
