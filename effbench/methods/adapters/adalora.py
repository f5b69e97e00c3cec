"""AdaLoRA: adapters whose ranks are shared out among the layers while they train.

Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, ICLR 2023,
arXiv 2303.10512.

    y = W x + (alpha / R0) * P (lambda * (Q drop(x)))     Q [R0, d_in], lambda [R0], P [d_out, R0]
    b(t) = b_T + (b_0 - b_T) (1 - t)^3                    t from 0 to 1 between `begin` and `end`

All layers start at rank R0. After an optimiser step, the b(t) ranks of all layers that matter most
(`nn.adapters.rank_budget`) keep their lambda, and those of the others become zero; they may come
back until `end`. Then `rank` ranks a layer are left on average, and they train on. P and Q are kept
near to orthonormal by gamma times the distance (`nn.adapters.svd`). In the end lambda is folded
into Q and what was pruned is dropped: a plain LoRA adapter with a rank of its own in every layer.

Importance is taken after the step, from the gradients that it was made with, as in the authors'
code and peft's, which this equals. Our choices: Q starts as A in our other methods and P alike,
uniform and not Gaussian; R0 is one and a half times the rank (the paper's 12 for 8), the window
about where the paper's is; the budget is met exactly, even among equal scores; the distance adds
its gradient and not its value to the loss, so that training losses can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Self

from annotated_types import Interval

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.method_types import Context, Paper
from effbench.api.points import Point
from effbench.api.rank_budgets import ranked, weighed
from effbench.api.schema import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from effbench.api.shape import LINEARS, Anatomy, AnyShape, ModelShape, Phase
from effbench.methods.adapters.lora import Dropout
from effbench.methods.adapters.targets import check_rank_fits, check_targets, targets_in
from effbench.methods.trains import Trains
from effbench.nn.adapters import lowrank, peft_lora, rank_budget, svd
from effbench.nn.llama import surgery, weights
from effbench.nn.model_kinds import base as model_kinds
from effbench.util.errors import UserError
from effbench.util.lazy import torch

Beta = Annotated[float, Interval(gt=0, lt=1)]


@dataclass(frozen=True)
class AdaLoRA(Trains):
    """Low-rank adaptation with a budget of ranks for all layers together."""

    paper: ClassVar[Paper | None] = Paper(
        "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        "ICLR 2023",
        "2303.10512",
    )
    anatomy: ClassVar[Anatomy] = "other"
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "classifier", "seq2seq"})
    learning_rate: ClassVar[float] = 5e-3
    weighted_version: ClassVar[int] = 2
    """2: all terms of the loss have the weights of their rows."""
    float16_version: ClassVar[int] = 2
    """2: importance is that of gradients without the loss scaler's factor, and of no overflow."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "packed"})
    produces: ClassVar[str] = "adapted"
    merges: ClassVar[bool] = True

    rank: PositiveInt = 16
    """Ranks per layer that are left in the end, on average."""
    first_rank: PositiveInt | None = None
    """R0, the rank of every layer at first; null is one and a half times `rank`."""
    alpha: PositiveFloat = 16.0
    """Numerator of the update's scale alpha / R0."""
    dropout: Dropout = 0.0
    """Probability of dropping an adapter input in training."""
    targets: tuple[str, ...] = LINEARS
    """Linear layers that get an adapter."""
    begin: Fraction = 0.1
    """Where the budget begins to fall, as a share of all steps."""
    end: Fraction = 0.5
    """Where it is met."""
    interval: PositiveInt = 10
    """Steps from one choice of ranks to the next; the last one is at `end`."""
    beta1: Beta = 0.85
    """Weight of the past in the sensitivity."""
    beta2: Beta = 0.85
    """Weight of the past in its uncertainty."""
    orthogonality: NonNegativeFloat = 0.1
    """gamma: what the distance of P and Q from orthonormal ones weighs."""

    def __post_init__(self) -> None:
        check_targets(self.targets)
        if self.highest < self.rank:
            raise UserError(
                f"method.first_rank={self.first_rank} is less than method.rank={self.rank}.",
                "Ranks are only ever taken away: raise method.first_rank, or leave it null.",
            )
        if self.begin > self.end:
            raise UserError(
                f"method.begin={self.begin} lies behind method.end={self.end}.",
                "Let the budget begin to fall before it is met.",
            )

    @property
    def highest(self) -> int:
        """R0."""
        return self.first_rank or -(-3 * self.rank // 2)

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method with the model's own targets; refuse too high a first rank."""
        targets = targets_in(shape, self.targets)
        check_rank_fits(shape, self.highest, targets, "first_rank")
        return replace(self, targets=targets)

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Freeze the base and put adapters of rank R0 around the targets; lambda is zero."""

        def adapt(name: str, linear: torch.nn.Module) -> svd.SVDLinear:
            scale = self.alpha / self.highest
            return svd.SVDLinear(linear, self.highest, scale, self.dropout, ctx.seed, name)

        model_kinds.freeze(model)
        surgery.replace_linears(model, adapt, self.targets)
        return model

    # -- training ------------------------------------------------------------------------------

    def schedule(self, layers: int, total: int) -> rank_budget.BudgetSchedule:
        """Return the budgets of a run of `total` steps."""
        end = max(1, round(self.end * total))
        begin = min(round(self.begin * total), end - 1)
        return rank_budget.BudgetSchedule(
            self.highest * layers, self.rank * layers, begin, end, self.interval
        )

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the loss of one micro-batch, with the gradient of its share of the distance."""
        loss = super().loss(model, batch, ctx)
        if not self.orthogonality:
            return loss
        share = self.orthogonality * batch.weighted_tokens / batch.window_tokens
        distance = share * svd.orthogonality(svd.svd_layers(model).values())
        return loss + (distance - distance.detach())

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what weighs the ranks and prunes them."""
        layers = svd.svd_layers(model)
        schedule = self.schedule(len(layers), ctx.total_steps)
        return rank_budget.RankPruning(layers, ctx, schedule, self.beta1, self.beta2)

    # -- what is left --------------------------------------------------------------------------

    def finalize(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Return the model with plain adapters of the ranks that stay."""
        return svd.fold(model, ctx.evolution.chosen())

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the plain adapters and their ranks."""
        super().save(model, folder)
        svd.write_ranks(model, self.targets, folder)

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` with the plain adapters of an artefact."""
        model_kinds.freeze(model)
        svd.follow_ranks(model, self.alpha / self.highest, folder)
        weights.load_tensors(self.artefact_tensors(model), folder / "weights.safetensors")
        return model

    def as_peft(self, model: torch.nn.Module, point: Point) -> peft_lora.PeftAdapter | None:
        """Return a plain adapter with ranks by layer, all at one scale."""
        factors = {n: (x.lora_A, x.lora_B) for n, x in lowrank.low_rank_layers(model)}
        alpha = self.alpha / self.highest * max(len(a) for a, _ in factors.values())
        return peft_lora.PeftAdapter(factors, alpha, tuple(factors))

    # -- accounting ----------------------------------------------------------------------------

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Put adapters beside the targets: of R0 while it trains, then of the ranks that stay."""
        if phase == "use":
            return ranked(base, self.targets, self.rank, folder)
        return weighed(base, self.targets, self.highest, orthogonal=bool(self.orthogonality))
