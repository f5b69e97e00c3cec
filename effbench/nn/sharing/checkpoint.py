"""Models whose layers share states, to and from folders of safetensors.

Their config has `"model_type": "shared_llama"`, which transformers refuses by name: as a `llama` it
would draw the projections that are not there at random, and only say so in a report.
`layer_sources` and `sharing_mode` are the layer map.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from effbench.api.sharing import FILE, SHARED, LayerMap, read, written
from effbench.nn.llama.shared_attention import map_of, share
from effbench.nn.pruning.checkpoint import filled, write_folder, write_own
from effbench.util.errors import UserError


def write_shared(model: Any, folder: Path) -> None:
    """Write a model into an existing folder, as transformers' own where nothing is shared."""
    sharing = map_of(model)
    if sharing is None:
        write_folder(model, folder)
        return
    own = {
        "model_type": SHARED,
        "architectures": ["SharedLlamaForCausalLM"],
        **written(sharing),
    }
    write_own(model, folder, own)


def read_shared(folder: Path, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Return the model of a folder that `write_shared` made for effbench alone, in eval mode.

    Raises:
        UserError: When a file is missing, corrupt, or does not fit the map.
    """
    values = json.loads((folder / "config.json").read_text())
    sharing = read(values)
    assert sharing is not None
    own = ("model_type", "architectures", "transformers_version", "dtype", *written(sharing))
    config = LlamaConfig(**{k: v for k, v in values.items() if k not in own})
    with torch.device("meta"), no_init_weights():
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    model.tie_weights()
    return filled(share(model, sharing), folder, device, dtype)


# -- artefacts ---------------------------------------------------------------------------------


def write_map(model: torch.nn.Module, folder: Path) -> None:
    """State the layer map of a model in its artefact; an empty one where nothing is shared."""
    sharing = map_of(model) or LayerMap("kv", ())
    (folder / FILE).write_text(json.dumps(written(sharing)) + "\n")


def follow_map(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Turn an unshared model into one that follows the map of an artefact, in place.

    Raises:
        UserError: When the artefact states none.
    """
    try:
        sharing = read(json.loads((folder / FILE).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / FILE} cannot be read: {error}.", "Run again with --fresh to make it anew."
        ) from None
    return share(model, sharing) if sharing else model
