"""What lies between the products of a decoder block, eagerly or each as one compiled kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Pointwise:
    """The three functions that a step needs beside products and attention."""

    norm: Callable[[Any, torch.Tensor], torch.Tensor]
    """From an RMS norm's module and x [B, 1, d] to the normed x."""
    turn: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """From queries or keys [B, H, 1, D], cosine and sine [B, 1, 1, D] to the turned ones."""
    gate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """From the two inner products of a gated MLP to what its last product takes."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / rms(x) in float32, rounded, times the weight."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x [B, H, 1, D] at its rotary position."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up."""
    return F.silu(gate) * up


EAGER = Pointwise(lambda norm, x: norm(x), turn, gate)


@cache
def compiled() -> Pointwise:
    """Return functions that torch.compile makes one kernel each; eager ones without Triton."""
    if find_spec("triton") is None:
        return EAGER
    fused_norm, fused_turn, fused_gate = (
        torch.compile(function, dynamic=False) for function in (rms_norm, turn, gate)
    )
    return Pointwise(
        lambda norm, x: fused_norm(x, norm.weight, norm.variance_epsilon), fused_turn, fused_gate
    )
