"""Reward models on pairs that do not count alike: what DORM and its baselines share.

    weigh_by     omega_i of stage 1 (`proxies`), pairs that most proxies agree with (`agreement`),
                 those that they are surest of (`easiest`), sources alike (`sources`), pairs alike
                 (`uniform`)
    fraction     a subset, drawn one pair after the other in proportion to the weights
    apply        pairs repeated as often as they weigh (systematic sampling), or weighted losses
    learn_from   the training rows; the validation rows alone, or both, weighted alike
    objective    Bradley and Terry's, or one that takes a share of the labels for wrong, or ratings:
                 of pairs 4 and 1, or those of rated answers (`regression`, see `rates`)

Proxies are linear heads on the base's last states, which are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from effbench.api.batch import Batch
from effbench.api.examples import Example
from effbench.api.method_types import Context
from effbench.api.schema import NonNegativeFloat, PositiveInt
from effbench.api.spec import DatasetSpec
from effbench.methods.preference import pairs
from effbench.methods.preference.rates import Rates
from effbench.nn.losses import preference
from effbench.nn.weighting import grouping, linear, table
from effbench.util.errors import UserError
from effbench.util.lazy import torch

WEIGHT = "importance"
"""Column of a pair's weight in the loss. `weight` would also be in the loss's denominator."""
KEPT = "pairs"
"""What a run keeps its table under, in `Context.state`."""
FLIPPED = "flipped"
"""Column of a pair, and place in `Context.state`: 1 where its answers are known to be swapped. It
is never learnt from."""


@dataclass(frozen=True)
class Weighs(Rates):
    """A reward model whose training pairs have weights."""

    weigh_by: Literal["bilevel", "proxies", "agreement", "easiest", "sources", "uniform"] = (
        "bilevel"
    )
    """Validation; stage 1 alone; pairs that most proxies agree with; the `fraction` that they are
    surest of; sources alike; pairs alike."""
    learn_from: Literal["train", "validation", "both"] = "train"
    """The rows trained on; the last two are baselines with `weigh_by=uniform`."""
    split: str = "validation"
    """Name of the validation split."""
    groups: Literal["clusters", "sources", "pairs"] = "clusters"
    """What has a weight: source x tercile of uncertainty x agreement, a source, or each pair."""
    fraction: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of the pairs to train on, drawn in proportion to their weights."""
    apply: Literal["draw", "loss"] = "draw"
    """Whether pairs stand in training as often as they weigh, or their losses are weighted."""
    folds: Annotated[int, Interval(ge=2, le=1000)] = 5
    """Folds, F."""
    proxies: PositiveInt = 3
    """Proxies that score each pair out of fold, E."""
    uncertainty: NonNegativeFloat = 1.0
    """Weight a of the uncertainty in a pair's score."""
    disagreement: NonNegativeFloat = 3.0
    """Weight b of the disagreement."""
    objective: Literal["bradley_terry", "conservative", "unbiased", "ratings", "regression"] = (
        "bradley_terry"
    )
    """What training minimises: `conservative` smooths labels (cDPO), `unbiased` is right in the
    mean over swaps (rDPO), `ratings` is the squared error to 4 and 1, `regression` that to the
    ratings of `attributes`."""
    swapped: Annotated[float, Interval(ge=0, lt=0.5)] = 0.1
    """Share of the pairs that `conservative` and `unbiased` take for swapped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split in ("train", "test"):
            use = "trained on" if self.split == "train" else "for the last evaluation"
            raise UserError(
                f"method.split={self.split} cannot judge weights: it is {use}.",
                "Name a split of its own, as method.split=validation.",
            )
        if self.learn_from != "train" and self.weigh_by != "uniform":
            raise UserError(
                f"method.learn_from={self.learn_from} is a baseline without weights.",
                "Set method.weigh_by=uniform too.",
            )
        if self.weigh_by == "easiest" and self.fraction == 1:
            raise UserError(
                "method.weigh_by=easiest keeps a share of the pairs, and method.fraction=1 is all.",
                "Set method.fraction, as to 0.5.",
            )

        if self.regresses != bool(self.attributes):
            raise UserError(
                f"method.objective={self.objective} reads "
                f"{'the ratings' if self.regresses else 'no ratings'} of method.attributes.",
                "Set both: method.objective=regression "
                "'method.attributes=[helpfulness,correctness]', as dataset.attributes has them.",
            )

    @property
    def regresses(self) -> bool:
        """Whether rows are rated answers."""
        return self.objective == "regression"

    def check_dataset(self, dataset: DatasetSpec) -> None:
        """Refuse what `Rates` does, and pairs that have weights already."""
        super().check_dataset(dataset)
        if "weight" in dataset.columns:
            raise UserError(
                f"{self.name} makes weights of its own, and dataset.columns.weight gives others.",
                "Leave out one of them; method=reward takes given weights.",
            )

    def splits(self) -> tuple[str, ...]:
        """Return the validation split, where it is used."""
        used = self.weigh_by == "bilevel" or self.learn_from != "train"
        return (self.split,) if used else ()

    def reads_first(self, rows: int) -> int:
        """Return both answers of all pairs, or rated ones, where proxies judge their states.

        Pairs among rated answers are counted as one.
        """
        return 0 if self.weigh_by == "uniform" else (1 if self.regresses else 2) * rows

    # -- weights -------------------------------------------------------------------------------

    def dataset(
        self, examples: Sequence[Example], model: torch.nn.Module, ctx: Context
    ) -> list[Example]:
        """Return the pairs to train on, as often as they weigh, or with their weights."""
        if self.learn_from != "train":
            own = examples if self.learn_from == "both" else []
            return [*own, *ctx.splits[self.split]]
        if self.weigh_by == "uniform":
            return self.applied(examples, torch.ones(len(examples)), ctx)
        units = [self.unit(e) for e in examples]
        states_of = pairs.answers_of if self.regresses else pairs.states_of
        found = self.weighed(units, states_of(model, units, ctx.device), model, ctx)
        ctx.state[KEPT] = found.state()
        if all(FLIPPED in e.columns for e in units):
            ctx.state[FLIPPED] = torch.tensor([bool(e.columns[FLIPPED]) for e in units])
        return self.applied(examples, found.weights, ctx)

    def weighed(
        self,
        examples: Sequence[Example],
        states: torch.Tensor,
        model: torch.nn.Module,
        ctx: Context,
    ) -> table.PairTable:
        """Return stage 1: evidence, groups and weights of the pairs.

        Args:
            examples: With all answers as sequences.
            states: Of the pairs, [n, d]; of rated answers that of each, [s, d].
            model: The base.
            ctx: Of the run.

        """
        scheme = self.folds, self.proxies, ctx.seed
        margins = (
            pairs.agreement_of(states, examples, self.attributes, *scheme)
            if self.regresses
            else pairs.margins_of(linear.scaled(states), examples, *scheme)
        )
        evidence, sources = grouping.Evidence.of(margins), [pairs.source_of(e) for e in examples]
        by = "sources" if self.weigh_by == "sources" else self.groups
        dealt = grouping.grouped(grouping.labels_of(sources, evidence, by))
        easy = self.weigh_by == "easiest"
        weights = (
            grouping.easiest(margins, self.fraction)
            if easy
            else self.first_weights(evidence, dealt)
        )
        return table.PairTable([e.id for e in examples], sources, evidence, dealt, weights)

    def first_weights(self, evidence: grouping.Evidence, dealt: grouping.Groups) -> torch.Tensor:
        """Return the weights of pairs before validation is looked at, [n] with mean 1.

        Raises:
            UserError: When proxies agree with no pair at all, and only those count.
        """
        if self.weigh_by == "sources":
            return grouping.pair_weights(1 / torch.full_like(dealt.sizes, len(dealt.names)), dealt)
        if self.weigh_by != "agreement":
            return grouping.first_weights(evidence, self.uncertainty, self.disagreement)
        agreed = evidence.agreed.double()
        if not agreed.any():
            raise UserError(
                "Proxies are against every label, so that no pair is left.",
                "Check which answer is the chosen one, or raise method.proxies.",
            )
        return agreed / agreed.mean()

    def applied(
        self, examples: Sequence[Example], weights: torch.Tensor, ctx: Context
    ) -> list[Example]:
        """Return the pairs as training sees them, in the order of the data.

        Args:
            examples: All pairs.
            weights: Of each, [n]; those of weight 0 are left out.
            ctx: Of the run.
        """
        draws = torch.Generator().manual_seed(ctx.seed)
        count = min(int((weights > 0).sum()), max(1, round(self.fraction * len(examples))))
        if count < len(examples):
            return [examples[i] for i in grouping.subset(weights, count, draws)]
        if self.apply == "draw":
            return [examples[i] for i in grouping.repeated(weights, draws)]
        return pairs.with_column(examples, WEIGHT, weights)

    @property
    def loss_unit(self) -> str:
        """Losses are those of pairs; ratings are squared differences."""
        return "" if self.objective in ("ratings", "regression") else super().loss_unit

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the losses of a micro-batch's pairs, weighted, over the pairs of the window."""
        if self.regresses:
            losses, _ = self.validation(model, batch)
        else:
            losses = self.objectives(self.scores(model, batch), batch.sizes)
        if WEIGHT in batch.columns:
            losses = losses * batch.columns[WEIGHT]
        return losses.sum() / batch.window_examples

    def objectives(self, scores: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Return what training minimises of each pair, [E]; validation is Bradley and Terry's."""
        if self.objective == "ratings":
            return preference.rated(scores, sizes)
        if self.objective == "bradley_terry":
            return preference.bradley_terry(scores, sizes)
        robust = (
            preference.conservative if self.objective == "conservative" else preference.unbiased
        )
        return robust(scores, sizes, self.swapped)

    # -- artefact ------------------------------------------------------------------------------

    def finalize(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Let the table of weights ride along until it is saved, and tell of it.

        Where the data say which answers were swapped, the record has how well weights tell.
        """
        if KEPT in ctx.state:
            found = table.PairTable.of(ctx.state[KEPT])
            model.add_module(table.NAME, found)
            ctx.note(found.told())
            wrong = ctx.state.get(FLIPPED)
            if wrong is not None and 0 < int(wrong.sum()) < len(wrong):
                ctx.measured("weights_auroc", grouping.auroc(found.weights, wrong.cpu()), "")
        return model

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the weights of the model, and those of the pairs."""
        super().save(model, folder)
        if table.NAME in model._modules:
            model.get_submodule(table.NAME).write(folder)  # type: ignore[operator]
