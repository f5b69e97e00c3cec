"""What methods share whose artefact is linear classifiers beside a model that stays as it is.

The class of a row is the place of its right answer: texts with the same answers for each are the
classification of texts. The classifiers read the mean state of the prompt, and vote.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from effbench.api.batch import Batch
from effbench.api.examples import Example
from effbench.api.method_types import Context
from effbench.api.parts import Linear, Objective
from effbench.api.points import UNNAMED, Point
from effbench.api.shape import Anatomy, ModelShape, Phase
from effbench.api.spec import DatasetSpec
from effbench.api.weights import FLOAT32
from effbench.data.kinds import base as kinds
from effbench.methods.trains import Trains
from effbench.nn.weak_labels import ensemble
from effbench.util.errors import UserError
from effbench.util.lazy import torch

HEADS = "weak_heads"
"""Name of the classifiers in the model."""


@dataclass(frozen=True)
class Classifiers(Trains):
    """Linear classifiers on a frozen model's states."""

    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "packed"})
    produces: ClassVar[str] = "adapted"
    anatomy: ClassVar[Anatomy] = "other"
    answers_with: ClassVar[str] = "classifiers of its own"
    eval_settings: ClassVar[frozenset[str]] = frozenset({"vote"})

    classes: Annotated[int, Ge(2)] = 2
    """Answers of each row, K; the class of a row is the place of the right one."""
    vote: Literal["probability", "one_hot", "last"] = "probability"
    """What classifiers give to the ensemble; `last` uses the last one alone (the baseline)."""

    @property
    def members(self) -> int:
        """How many classifiers there are."""
        return 1

    def check_dataset(self, dataset: DatasetSpec) -> None:
        """Refuse rows without classes."""
        if not kinds.find(dataset.kind).choices:
            raise UserError(
                f"{self.name} learns which of a row's answers is right; dataset "
                f"{dataset.called!r} is of kind {dataset.kind!r}.",
                "Use texts with the same answers for each (dataset.kind=choices).",
            )

    def unit(self, example: Example) -> Example:
        """Return a row of validation with its class as a column; rows to train on have none."""
        if not example.choices:
            return example
        return replace(example, columns={**example.columns, "answer": example.right})

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Freeze the model and put the classifiers beside it."""
        model.requires_grad_(False)
        width = model.get_input_embeddings().embedding_dim  # type: ignore[operator]
        heads = ensemble.Ensemble(width, self.classes, self.members)
        model.add_module(HEADS, heads.to(next(model.parameters()).device))
        return model

    def scores(self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED) -> torch.Tensor:
        """Return the log-probability of each sequence's class, [B]: its column `choice`, or 0."""
        states = ensemble.mean_states(model, batch)
        found = heads_of(model).probabilities(states, self.vote).log()
        sizes = torch.tensor(batch.sizes or [1] * len(found), device=found.device)
        places = torch.zeros(len(batch.input_ids), dtype=torch.int64, device=found.device)
        places = batch.columns.get("choice", places)
        if int(places.max()) >= self.classes:
            raise UserError(
                f"A row has more answers than the {self.classes} classes.", "Evaluate other rows."
            )
        return found.repeat_interleave(sizes, 0).gather(1, places[:, None])[:, 0]

    def validation(
        self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED
    ) -> tuple[torch.Tensor, int]:
        """Return the negative log-likelihood of each row's class, [E], and how many there are."""
        named = replace(batch, columns={"choice": batch.columns["answer"]})
        losses = -self.scores(model, named)
        return losses, len(losses)

    def trained_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return heads, votes and moments."""
        return {f"{HEADS}.{n}": p.detach() for n, p in heads_of(model).named_parameters()}

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Add the classifiers in float32; a step runs no block, for all states are there."""
        width, members = base.hidden_size, self.members
        heads = Linear("heads", width, self.classes, FLOAT32, True, copies=members, bias=True)
        moments = Linear("moments", width, 2, FLOAT32)
        more = (heads, Linear("votes", members, 1, FLOAT32), moments)
        objective = Objective(logit_bytes=0, reads_out=False)
        layers = tuple(x.running(0) for x in base.layers) if phase == "train" else base.layers
        return replace(base, layers=layers, more=more, objective=objective)


def heads_of(model: torch.nn.Module) -> ensemble.Ensemble:
    """Return the classifiers in a model."""
    found = model.get_submodule(HEADS)
    assert isinstance(found, ensemble.Ensemble)
    return found
