"""DORM: weights of preference pairs, refined on a validation set, for a reward model.

Zhang et al., DORM: Preference Data Weights Optimization for Reward Modeling in LLM Alignment,
Findings of EMNLP 2025, doi 10.18653/v1/2025.findings-emnlp.1237.

    1. omega_i from the uncertainty and the disagreement of proxies       (`nn.weighting.grouping`)
    2. min over lambda, w, max over u of                                    (`nn.weighting.bilevel`)
           L_val(w) + alpha [ sum_g lambda_g l_g(w) - sum_g lambda_g l_g(u) ],  lambda = softmax(p)
    3. a reward model trained with the weights, or on a subset drawn by them

w and u are two adapters with two heads over one frozen base, l_g the mean Bradley-Terry loss of a
group of pairs, or the squared error of a group of rated answers (`rates`). The stages and the
softmax over groups are the paper's, as its abstract and code have them; that the solver is the
penalty form is inferred. Our choices: all formulas of stage 1, linear proxies on last states,
groups by source, tercile of uncertainty and agreement, mini-batches weighted by n lambda_g / n_g
instead of stratified ones, everything that `nn.weighting` says.
`search=heads` finds p with linear heads before training; training is then stage 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.examples import Example
from effbench.api.method_types import Context, Paper
from effbench.api.schema import Decay, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from effbench.api.shape import AnyShape
from effbench.methods.preference import pairs
from effbench.methods.preference.twins import GROUP, TwinAdapters, Weighing
from effbench.methods.preference.weighing import KEPT
from effbench.nn.adapters import twin
from effbench.nn.weighting import bilevel, grouping, linear, table
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class DORM(TwinAdapters):
    """A reward model on pairs that are weighted by what helps on a trusted validation set."""

    paper: ClassVar[Paper | None] = Paper(
        "DORM: Preference Data Weights Optimization for Reward Modeling in LLM Alignment",
        "Findings of EMNLP 2025",
        "10.18653/v1/2025.findings-emnlp.1237",
    )

    search: Literal["adapters", "heads"] = "adapters"
    """Where p moves: with two adapters, or before training with two linear heads."""
    search_steps: PositiveInt = 400
    """Steps of the search with heads; with adapters it is as long as training."""
    penalty: NonNegativeFloat = 10.0
    """alpha; 0 trains w on validation alone and moves no weight."""
    growth: PositiveFloat = 1.0
    """Factor of alpha from one round to the next, c."""
    rounds: PositiveInt = 1
    """Rounds, of equal length."""
    hold: Fraction = 0.1
    """Share of the steps at the start in which the weights stay."""
    weight_rate: NonNegativeFloat = 0.05
    """Step size of p, eta_p."""
    weight_optimizer: Literal["sgd", "adam"] = "sgd"
    """What moves p."""
    tau: PositiveFloat = 1.0
    """Temperature of the softmax over groups."""
    floor: Decay = 0.0
    """Part of the shares that is dealt out evenly."""
    entropy: NonNegativeFloat = 0.0
    """Weight of a bonus for even shares."""
    smoothing: Decay = 0.9
    """Decay of the groups' mean losses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regresses and self.weigh_by == "bilevel" and self.search == "heads":
            raise UserError(
                "method.search=heads searches over pairs, and method.objective=regression has "
                "ratings.",
                "Set method.search=adapters, or a baseline of method.weigh_by.",
            )
        if self.twins and self.fraction < 1:
            baseline = "a baseline of method.weigh_by, such as proxies"
            raise UserError(
                "method.fraction draws by weights that search=adapters has only at its end.",
                f"Set {baseline if self.regresses else 'method.search=heads'}.",
            )
        if self.twins and self.objective not in ("bradley_terry", "regression"):
            raise UserError(
                f"method.objective={self.objective} has no twin: u and w learn by Bradley-Terry.",
                "Set method.search=heads, or a baseline of method.weigh_by.",
            )

    @property
    def twins(self) -> bool:
        """Whether u and w are two adapters that train together."""
        return self.weigh_by == "bilevel" and self.search == "adapters"

    @property
    def schedule(self) -> bilevel.Schedule:
        """alpha, and when p stays."""
        return bilevel.Schedule(self.penalty, self.growth, self.rounds, self.hold)

    def mixture(self, found: table.PairTable) -> bilevel.Mixture:
        """Return p as stage 1 has it."""
        outer = bilevel.Outer(
            self.weight_rate,
            self.weight_optimizer,
            self.tau,
            self.floor,
            self.entropy,
            self.smoothing,
        )
        return bilevel.Mixture(grouping.first_logits(found.weights, found.groups, self.tau), outer)

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse two sets of all weights, and what `Reward` does."""
        if self.twins and self.trains == "full":
            raise UserError(
                "method.search=adapters needs two adapters, and method.trains=full has none.",
                "Set method.search=heads, or method.trains=lora.",
            )
        return super().resolve(shape)

    # -- weights -------------------------------------------------------------------------------

    def weighed(
        self,
        examples: Sequence[Example],
        states: torch.Tensor,
        model: torch.nn.Module,
        ctx: Context,
    ) -> table.PairTable:
        """Return stage 1, and after it the weights of the search with heads."""
        found = super().weighed(examples, states, model, ctx)
        if self.weigh_by != "bilevel" or self.twins:
            return found
        trusted = pairs.states_of(model, [self.unit(e) for e in ctx.splits[self.split]], ctx.device)
        mixture = self.mixture(found)
        bilevel.search(
            linear.scaled(states),
            found.groups.of,
            linear.scaled(trusted, like=states),
            mixture,
            self.schedule,
            self.search_steps,
            pairs.RATE,
        )
        found.weights = grouping.pair_weights(mixture.shares, found.groups)
        return found

    def applied(
        self, examples: Sequence[Example], weights: torch.Tensor, ctx: Context
    ) -> list[Example]:
        """Return the pairs as training sees them: two adapters see all, each with its group."""
        if self.twins:
            return pairs.with_column(examples, GROUP, ctx.state[KEPT]["groups"])
        return super().applied(examples, weights, ctx)

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return p, which two adapters move."""
        if not self.twins or KEPT not in ctx.state:
            return Evolution()
        return Weighing(self.mixture(found := table.PairTable.of(ctx.state[KEPT])), found.groups)

    def update(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        window: Sequence[Batch],
        ctx: Context,
    ) -> torch.Tensor:
        """Move u, w and p once; return the weighted loss of w on the training pairs."""
        if not self.twins:
            return super().update(model, optimizer, window, ctx)
        own, schedule = ctx.evolution, self.schedule
        alpha = schedule.penalty_at(ctx.step, ctx.total_steps)
        trusted = [self.unit(e) for e in ctx.splits[self.split]]
        judged = pairs.drawn_like(window, trusted, ctx.tokenizer.pad_token_id or 0, ctx)
        weights = [own.importance(batch) for batch in window]
        optimizer.zero_grad(set_to_none=True)
        with twin.without_dropout(model):
            with twin.twin_in_place(model, self.owners(model)):
                lower = self.passed(model, window, weights, 1.0, ctx)
            upper = self.passed(model, window, weights, alpha / (1 + alpha), ctx)
            even = [torch.ones(len(b.sizes), device=ctx.device) for b in judged]
            self.passed(model, judged, even, 1 / (1 + alpha), ctx)
        for weights_of_one in self.sets(model):
            ctx.clip(weights_of_one)
        optimizer.step()
        own.mixture.observe(torch.cat([b.columns[GROUP] for b in window]).cpu(), upper, lower)
        if schedule.moves(ctx.step, ctx.total_steps):
            own.mixture.move(alpha)
        return (upper * torch.cat(weights)).mean()

    def finalize(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Leave w alone, with the weights of the pairs as they ended."""
        own = ctx.evolution
        if isinstance(own, Weighing):
            ctx.state[KEPT]["weights"] = grouping.pair_weights(own.mixture.shares, own.groups)
        return super().finalize(model, ctx)
