"""Entries of a cache made ready to be attended to by C++ kernels, where there are some.

Each does in one pass what several operations of torch do one after the other, the same to the bit:
codes are expanded to the place where their tokens stand, keys are turned at their places. They are
for float32 on a CPU and for what needs no gradient; anywhere else they give None.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from effbench.nn.quant.ranges import Ranges, channels_of
from effbench.util import cpp

SOURCE = Path(__file__).with_name("cache_kernels") / "entries.cpp"
OPTIONS = (*cpp.OPTIONS, "-ffp-contract=off")
"""As written, each operation rounded by itself, so that they give what torch's operations give."""


def expanded(
    packed: tuple[Ranges, Ranges], bits: int, group: int, recent: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return keys and values [B, G, N g + F, D] of N groups in codes and F tokens as they came.

    Args:
        packed: Keys and values of the groups, as `quantised.QuantisedLayer` has them.
        bits: Of a code, 8, 4 or 2.
        group: Tokens of a group, g.
        recent: Keys and values as they came, [B, G, F, D] each; D may be their own.
    """
    library = _library(*recent)
    if library is None or group * bits % 8:  # the codes of a channel fill no whole bytes
        return None
    keys, values = (_room(part, group, own) for part, own in zip(packed, recent, strict=True))
    sizes = [(*t.shape[:2], part.codes.shape[2]) for t, part in zip(recent, packed, strict=True)]
    threads = torch.get_num_threads()
    for function, part, out, (rows, heads, groups), channels in (
        (library.expand_keys, packed[0], keys, sizes[0], ()),
        (
            library.expand_values,
            packed[1],
            values,
            sizes[1],
            (channels_of(group, values.shape[3]),),
        ),
    ):
        parts = part.codes, part.scales.float(), part.lows.float()
        given = [t.contiguous() for t in parts]  # kept until they are read
        places = [t.data_ptr() for t in given]
        wide = out.shape[3]
        end = out.data_ptr(), out.shape[2], threads
        function(*places, rows * heads, groups, group, wide, *channels, bits, *end)
    return keys, values


def _room(part: Ranges, group: int, recent: torch.Tensor) -> torch.Tensor:
    """Return room for the tokens of all groups, and behind it those that are as they came."""
    rows, heads, tokens, width = recent.shape
    coded = part.codes.shape[2] * group
    out = recent.new_empty(rows, heads, coded + tokens, width)
    out[:, :, coded:] = recent
    return out


def turned(
    x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], places: torch.Tensor
) -> torch.Tensor | None:
    """Return [B, H, T, D] turned at places [B or 1, T], as Llama turns queries and keys.

    Args:
        x: What is turned; its last dimension lies together.
        angles: Cosine and sine of every place, [places, D].
        places: int64.
    """
    library = _library(x, *angles)
    if library is None or x.stride(3) != 1:
        return None
    cos, sin = (table.contiguous() for table in angles)
    places, out = places.contiguous(), torch.empty_like(x)
    sizes, own, given = ((c_int64 * 4)(*of) for of in (x.shape, x.stride(), out.stride()))
    shared = int(places.shape[0] == 1)
    tables = cos.data_ptr(), sin.data_ptr(), places.data_ptr(), shared
    library.turn(x.data_ptr(), own, sizes, *tables, out.data_ptr(), given, torch.get_num_threads())
    return out


def _library(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    """Return the library for tensors in float32 on a CPU, or None where it cannot be had."""
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return None if not plain or tracked or cpp.why_off() else _loaded()


@cache
def _loaded() -> ctypes.CDLL | None:
    library = cpp.loaded(SOURCE, OPTIONS)
    if library is None:
        return None
    library.expand_keys.argtypes = [*[c_void_p] * 3, *[c_int64] * 5, c_void_p, *[c_int64] * 2]
    library.expand_values.argtypes = [*[c_void_p] * 3, *[c_int64] * 6, c_void_p, *[c_int64] * 2]
    library.turn.argtypes = [*[c_void_p] * 6, c_int64, *[c_void_p] * 2, c_int64]
    library.expand_keys.restype = library.expand_values.restype = library.turn.restype = None
    return library
