"""Methods that leave a model whose layers share states, trained: what they have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from effbench.api.method_types import Context
from effbench.api.points import Point
from effbench.api.shape import Anatomy, ModelShape
from effbench.api.sharing import LayerMap, shared_in, shared_shape
from effbench.methods.base import Method
from effbench.methods.trains import Trains
from effbench.nn.llama import weights
from effbench.nn.sharing import checkpoint
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Shares(Trains):
    """Training of layers that take states from earlier ones; the artefact states who from whom."""

    anatomy: ClassVar[Anatomy] = "plain"

    def sharing(self, num_layers: int) -> LayerMap:
        """Return the layer map that a model of so many layers ends with, as far as is planned."""
        raise NotImplementedError

    def shared(self, base: ModelShape, folder: Path | None) -> ModelShape:
        """Return the model as its artefact's map has it, or the planned one."""
        return shared_in(base, folder) or shared_shape(base, self.sharing(base.num_layers))

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return every weight."""
        return Method.artefact_tensors(self, model)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write all weights and the layer map."""
        super().save(model, folder)
        checkpoint.write_map(model, folder)

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` turned into the shared one of the artefact, frozen."""
        model = checkpoint.follow_map(model, folder)
        weights.load_tensors(self.artefact_tensors(model), folder / "weights.safetensors")
        return model.requires_grad_(False)

    def export(self, model: torch.nn.Module, point: Point, folder: Path) -> None:
        """Write a folder that `model=folder` loads; transformers does where nothing is shared."""
        checkpoint.write_shared(model, folder)
