"""Tensors to and from files, with errors that say which file is broken and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from effbench.errors import UserError


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file.

    Raises:
        UserError: When the file is missing, truncated or not safetensors.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing.", "Run again with --fresh to make it anew.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read: {error}.",
            "The file is truncated or corrupt; run again with --fresh to make it anew.",
        ) from None


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast all parameters in place; buffers stay, for rotary angles do not bear a short dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def load_tensors(targets: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copy the tensors of a file into `targets`; names and shapes must be the same.

    Raises:
        UserError: When they are not.
    """
    stored = read_tensors(path)
    if stored.keys() != targets.keys():
        odd = sorted(stored.keys() ^ targets.keys())
        raise UserError(
            f"{path} does not fit this model: {len(odd)} tensors differ, the first is {odd[0]!r}.",
            "Use it with the model and method settings that made it.",
        )
    with torch.no_grad():
        for name, target in targets.items():
            if stored[name].shape != target.shape:
                raise UserError(
                    f"{path} does not fit this model: {name} is {tuple(stored[name].shape)} "
                    f"there and {tuple(target.shape)} here.",
                    "Use it with the model and method settings that made it.",
                )
            target.copy_(stored[name])
