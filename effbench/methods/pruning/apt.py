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

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Interval

from effbench.api.batch import Batch
from effbench.api.cost import cost_of
from effbench.api.evolution import Evolution
from effbench.api.method_types import Context, Paper
from effbench.api.points import Point
from effbench.api.schema import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from effbench.api.shape import Anatomy, AnyShape, ModelShape, Phase
from effbench.api.sharing import require_own_states
from effbench.api.slices import planned_slice, slice_in
from effbench.methods.adapters.lora import check_rank_fits, check_targets, targets_in
from effbench.methods.base import Method
from effbench.methods.pruning.structured import check_budget
from effbench.methods.trains import Trains
from effbench.nn.adapters import growth, lowrank
from effbench.nn.llama import attention, surgery, weights
from effbench.nn.losses import self_distill, token
from effbench.nn.pruning import checkpoint, masks, pruner, slicing
from effbench.nn.pruning.schedule import PruningSchedule
from effbench.util.errors import UserError
from effbench.util.lazy import torch

STATE = ("searched", "importance", "ranks", "kept", "teacher")
"""What a checkpoint keeps of `PruneAndGrow`."""


@dataclass(frozen=True)
class APT(Trains):
    """Pruning and growing adapters in one fine-tuning run."""

    paper: ClassVar[Paper | None] = Paper(
        "APT: Adaptive Pruning and Tuning Pretrained Language Models for Efficient Training and "
        "Inference",
        "ICML 2024",
        "2401.12200",
    )
    anatomy: ClassVar[Anatomy] = "plain"
    learning_rate: ClassVar[float] = 1e-3
    version: ClassVar[int] = 2
    """2: running averages are corrected for their start at zero; `normalise` scales the outlier
    term alone."""

    keep: Annotated[float, Interval(gt=0, le=1)] = 0.7
    """Share of the decoder's linear weights that stays; 1 prunes nothing."""
    blocks: tuple[Literal["groups", "neurons", "dims"], ...] = ("groups", "neurons", "dims")
    """Kinds of blocks that may go."""
    align: PositiveInt = 1
    """Neurons of a layer, and dimensions, go this many at a time; 64 suits most hardware."""
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
        if self.begin > self.end:
            raise UserError(
                f"method.begin={self.begin} lies behind method.end={self.end}.",
                "Let the pruning window begin before it ends.",
            )
        if self.rank > self.max_rank:
            raise UserError(
                f"method.rank={self.rank} is more than method.max_rank={self.max_rank}.",
                "Raise method.max_rank.",
            )

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse ranks above full and budgets that the prunable blocks cannot meet."""
        check_rank_fits(shape, self.rank, targets_in(shape, self.targets))
        require_own_states(shape, self.name)
        check_budget(shape, self.keep, self.blocks)
        return self

    # -- structure -----------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Freeze the base; add adapters, masks, and what collects salience."""
        attention.require_llama(model)

        def adapt(name: str, linear: torch.nn.Module) -> lowrank.LowRankLinear:
            layer = lowrank.LowRankLinear(
                linear, lowrank.RankControl(self.rank), self.scale * self.rank
            )
            lowrank.init_a(layer.lora_A, ctx.seed, name)
            return layer

        model.requires_grad_(False)
        surgery.replace_linears(model, adapt, self.targets)
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
        hard = token.token_nll(logits, batch.labels).sum() / batch.window_tokens
        mu = self.schedule(ctx.total_steps).share(ctx.step)
        if not mu:
            return hard
        teacher = self_distill.SelfTeacher(
            model, pruning.masks, ctx.evolution.teacher, ctx.generator
        )
        real = batch.attention_mask.bool()
        soft, errors = teacher.losses(
            lambda: self.logits(model, batch), logits, layers, batch.labels, real
        )
        soft, share = soft / batch.window_tokens, batch.loss_tokens / batch.window_tokens
        learnt = self.distill_logits * soft + self.distill_layers * share * errors
        return mu * learnt + (1 - mu) * hard

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what prunes, grows and slices; see the module's text for the order."""
        return PruneAndGrow(self, model, ctx)

    def schedule(self, total: int) -> PruningSchedule:
        """Return when a run of `total` steps prunes and grows."""
        return PruningSchedule(
            total, self.begin, self.end, self.prunings, self.growths, self.warm_steps
        )

    # -- what is left --------------------------------------------------------------------------

    def finalize(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Return the sliced model with its adapters merged, dense and frozen."""
        kept = ctx.evolution.cut()
        if hasattr(model, "transfer"):
            del model.transfer
        ranks = {name: layer.control.max_rank for name, layer in lowrank.low_rank_layers(model)}
        vars(model)["pruned"] = {"ranks": ranks, "kept": kept}
        return growth.merge(model).requires_grad_(False)

    def trained_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return what trains, and the masks and salience while there are any."""
        pruning = pruner.Pruning.of(model)
        return super().trained_tensors(model) | (pruning.tensors() if pruning else {})

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return every weight."""
        return Method.artefact_tensors(self, model)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write all weights, the sizes they have, what was kept and the ranks it had."""
        super().save(model, folder)
        checkpoint.write_sizes(model, folder, vars(model)["pruned"])

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` cut to the artefact's sizes, with the artefact's weights."""
        vars(model)["pruned"] = checkpoint.fit_sizes(model, folder)
        weights.load_tensors(self.artefact_tensors(model), folder / "weights.safetensors")
        return model.requires_grad_(False)

    def export(self, model: torch.nn.Module, point: Point, folder: Path) -> None:
        """Write a folder that `model=folder` loads, and transformers where all layers are alike."""
        checkpoint.write_folder(model, folder)

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
            return slice_in(base, folder) or planned_slice(base, self.keep)
        adapted = base.low_rank(self.rank, self.targets)
        first, most = (
            cost_of(base.low_rank(rank, self.targets), "float32").trainable
            for rank in (self.rank, self.max_rank)
        )
        grown = min(int(first * self.grow), most) - first
        return replace(adapted, through=True, grown=grown)


class PruneAndGrow(Evolution):
    """Prunes blocks, grows adapters and slices the model where it is time.

    Args:
        method: Its settings.
        model: Prepared: with adapters, masks, and what collects salience.
        ctx: Of the run.
    """

    def __init__(self, method: APT, model: torch.nn.Module, ctx: Context) -> None:
        self.method, self.model, self.ctx = method, model, ctx
        self.first = growth.adapter_parameters(model)
        """Parameters of the adapters before they grow."""
        self.whole = pruner.weights_left(model)
        """Weights of the decoder's linears before any is pruned."""
        self.searched = 1.0
        """Share of the weights that the last choice of blocks aimed at."""
        self.importance: dict[str, float] = {}
        """Running importance of each adapter."""
        self.ranks: dict[str, int] = {}
        """Rank of each adapter that has grown."""
        self.kept: dict[str, Any] | None = None
        """What the slice kept, once the model is sliced."""
        self.teacher: dict[str, list[torch.Tensor]] | None = None
        """The adapters before pruning, where the model learns from itself."""

    @property
    def schedule(self) -> PruningSchedule:
        """When to prune and when to grow."""
        return self.method.schedule(self.ctx.total_steps)

    @property
    def pruning(self) -> pruner.Pruning | None:
        """Masks and salience, while the model is not sliced."""
        return pruner.Pruning.of(self.model)

    def after_backward(self, optimizer: torch.optim.Optimizer) -> None:
        """Prune, grow and slice where it is time."""
        method, step, pruning = self.method, self.ctx.step, self.pruning
        swap = growth.Swap(optimizer, method.moments)
        if pruning:
            pruning.watcher.finish_step()
            if method.distill and (self.teacher is None or not self.schedule.share(step)):
                self.teacher = self_distill.copy_adapters(self.model)
            if step in self.schedule.pruning_steps:
                self._aim(pruning, self.schedule.ratio(step, method.keep))
            pruning.masks.move(method.mask_step)
        if method.grow > 1:
            self._grow(swap)
        if pruning and pruning.masks.hard and self.schedule.over(step) and not method.distill:
            self.kept = pruning.cut(replace=swap).plain()
        if step < method.warm_steps:
            for parameter in self.model.parameters():
                parameter.grad = None

    def _aim(self, pruning: pruner.Pruning, ratio: float) -> None:
        """Choose the blocks that stay, `ratio` of all weights."""
        method = self.method
        if method.criterion == "random":
            draws = torch.Generator().manual_seed(self.ctx.seed)  # the same blocks each time
            salience = torch.rand(pruning.layout.size, generator=draws)
        else:
            salience = pruning.salience(method.kurtosis, method.normalise)
        pruning.aim(salience, ratio * self.whole, method.blocks, method.align)
        self.searched = ratio

    def _grow(self, swap: growth.Swap) -> None:
        growth.note_importance(self.model, self.importance, self.method.beta)
        factor = self.schedule.growth_steps(self.method.grow).get(self.ctx.step)
        if factor is not None:
            self.ranks |= growth.grow_important(
                self.model,
                self.importance,
                int(factor * self.first),
                self.method.max_rank,
                self.ctx.generator,
                swap,
            )

    def cut(self) -> dict[str, Any]:
        """Slice the model, unless it is sliced, to the budget; return what was kept."""
        pruning = self.pruning
        if pruning:
            if self.searched != self.method.keep:
                self._aim(pruning, self.method.keep)
            self.kept = pruning.cut().plain()
        assert self.kept is not None
        return self.kept

    @property
    def final(self) -> bool:
        """Whether the model is sliced, or would be but for the teacher, and no rank will grow."""
        step, grow, left = self.ctx.step, self.method.grow, masks.masks_of(self.model)
        pruned = left is None or (left.hard and self.schedule.over(step))
        growing = grow > 1 and step < max(self.schedule.growth_steps(grow))
        return pruned and not growing

    def metrics(self) -> dict[str, float]:
        """Return the share of weights that masks or the slice leave, and the adapters' size."""
        return {
            "kept": pruner.weights_left(self.model) / self.whole,
            "adapter_params": float(growth.adapter_parameters(self.model)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what was found and done so far."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back, and grow and slice the prepared model as it tells."""
        vars(self).update(state)
        pruning = self.pruning
        if pruning and self.kept is not None:
            pruning.cut(slicing.Kept.from_plain(self.kept))
        for name, layer in lowrank.low_rank_layers(self.model):
            if name in self.ranks:
                growth.set_rank(layer, self.ranks[name])
