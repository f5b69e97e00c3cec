"""Sliced models to and from folders of safetensors.

A model whose layers are alike is written as transformers writes it, and transformers reads it. One
whose layers differ has `"model_type": "sliced_llama"` and the sizes of each layer in `layer_sizes`
(heads, key/value heads, neurons); transformers refuses that type by name, and effbench reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from effbench.api.parts import LayerSize
from effbench.api.slices import SIZES, SLICED
from effbench.nn.llama.weights import read_tensors
from effbench.nn.pruning.slicing import layer_sizes, resize
from effbench.util.errors import UserError
from effbench.util.hf import quiet

WEIGHTS = "model.safetensors"


def write_folder(model: Any, folder: Path) -> None:
    """Write a dense model, sliced or not, into an existing folder."""
    if stock(model.config):
        with quiet():
            model.save_pretrained(folder)
        return
    own = {
        "model_type": SLICED,
        "architectures": ["SlicedLlamaForCausalLM"],
        "layer_sizes": _sizes(model.config),
    }
    write_own(model, folder, own)


def write_own(model: Any, folder: Path, own: Mapping[str, Any]) -> None:
    """Write config, generation config and weights of a model that transformers cannot hold.

    Args:
        model: Of the Llama family.
        folder: There already.
        own: Entries of the config that are not Llama's.
    """
    config = model.config.to_dict() | {"dtype": str(model.dtype).removeprefix("torch."), **own}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)
    tensors = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def stock(config: Any) -> bool:
    """Whether transformers itself can hold a model of these sizes, none of whose layers share."""
    alike = not getattr(config, "layer_sizes", None)
    alike &= not getattr(config, "layer_sources", None)
    return alike and config.hidden_size % config.num_attention_heads == 0


def _sizes(config: Any) -> list[list[int]]:
    same = [config.num_attention_heads, config.num_key_value_heads, config.intermediate_size]
    listed: list[list[int]] | None = getattr(config, "layer_sizes", None)
    return listed or [same] * config.num_hidden_layers


def read_folder(folder: Path, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Return the model of a folder that `write_folder` made for effbench alone, in eval mode.

    Raises:
        UserError: When a file is missing, corrupt, or does not fit the sizes.
    """
    values = json.loads((folder / "config.json").read_text())
    sizes = [LayerSize(*size) for size in values["layer_sizes"]]
    return filled(empty_model(values, sizes), folder, device, dtype)


def filled(model: Any, folder: Path, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Return a model without memory with the weights of a folder, in eval mode.

    Raises:
        UserError: When they do not fit.
    """
    stored = read_tensors(folder / WEIGHTS)
    wanted = dict(model.named_parameters())
    odd = sorted(
        n
        for n in stored.keys() | wanted.keys()
        if n not in stored or n not in wanted or stored[n].shape != wanted[n].shape
    )
    if odd:
        raise UserError(
            f"{folder / WEIGHTS} does not fit its config: {len(odd)} tensors differ, the first "
            f"is {odd[0]}.",
            "The model was not saved completely; get its files anew.",
        )
    ready = {n: t.to(device=device, dtype=dtype) for n, t in stored.items()}
    model.load_state_dict(ready, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model.eval()


def empty_model(values: Mapping[str, Any], sizes: list[LayerSize]) -> LlamaForCausalLM:
    """Return a model of the sizes in a config, without memory for its weights.

    Args:
        values: The config's plain values.
        sizes: Sizes of each layer.
    """
    groups = max(1, *(s.num_kv_heads for s in sizes))
    hidden_size = values["hidden_size"]
    # A config that transformers accepts, at least as large in everything.
    ratio = max(s.num_heads // max(1, s.num_kv_heads) for s in sizes)
    largest = {
        "num_attention_heads": groups * max(1, ratio),
        "num_key_value_heads": groups,
        "intermediate_size": max(1, *(s.intermediate_size for s in sizes)),
        "head_dim": values["head_dim"],
    }
    whole = -(-hidden_size // largest["num_attention_heads"]) * largest["num_attention_heads"]
    skipped = ("model_type", "architectures", "layer_sizes", "transformers_version", "dtype")
    rest = {k: v for k, v in values.items() if k not in skipped}
    config = LlamaConfig(**{**rest, **largest, "hidden_size": whole})
    with torch.device("meta"), no_init_weights():
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    model.tie_weights()
    resize(model, hidden_size, sizes)
    return model


# -- artefacts ---------------------------------------------------------------------------------


def write_sizes(model: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """State the sizes of a sliced model in its artefact, with other plain facts about it."""
    sizes = {
        "hidden_size": model.config.hidden_size,
        "layers": [list(vars(size).values()) for size in layer_sizes(model)],
        **facts,
    }
    (folder / SIZES).write_text(json.dumps(sizes) + "\n")


def fit_sizes(model: torch.nn.Module, folder: Path) -> dict[str, Any]:
    """Cut an unpruned model to the sizes that an artefact states, and return the other facts.

    Raises:
        UserError: When the artefact states none.
    """
    try:
        sizes = json.loads((folder / SIZES).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / SIZES} cannot be read: {error}.", "Run again with --fresh to make it anew."
        ) from None
    resize(model, sizes.pop("hidden_size"), [LayerSize(*s) for s in sizes.pop("layers")])
    return dict(sizes)
