"""A step of linear attention as one call of a C++ kernel, in the place of some twenty operations.

For one position of each sequence on a CPU where nothing wants a gradient; anywhere else there is
none. Sums run in another order than torch's.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import nn

from effbench.nn.linear_attention.features import FeatureMap
from effbench.util import cpp

SOURCE = Path(__file__).with_name("kernels") / "step.cpp"
KINDS = ("softmax", "exp", "prf", "elu")
"""Features by their numbers in `enum Kind`."""


class _Step(ctypes.Structure):
    """The fields of `struct Step`."""

    _fields_ = [
        *((n, c_void_p) for n in ("queries", "keys", "values", "directions", "gain", "gamma")),
        *((n, c_void_p) for n in ("query_factors", "key_factors", "weight", "bias", "before")),
        *((n, c_void_p) for n in ("after", "out")),
        *((n, c_int64) for n in ("batch", "heads", "kv_heads", "width", "groups", "kind")),
        ("threads", c_int64),
        ("eps", c_float),
    ]


def applies(query: torch.Tensor) -> bool:
    """Whether the kernel makes steps of such queries, [B, H, W, D]."""
    fits = query.device.type == "cpu" and query.shape[2] == 1 and query.dtype != torch.float64
    return fits and not torch.is_grad_enabled() and not cpp.why_off() and _loaded() is not None


def step(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    features: FeatureMap,
    factors: tuple[torch.Tensor, torch.Tensor] | None,
    gamma: torch.Tensor,
    norm: nn.GroupNorm,
    before: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normed output of all heads side by side, [B, 1, H D], and the state after it.

    Args:
        states: Queries [B, H, 1, D], keys and values [B, G, 1, D], as they were projected.
        features: Of queries and keys.
        factors: What multiplies the features of both, [B, G, 1, 1] each; None for ones.
        gamma: The decays, [G].
        norm: Of H D channels.
        before: The state, [B, G, D, D]; None for nothing.
    """
    library = _loaded()
    assert library is not None
    rows, heads, _, width = states[0].shape
    kv_heads = states[1].shape[1]
    given = [
        *states,
        features.directions,
        None if features.log_gain is None else features.log_gain.float().exp(),
        gamma,
        *(factors or (None, None)),
        norm.weight,
        norm.bias,
        before,
    ]  # kept, as they are made here, until they are read
    given = [None if t is None else t.float().contiguous() for t in given]
    after = torch.empty(rows, kv_heads, width, width)
    out = torch.empty(rows, 1, heads * width)
    library.step(
        ctypes.byref(
            _Step(
                *(None if t is None else t.data_ptr() for t in (*given, after, out)),
                *(rows, heads, kv_heads, width, norm.num_groups, KINDS.index(features.kind)),
                torch.get_num_threads(),
                norm.eps,
            )
        )
    )
    return out, after


@cache
def _loaded() -> ctypes.CDLL | None:
    library = cpp.loaded(SOURCE)
    if library is not None:
        library.step.argtypes, library.step.restype = [c_void_p], None
    return library
