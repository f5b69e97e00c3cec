"""The model as it is: the base line of every comparison, and the way to evaluate any artefact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from effbench.api.method_types import Context
from effbench.api.shape import ModelShape, Phase
from effbench.methods.base import Method
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Unchanged(Method):
    """Changes nothing and trains nothing."""

    stage: ClassVar[Literal["train", "compress", "eval"]] = "eval"
    works_on: ClassVar[frozenset[str]] = frozenset({"dense", "nf4", "packed", "adapted"})

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Return the model with every parameter frozen."""
        model.requires_grad_(False)
        return model

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the model; there is nothing to read."""
        return self.prepare(model, ctx)

    def shape(self, base: ModelShape, point: str, phase: Phase, folder: Path | None) -> ModelShape:
        """Return the model as it is."""
        return base
