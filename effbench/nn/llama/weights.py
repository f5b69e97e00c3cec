"""Tensors to and from files, with errors that say which file is broken and how."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from effbench.util.errors import UserError


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


MAPS = Path("/proc/self/maps")
DONT_NEED = 4
"""MADV_DONTNEED of madvise(2)."""


def own_weights(model: torch.nn.Module) -> None:
    """Copy weights that are still pages of a mapped file, and let go of those pages one by one.

    A mapped file stays whole in memory for as long as one of its tensors lives: a model whose other
    weights were packed into 4 bits would hold all that it was made from.
    """
    files = _mapped_files()
    for parameter in model.parameters():
        old = parameter.data
        if any(start <= old.data_ptr() < end for start, end in files):
            parameter.data = old.clone()
            _forget_pages(old)


def _mapped_files() -> list[tuple[int, int]]:
    """Return the address ranges of mapped safetensors files; none where the system does not say."""
    if not MAPS.exists():
        return []
    lines = (line.split() for line in MAPS.read_text().splitlines())
    ranges = [words[0].split("-") for words in lines if words[-1].endswith(".safetensors")]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


def _forget_pages(tensor: torch.Tensor) -> None:
    """Drop the whole pages of a tensor from memory; read again, they come from their file."""
    begin = -(tensor.data_ptr() // -mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), DONT_NEED)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors of any device to a file, by their names."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)


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
