"""Attention of a step to a cache in codes, by a C++ kernel that does not expand it.

For float32 and bfloat16 on a CPU; anywhere else, and for groups that fill no whole registers, there
is none, and codes are expanded first (`entries.expanded`). Sums are in float32, in another order
than torch's.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from effbench.nn.quant.ranges import Ranges, channels_of
from effbench.util import cpp

SOURCE = Path(__file__).with_name("cache_kernels") / "attention.cpp"


DTYPES = (torch.float32, torch.bfloat16)
"""Of queries, keys and values."""


class _Cache(ctypes.Structure):
    """The fields of `struct Cache`."""

    _fields_ = [
        *((n, c_void_p) for n in ("key_codes", "key_scales", "key_lows")),
        *((n, c_void_p) for n in ("value_codes", "value_scales", "value_lows", "keys", "values")),
        *((n, c_int64) for n in ("heads", "groups", "size", "width", "channels", "recent")),
    ]


def applies(bits: int, group: int, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the kernel attends to such codes beside such keys and values, [B, G, F, D] each."""
    plain = all(t.device.type == "cpu" and t.dtype in DTYPES for t in (keys, values))
    if not plain or torch.is_grad_enabled() or cpp.why_off():
        return False
    width = keys.shape[3]
    library = _loaded() if width == values.shape[3] and bits in (8, 4, 2) else None
    if library is None:
        return False
    return all(n * bits % (8 * library.lanes()) == 0 for n in (group, channels_of(group, width)))


def attended(
    query: torch.Tensor,
    packed: tuple[Ranges, Ranges],
    bits: int,
    group: int,
    recent: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Return what one query of each head sees of all groups and tokens, [B, 1, H, D].

    Args:
        query: [B, H, 1, D], H a multiple of G.
        packed: Keys and values of N groups in codes, as `quantised.QuantisedLayer` has them.
        bits: Of a code.
        group: Tokens of a group.
        recent: Keys and values as they came, [B, G, F, D] each, F at least 1.
        scale: What scores are multiplied by.
    """
    library = _loaded()
    assert library is not None
    rows, heads, _, width = query.shape
    kv_heads, groups = recent[0].shape[1], packed[0].codes.shape[2]
    tensors = [
        *(t.contiguous() for part in packed for t in part),
        *(t.float().contiguous() for t in recent),
    ]  # kept until they are read
    sizes = rows * kv_heads, groups, group, width, channels_of(group, width), recent[0].shape[2]
    held = _Cache(*(t.data_ptr() for t in tensors), *sizes)
    asked, each = query.float().contiguous(), heads // kv_heads
    parts = torch.empty(library.parts_floats(ctypes.byref(held), each))
    out = torch.empty(rows, 1, heads, width)
    places = parts.data_ptr(), out.data_ptr(), torch.get_num_threads()
    library.attend(ctypes.byref(held), asked.data_ptr(), each, scale, bits, *places)
    return out.to(query.dtype)


@cache
def _loaded() -> ctypes.CDLL | None:
    library = cpp.loaded(SOURCE)
    if library is None:
        return None
    library.lanes.restype = library.parts_floats.restype = c_int64
    library.parts_floats.argtypes = [c_void_p, c_int64]
    library.attend.argtypes = [
        *(c_void_p, c_void_p, c_int64, c_float, c_int64),
        *(c_void_p, c_void_p, c_int64),
    ]
    library.attend.restype = None
    return library
