"""What a method says of itself, and what its hooks are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from effbench.api.evolution import Evolution
from effbench.api.examples import Example
from effbench.util.lazy import torch

Weights = str
"""`compute`, `float32`, or the name of a packed weight format; see `effbench.api.weights`."""

CALIBRATION_ROWS = 64
"""Training rows that a compression method may look at."""


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    venue: str
    identifier: str
    """arXiv number or DOI."""


@dataclass(frozen=True)
class ProgramUsage:
    """What a program in a process of its own took."""

    seconds: float
    processor_seconds: float
    """Of all processes that it waited for."""
    peak_bytes: int
    """Largest resident size of one of its processes."""


def _no_program(words: Sequence[str]) -> ProgramUsage:
    raise RuntimeError(f"there is no run to start {words[0]} for")


def _no_tokenizer(name: str) -> Any:
    raise RuntimeError(f"there is no run whose key has model {name}")


@dataclass
class Context:
    """What the hooks may use: device, clock, random numbers, other models."""

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
    """What was found out about the data before the structure went in; kept in checkpoints."""
    evolution: Any = field(default_factory=Evolution)
    """What changes the model while it trains: the method's own `Evolution`."""
    splits: dict[str, list[Example]] = field(default_factory=dict)
    """Rows of the splits that the method asks for beside `train`, by name; see `Trains.splits`."""
    note: Callable[[str], None] = lambda text: None
    """Adds a sentence to the run's record."""
    measured: Callable[[str, float, str], None] = lambda name, value, unit: None
    """Adds a number of the stage at work, with its unit, to the run's record."""
    folder: Path = field(default_factory=lambda: Path(gettempdir()))
    """Where there is room for what is needed for a while only (`util.files.scratch_folder`)."""
    program: Callable[[Sequence[str]], ProgramUsage] = _no_program
    """Runs a program, given as words, to its end, while a model is compressed; its memory and
    energy count as the run's."""
    aux: dict[str, torch.nn.Module] = field(default_factory=dict)
    """The method's auxiliary models by name, frozen; they are no part of the model."""
    backward: Callable[[torch.Tensor], None] = lambda loss: loss.backward()
    """Back-propagates a loss (accelerate's, when a training loop runs)."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context of a forward pass (mixed precision on float32 masters)."""
    reduce: Callable[[Sequence[torch.nn.Parameter], torch.Tensor], None] = lambda *_: None
    """Sums gradients and a step's loss over the processes of a run, in place."""
    unscale: Callable[[], None] = lambda: None
    """Frees the step's gradients of the factor that a loss in float16 was multiplied by, once a
    step; where they overflowed there are none afterwards, and the step changes nothing."""
    clip: Callable[[Sequence[torch.Tensor]], None] = lambda parameters: None
    """Clips gradients in place."""
    load_tokenizer: Callable[[str], Any] = _no_tokenizer
    """Loads the tokenizer of another model by its config name, where that reads tokens of its own.
    """
