"""APT: blocks of the model are pruned and ranks of its adapters grow while it is fine-tuned.

Zhao, Hajishirzi and Cao, APT: Adaptive Pruning and Tuning Pretrained Language Models for Efficient
Training and Inference, ICML 2024, arXiv 2401.12200.

    H = m_o * [(W + s B A)(m_i * X)]      W [d_o, d_i] frozen, A [r, d_i], B [d_o, r], s constant

The masks m belong to blocks: key/value groups with their query heads, MLP neurons, dimensions of
the residual stream. Each step: forward, backward, salience (`nn.pruning.salience`); on a pruning
step, the blocks that stay are those of most salience per weight within the budget gamma_t
(`nn.pruning.blocks`); masks move by `mask_step`; on a growth step, the more important half of the
adapters gets higher ranks (`nn.adapters.growth`); then the optimiser. Once all masks are 0 or 1 the
model is sliced (`nn.pruning.slicing`), and training goes on at the smaller size. The artefact is a
dense model, adapters merged.

    gamma_t = keep + (1 - keep) (1 - t)^3      t from 0 to 1 within the pruning window

From the paper and its code: s = 2, r = 8 at first, beta = 0.85, mask_step = 0.01, growth to 4 times
the parameters and at most 64 ranks. Our choices: whole groups instead of heads; A starts as in our
other methods (uniform, not Gaussian) so that all start alike; where the window lies; slicing before
the end of training; the moments of Adam may be kept where a parameter changes its shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Interval

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.method_types import Context, Paper
from effbench.api.points import Point
from effbench.api.rank_budgets import growing
from effbench.api.schema import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.methods.adapters.targets import check_rank_fits, check_targets, targets_in
from effbench.methods.pruning.slices import Slices
from effbench.methods.trains import Trains
from effbench.nn.adapters import growth
from effbench.nn.llama import attention, surgery
from effbench.nn.losses import self_distill, token
from effbench.nn.pruning import prune_and_grow, pruner
from effbench.nn.pruning.schedule import PruningSchedule, check_window
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class APT(Slices, Trains):
    """Pruning and growing adapters in one fine-tuning run."""

    paper: ClassVar[Paper | None] = Paper(
        "APT: Adaptive Pruning and Tuning Pretrained Language Models for Efficient Training and "
        "Inference",
        "ICML 2024",
        "2401.12200",
    )
    learning_rate: ClassVar[float] = 1e-3
    version: ClassVar[int] = 2
    """2: running averages are corrected for their start at zero; `normalise` scales the outlier
    term alone."""
    weighted_version: ClassVar[int] = 2
    """2: all terms of the loss have the weights of their rows."""
    float16_version: ClassVar[int] = 2
    """2: importance is that of gradients without the loss scaler's factor, and of no overflow."""

    begin: Fraction = 0.0
    """Where the pruning window begins, as a share of all steps."""
    end: Fraction = 0.5
    """Where it ends; equal to `begin` for a single pruning."""
    prunings: PositiveInt = 10
    """Pruning steps in the window."""
    mask_step: Annotated[float, Interval(gt=0, le=1)] = 0.01
    """How far a mask moves in a step; 1 prunes at once."""
    warm_steps: NonNegativeInt = 0
    """First steps that only look at the data: salience is collected, nothing is learnt."""
    salience: Literal["ema", "sum"] = "ema"
    """Running average over steps, or plain sums (the paper's pruning before tuning)."""
    criterion: Literal["salience", "random"] = "salience"
    """What blocks are ranked by; random numbers are the baseline."""
    beta: Annotated[float, Interval(ge=0, lt=1)] = 0.85
    """Weight of the past in running averages."""
    kurtosis: bool = True
    """Whether outliers protect a block."""
    normalise: bool = False
    """Bring the outlier term to the mean of the rest in each kind of block: units differ."""
    rank: PositiveInt = 8
    """Rank of each adapter at first."""
    scale: PositiveFloat = 2.0
    """s, the same at every rank."""
    targets: tuple[str, ...] = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter."""
    grow: Annotated[float, Ge(1)] = 4.0
    """How many times its first size the adapter may reach in all; 1 does not grow."""
    growths: PositiveInt = 10
    """Growth steps, from the first pruning to the end of the window or the middle of training."""
    max_rank: PositiveInt = 64
    """Highest rank."""
    moments: Literal["reset", "keep"] = "reset"
    """What becomes of Adam's moments when a parameter changes its shape."""
    distill: bool = False
    """Learn from the unpruned model with an earlier copy of the adapters; the paper does so for
    encoders and T5 only. The model is then sliced at the end."""
    distill_logits: NonNegativeFloat = 1.0
    """Weight of the teacher's logits in the distillation loss."""
    distill_layers: NonNegativeFloat = 0.9
    """Weight of the teacher's layers in it."""

    def __post_init__(self) -> None:
        check_targets(self.targets)
        check_window(self.begin, self.end)
        if self.rank > self.max_rank:
            raise UserError(
                f"method.rank={self.rank} is more than method.max_rank={self.max_rank}.",
                "Raise method.max_rank.",
            )

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse ranks above full and budgets that the prunable blocks cannot meet."""
        check_rank_fits(shape, self.rank, targets_in(shape, self.targets))
        return super().resolve(shape)

    # -- structure -----------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Freeze the base; add adapters, masks, and what collects salience."""
        attention.require_llama(model)
        model.requires_grad_(False)
        names = (name for name, _ in surgery.decoder_linears(model, self.targets))
        growth.adapt(model, names, self.rank, self.scale, ctx.seed)
        pruner.Pruning.put_in(model, self.beta, self.salience)
        if self.distill:
            self_distill.add_transfer(model, self.rank, self.scale, ctx.seed)
        return model

    # -- training ------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the loss of one micro-batch, watched while there is salience to collect."""
        pruning = pruner.Pruning.of(model)
        if pruning is None:
            return super().loss(model, batch, ctx)
        if not self.distill:
            with pruning.watcher.watching(batch.attention_mask):
                loss = super().loss(model, batch, ctx)
        else:
            loss = self._distilled(model, pruning, batch, ctx)
        if loss.requires_grad:
            pruning.watcher.watch_loss(loss)
        return loss

    def _distilled(
        self, model: torch.nn.Module, pruning: pruner.Pruning, batch: Batch, ctx: Context
    ) -> torch.Tensor:
        """Return mu L_distill + (1 - mu) L_ft, mu from 0 to 1 over the pruning window."""
        with pruning.watcher.watching(batch.attention_mask), self_distill.captured(model) as layers:
            logits = self.logits(model, batch)
        hard = batch.weighed(token.token_nll(logits, batch.labels)).sum() / batch.window_tokens
        mu = self.schedule(ctx.total_steps).share(ctx.step)
        if not mu:
            return hard
        teacher = self_distill.SelfTeacher(
            model, pruning.masks, ctx.evolution.teacher, ctx.generator
        )
        weights = self.distill_logits, self.distill_layers
        learnt = teacher.loss(lambda: self.logits(model, batch), batch, logits, layers, weights)
        return mu * learnt + (1 - mu) * hard

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what prunes, grows and slices; see the module's text for the order."""
        schedule = self.schedule(ctx.total_steps)
        ranked_by = self.criterion, self.kurtosis, self.normalise
        search = pruner.BlockSearch(self.keep, self.blocks, self.align, *ranked_by, ctx.seed)
        steps = schedule.growth_steps(self.grow) if self.grow > 1 else {}
        grown = growth.Growth(model, steps, self.max_rank, self.beta, ctx.generator)
        return prune_and_grow.PruneAndGrow(
            model, ctx, schedule, search, grown, self.mask_step, self.moments, self.distill
        )

    def schedule(self, total: int) -> PruningSchedule:
        """Return when a run of `total` steps prunes and grows."""
        return PruningSchedule(
            total, self.begin, self.end, self.prunings, self.growths, self.warm_steps
        )

    # -- what is left --------------------------------------------------------------------------

    def finalize(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Return the sliced model with its adapters merged, dense and frozen."""
        merged: torch.nn.Module = ctx.evolution.merged()
        return merged

    def trained_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return what trains, and the masks and salience while there are any."""
        pruning = pruner.Pruning.of(model)
        return super().trained_tensors(model) | (pruning.tensors() if pruning else {})

    def facts(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return what was kept, and the ranks that the adapters had."""
        facts: dict[str, Any] = vars(model)["pruned"]
        return facts

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` cut to the artefact's sizes, with its weights, frozen."""
        return super().load(model, folder, ctx).requires_grad_(False)

    # -- accounting ----------------------------------------------------------------------------

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Adapt the whole base while it trains, then cut it to the artefact's sizes.

        Which blocks go is known only after training. The planned shape has the share `keep` of the
        linear weights and all dimensions, so embeddings and norms take at most what it says.
        Salience needs gradients down to the embedding. Adapters take memory as grown as they may
        be; activations and FLOPs are those of the first ranks, the teacher of `distill` left out.
        """
        if phase == "use":
            return super().shape(base, point, phase, folder)
        adapted = growing(base, self.targets, self.rank, self.max_rank, self.grow)
        return replace(adapted, through=True)
