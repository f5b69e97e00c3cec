"""Which layers a method may drop: listed, evenly spaced, or chosen by what they change least."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from effbench.api.examples import Example
from effbench.api.method_types import Context
from effbench.api.schema import Fraction
from effbench.api.shape import AnyShape
from effbench.api.sharing import require_own_states
from effbench.api.skipping import candidates, check_droppable, evenly_spaced
from effbench.methods.trains import Trains
from effbench.nn.depth import influence
from effbench.util.files import write_atomic
from effbench.util.lazy import torch

CHOSEN = "droppable"
"""Key of layers that were measured in `ctx.state`."""
LAYERS = "droppable.json"
"""File of the artefact that lists them."""
ROWS, TOKENS = 16, 256
"""Training rows that influence is measured on, and how much of each."""


@dataclass(frozen=True)
class ChoosesDroppable(Trains):
    """A method that trains for some droppable layers."""

    fraction: Fraction = 0.5
    """Share p of the candidate layers that are droppable; 0 drops nothing."""
    layers: tuple[int, ...] | None = None
    """The droppable layers themselves, counted from 0; null chooses them by `fraction`."""
    choice: Literal["even", "influence"] = "even"
    """Which of the candidates are droppable, where they are chosen: evenly spaced ones, or those
    that change least what they read of the first training rows (block influence)."""

    @property
    def measures(self) -> bool:
        """Whether only the model can tell which layers are droppable."""
        return self.layers is None and self.choice == "influence"

    def droppable(self, num_layers: int) -> tuple[int, ...]:
        """Return as many layers as are droppable, ascending, and these very ones if not measured.

        Args:
            num_layers: Of the model.
        """
        chosen = evenly_spaced(num_layers, self.fraction) if self.layers is None else self.layers
        return tuple(sorted(chosen))

    def chosen(self, num_layers: int, ctx: Context) -> Sequence[int]:
        """Return the droppable layers, ascending; measured ones are in `ctx.state`."""
        return ctx.state[CHOSEN] if self.measures else self.droppable(num_layers)

    def stored(self, num_layers: int, folder: Path | None) -> Sequence[int]:
        """Return those of an artefact; without one, evenly spaced ones stand for measured ones."""
        if self.measures and folder and (folder / LAYERS).is_file():
            return _listed(folder)
        return self.droppable(num_layers)

    def indices(self, model: torch.nn.Module) -> Sequence[int]:
        """Return the droppable layers of a prepared model, ascending."""
        raise NotImplementedError

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse layers that do not exist or cannot be dropped."""
        require_own_states(shape, self.name)
        fraction = self.fraction * (self.layers is None)
        check_droppable(self.droppable(shape.num_layers), shape.num_layers, fraction)
        return self

    def dataset(
        self, examples: Sequence[Example], model: torch.nn.Module, ctx: Context
    ) -> list[Example]:
        """Choose the layers by their influence on the first rows, where that is asked for."""
        if self.measures:
            texts = [row.ids[:TOKENS] for row in examples[:ROWS]]
            found = influence.of_texts(model, [torch.tensor(t, device=ctx.device) for t in texts])
            among = candidates(len(found))
            count = len(self.droppable(len(found)))
            ctx.state[CHOSEN] = sorted(sorted(among, key=lambda i: float(found[i]))[:count])
        return super().dataset(examples, model, ctx)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write what was trained, and for which layers where that was measured."""
        super().save(model, folder)
        if self.measures:
            write_atomic(folder / LAYERS, json.dumps(list(self.indices(model))) + "\n")

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Put what was trained beside the layers that it was trained for."""
        if self.measures:
            ctx.state[CHOSEN] = _listed(folder)
        return super().load(model, folder, ctx)


def _listed(folder: Path) -> list[int]:
    found: list[int] = json.loads((folder / LAYERS).read_text())
    return found
