"""A reward model by regression: a head with an output for each rated attribute of an answer.

Wang et al., HelpSteer2: Open-source dataset for training top-performing reward models, NeurIPS
2024, arXiv 2406.08673, as NeMo-Aligner trains it and DORM's code does.

    a(x, y) = W h_last(x, y)                           W [A, d], attributes a [A]
    loss    = mean over the rated entries of (a_k(x, y) - rating_k)^2
    r(x, y) = c . a(x, y)                              c fixed; 1 / A each unless given

Our choices: the mean is over a row's entries (both answers' of a pair) and then over rows, so that
rows count alike whatever micro-batch they are in, where NeMo-Aligner's is over those of a
micro-batch; W has no bias and starts as the head of `reward` does.
"""

from __future__ import annotations

from dataclasses import dataclass

from effbench.api.batch import Batch
from effbench.api.points import UNNAMED, Point
from effbench.api.spec import DatasetSpec
from effbench.data.kinds import base as kinds
from effbench.data.kinds.rated import column
from effbench.methods.preference.reward import Reward
from effbench.nn.losses import preference
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Rates(Reward):
    """A reward model that learns ratings, where `attributes` names any."""

    attributes: tuple[str, ...] = ()
    """What answers are rated in, those of `dataset.attributes`: an output of the head each."""
    combination: tuple[float, ...] = ()
    """Weight of each attribute in the reward; empty for their mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names, weights = self.attributes, self.combination
        if len(set(names)) < len(names):
            raise UserError(
                f"method.attributes=[{','.join(names)}] names one twice.", "Once will do."
            )
        if weights and len(weights) != len(names):
            raise UserError(
                f"method.combination has {len(weights)} weights for {len(names)} attributes.",
                f"Give one for each of method.attributes=[{','.join(names)}].",
            )
        if weights and not any(weights):
            raise UserError(
                "method.combination gives every answer a reward of 0.", "Weigh one attribute."
            )

    @property
    def outputs(self) -> int:
        """One for each attribute, or the reward itself."""
        return len(self.attributes) or 1

    def check_dataset(self, dataset: DatasetSpec) -> None:
        """Refuse rows that are not rated in the attributes; without any, what `Reward` does."""
        own, given = (f"attributes=[{','.join(x)}]" for x in (self.attributes, dataset.attributes))
        rated = kinds.find(dataset.kind).rates
        if rated and not self.attributes:
            raise UserError(
                f"{self.name} learns from pairs here; dataset {dataset.called!r} is of kind "
                f"{dataset.kind!r}.",
                f"Learn its ratings: method.objective=regression 'method.{given}'",
            )
        if not self.attributes:
            super().check_dataset(dataset)
        elif not rated:
            raise UserError(
                f"{self.name} learns ratings here; dataset {dataset.called!r} is of kind "
                f"{dataset.kind!r}.",
                "Use rated answers, perhaps with pairs among them: dataset.kind=rated "
                f"'dataset.{own}'",
            )
        elif set(self.attributes) != set(dataset.attributes):
            raise UserError(
                f"method.{own}, but the answers of dataset {dataset.called!r} are rated in others: "
                f"{given}.",
                f"Name the same: 'method.{given}'",
            )

    def scores(self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED) -> torch.Tensor:
        """Return each sequence's reward, [B] float32."""
        if not self.attributes:
            return super().scores(model, batch, point)
        outputs = self.read(model, batch)
        weights = self.combination or (1 / self.outputs,) * self.outputs
        return outputs @ outputs.new_tensor(weights)

    def validation(
        self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED
    ) -> tuple[torch.Tensor, int]:
        """Return the loss of each example, [E], and how many there are."""
        if not self.attributes:
            return super().validation(model, batch, point)
        ratings = torch.stack([batch.columns[column(a)] for a in self.attributes], 1).float()
        losses = preference.regressed(self.read(model, batch), ratings, batch.sizes)
        return losses, len(losses)
