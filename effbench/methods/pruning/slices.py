"""Methods that leave a sliced model: what pruning of whole blocks shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Interval

from effbench.api.method_types import Context
from effbench.api.points import Point
from effbench.api.schema import PositiveInt
from effbench.api.shape import Anatomy, AnyShape, ModelShape, Phase
from effbench.api.sharing import require_own_states
from effbench.api.slices import fixed_share, planned_slice, slice_in
from effbench.methods.base import Method
from effbench.nn.llama import weights
from effbench.nn.pruning import checkpoint
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Slices(Method):
    """A method whose artefact is a dense model without some blocks, each layer of its own size."""

    anatomy: ClassVar[Anatomy] = "plain"

    keep: Annotated[float, Interval(gt=0, le=1)] = 0.7
    """Largest share of the decoder's linear weights that stays; 1 prunes nothing."""
    blocks: tuple[Literal["groups", "neurons", "dims"], ...] = ("groups", "neurons", "dims")
    """Kinds of blocks that may go."""
    align: PositiveInt = 1
    """Neurons of a layer, and dimensions, go this many at a time; 64 suits most hardware."""

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse layers that share, and a budget that the prunable blocks cannot meet."""
        require_own_states(shape, self.name)
        least = fixed_share(shape, self.blocks)
        if self.keep < least:
            raise UserError(
                f"method.keep={self.keep} cannot be reached: {least:.3f} of the weights belong to "
                "blocks that may not go.",
                "Raise method.keep, or list more of groups, neurons, dims in method.blocks.",
            )
        return self

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return every weight."""
        return Method.artefact_tensors(self, model)

    def facts(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return what the artefact says of the pruning beside its sizes."""
        return {}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write all weights, the sizes they have, and the facts about it."""
        super().save(model, folder)
        checkpoint.write_sizes(model, folder, self.facts(model))

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` cut to the artefact's sizes, with the artefact's weights."""
        vars(model)["pruned"] = checkpoint.fit_sizes(model, folder)
        weights.load_tensors(self.artefact_tensors(model), folder / "weights.safetensors")
        return model

    def export(self, model: torch.nn.Module, point: Point, folder: Path) -> None:
        """Write a folder that `model=folder` loads, and transformers where all layers are alike."""
        checkpoint.write_folder(model, folder)

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Cut the model to the artefact's sizes; without one, layers have fewer neurons."""
        return slice_in(base, folder) or planned_slice(base, self.keep)
