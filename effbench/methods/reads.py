"""Methods that make no artefact: they evaluate what is there in some way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from effbench.api.method_types import Context
from effbench.api.spec import Stage
from effbench.methods.base import Method
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Reads(Method):
    """A method of evaluation alone, whatever made the model."""

    stage: ClassVar[Stage] = "eval"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "packed", "adapted"})

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the model; there is nothing to read."""
        return self.prepare(model, ctx)
