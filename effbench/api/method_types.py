"""What a method says of itself, and what its hooks are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from effbench.util.lazy import torch

Weights = Literal["compute", "float32", "nf4"]

CALIBRATION_ROWS = 64
"""Training rows that a compression method may look at."""


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    venue: str
    identifier: str
    """arXiv number or DOI."""


@dataclass
class Context:
    """What the hooks may use: device, clock, random numbers and the method's saved state."""

    seed: int
    device: torch.device
    dtype: torch.dtype
    """Compute dtype."""
    generator: torch.Generator
    """CPU generator of the method's own draws; saved and restored with checkpoints."""
    load_model: Callable[[str], torch.nn.Module]
    """Loads another model by its config name (a teacher, a reference), frozen, on the device."""
    tokenizer: Any = None
    step: int = 0
    total_steps: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    """Method state that a checkpoint must keep (tensors and plain values)."""
    backward: Callable[[torch.Tensor], None] = lambda loss: loss.backward()
    """Back-propagates a loss (accelerate's, when a training loop runs)."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context of a forward pass (mixed precision on float32 masters)."""
    clip: Callable[[Sequence[torch.Tensor]], None] = lambda parameters: None
    """Clips gradients in place."""
