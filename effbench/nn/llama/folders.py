"""Weights of a model from a folder that another program saved as transformers does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from effbench.util.errors import UserError

SAVING = "It has to save the whole model there with model.save_pretrained(FOLDER), dense."


def read(folder: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what a folder has for each parameter of a model, in the parameter's dtype.

    Raises:
        UserError: When it lacks one, has it in another shape or packed, or with values that are
            not finite.
    """
    wanted = dict(model.named_parameters())
    turned = {n for n, m in model.named_modules() if getattr(m, "turned_in_files", False)}
    _require_dense(folder)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(folder):
        if name in wanted:
            tensor = tensor.t() if name.removesuffix(".weight") in turned else tensor
            found[name] = _fitting(name, tensor, wanted[name], folder)
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(
            f"{folder.name} lacks {len(missing)} of {len(wanted)} weights; "
            f"the first is {missing[0]}.",
            SAVING,
        )
    return found


def _require_dense(folder: Path) -> None:
    config = folder / "config.json"
    try:
        packed = json.loads(config.read_text()).get("quantization_config")
    except OSError:
        deeper = [x.relative_to(folder.parent) for x in sorted(folder.glob("*/config.json"))]
        there = f", but {deeper[0]}" if deeper else ""
        raise UserError(
            f"The program left no {folder.name}/{config.name}{there}.", SAVING
        ) from None
    except (ValueError, AttributeError):
        raise UserError(f"{folder.name}/{config.name} is no JSON object.", SAVING) from None
    if packed:
        kind = packed.get("quant_method", "packed") if isinstance(packed, dict) else "packed"
        raise UserError(
            f"The program left {kind} weights, which cannot be read here.",
            "Have it save what they stand for, dense (auto-round: --format fake).",
        )


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of all safetensors files of a folder by name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"The program left no *.safetensors in {folder.name}.", SAVING)
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder.name}/{path.name} cannot be read: {error}.", SAVING) from None


def _fitting(
    name: str, tensor: torch.Tensor, parameter: torch.Tensor, folder: Path
) -> torch.Tensor:
    if tensor.shape != parameter.shape:
        raise UserError(
            f"{name} is {tuple(tensor.shape)} in {folder.name} and {tuple(parameter.shape)} in the "
            "model.",
            SAVING,
        )
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"{name} in {folder.name} holds what is no finite number.",
            "Try the program by hand on the same model.",
        )
    return tensor.to(parameter.device, parameter.dtype).contiguous()
