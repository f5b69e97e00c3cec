"""What lies between the products of a decoder block, eagerly or each as one compiled kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

Normed = tuple[torch.Tensor, torch.Tensor]
"""The residual stream and its normed form, [B, 1, d] each."""


@dataclass(frozen=True)
class Pointwise:
    """The functions that a step needs beside products and attention."""

    norm: Callable[[Any, torch.Tensor, torch.Tensor | None], Normed]
    """From an RMS norm's module, the residual stream and what a block adds to it to both."""
    turn: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """From queries or keys [B, H, *, D], cosine and sine [B, 1, 1, D] to the turned ones."""
    gate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """From the two inner products of a gated MLP to what its last product takes."""
    move: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """From a start [B, 1, d], a change and its scale to their sum, rounded as the start is."""


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x [B, H, *, D] at its rotary position."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up."""
    return F.silu(gate) * up


def move(start: torch.Tensor, change: torch.Tensor, scale: float) -> torch.Tensor:
    """Return start + scale * change in the wider of their dtypes, rounded to that of the start."""
    return (start + scale * change).to(start.dtype)


def module_norm(norm: Any, hidden: torch.Tensor, added: torch.Tensor | None) -> Normed:
    """Add, and call the norm's module."""
    hidden = hidden if added is None else hidden + added
    return hidden, norm(hidden)


def rms_norm(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> Normed:
    """Add, and return x / rms(x) in float32, rounded, times the weight."""
    hidden = hidden if added is None else hidden + added
    wide = hidden.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return hidden, weight * normed.to(hidden.dtype)


EAGER = Pointwise(module_norm, turn, gate, move)


@cache
def compiled() -> Pointwise:
    """Return functions that torch.compile makes one kernel each; eager ones without Triton."""
    return fused(torch.compile) if find_spec("triton") else EAGER


def fused(make: Callable[[Any], Any]) -> Pointwise:
    """Return functions that `make` made of plain ones."""
    norm = make(rms_norm)
    return Pointwise(
        lambda module, hidden, added: norm(hidden, added, module.weight, module.variance_epsilon),
        make(turn),
        make(gate),
        make(move),
    )
