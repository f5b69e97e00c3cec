"""DyLoRA: one training run whose adapter can be used at every rank up to R.

Valipour et al., DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free
Low-Rank Adaptation, EACL 2023, arXiv 2210.07558.

Each optimiser step draws a rank b ~ p(b) and computes with the first b ranks alone:

    y = W x + (alpha / b) * B[:, :b] (A[:b] drop(x))      A [R, d_in], B [d_out, R], x [*, d_in]

The paper writes alpha / R with both factors multiplied by sqrt(R / b): the same product. `nested`
trains the ranks 1 … b of a step; `frozen` trains rank b alone (the paper's FROZEN mode).

Our choices: all layers, micro-batches and processes of a step have the same b; b is uniform on
1 … R; inactive ranks get zero gradients but AdamW's momentum still moves them, unless
`protect_inactive` puts them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.method_types import Context, Paper
from effbench.api.points import Point
from effbench.api.schema import PositiveFloat, PositiveInt
from effbench.api.shape import LINEARS, Anatomy, AnyShape, ModelShape, Phase
from effbench.methods.adapters.lora import Dropout, Rank, rank_of
from effbench.methods.adapters.targets import (
    check_rank_fits,
    check_ranks,
    check_targets,
    targets_in,
)
from effbench.methods.trains import Trains
from effbench.nn.adapters import lowrank, peft_lora
from effbench.nn.llama import surgery
from effbench.nn.model_kinds import base as model_kinds
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class DyLoRA(Trains):
    """Low-rank adaptation that is trained for all ranks at once."""

    paper: ClassVar[Paper | None] = Paper(
        "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free "
        "Low-Rank Adaptation",
        "EACL 2023",
        "2210.07558",
    )
    anatomy: ClassVar[Anatomy] = "other"
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "classifier", "seq2seq"})
    data_parallel: ClassVar[frozenset[str]] = frozenset({"none"})
    learning_rate: ClassVar[float] = 1e-3
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "packed"})
    produces: ClassVar[str] = "adapted"
    merges: ClassVar[bool] = True
    eval_settings: ClassVar[frozenset[str]] = frozenset({"eval_ranks"})
    in_one_pass: ClassVar[bool] = True

    rank: PositiveInt = 16
    """Highest rank R."""
    alpha: PositiveFloat = 16.0
    """Numerator of the update's scale alpha / b."""
    dropout: Dropout = 0.0
    """Probability of dropping an adapter input in training."""
    ranks: tuple[PositiveInt, ...] | Literal["powers"] = ()
    """Ranks to draw from, R among them; empty for 1 … R, `powers` for 1, 2, 4, … and R. The list
    of R alone is LoRA."""
    distribution: Literal["uniform", "inverse", "proportional"] = "uniform"
    """How likely each is: alike, in proportion to 1 / b, or in proportion to b."""
    mode: Literal["nested", "frozen"] = "nested"
    """What a step at rank b trains: the ranks 1 … b, or rank b alone."""
    protect_inactive: bool = False
    """Leave the ranks that a step does not train, and their moments, exactly as they were."""
    targets: tuple[str, ...] = LINEARS
    """Linear layers that get an adapter."""
    eval_ranks: tuple[PositiveInt, ...] = ()
    """Ranks to evaluate; empty for the listed `ranks`, or for 1, 2, 4, … and R."""

    def __post_init__(self) -> None:
        check_targets(self.targets)
        check_ranks("ranks", self.rank_set(), self.rank)
        check_ranks("eval_ranks", self.eval_ranks, self.rank)
        if self.rank not in self.rank_set():
            raise UserError(
                f"method.ranks={list(self.ranks)} does not hold method.rank={self.rank}, "
                "so the highest rank would never be trained.",
                f"Add {self.rank}, or set method.rank={max(self.rank_set())}.",
            )

    def rank_set(self) -> tuple[int, ...]:
        """Return the ranks that a step can draw, lowest first."""
        if self.ranks == "powers":
            return powers(self.rank)
        return self.ranks or tuple(range(1, self.rank + 1))

    def probabilities(self) -> torch.Tensor:
        """Return p(b) for each of `rank_set()`, float64."""
        b = torch.tensor(self.rank_set(), dtype=torch.float64)
        weight = {"uniform": b**0, "inverse": 1 / b, "proportional": b}[self.distribution]
        return weight / weight.sum()

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method with the model's own targets; refuse a rank that is more than full."""
        targets = targets_in(shape, self.targets)
        check_rank_fits(shape, self.rank, targets)
        return replace(self, targets=targets)

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Freeze the base and put adapters of rank R around the targets; B is zero."""
        control = lowrank.RankControl(self.rank, self.mode)

        def adapt(name: str, linear: torch.nn.Module) -> lowrank.LowRankLinear:
            return lowrank.adapter(linear, name, control, self.alpha, ctx.seed, self.dropout)

        model_kinds.freeze(model)
        surgery.replace_linears(model, adapt, self.targets)
        return model

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what draws each step's rank."""
        return _DrawnRank(self, model, ctx)

    def update(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        window: Sequence[Batch],
        ctx: Context,
    ) -> torch.Tensor:
        """Make one optimiser step, and undo it on inactive ranks when they are protected."""
        with lowrank.inactive_held(model, optimizer) if self.protect_inactive else nullcontext():
            return super().update(model, optimizer, window, ctx)

    def points(self) -> tuple[Point, ...]:
        """Return a point for each rank to evaluate."""
        listed = () if self.ranks == "powers" else self.ranks
        return tuple(map(Rank, self.eval_ranks or listed or powers(self.rank)))

    def at(self, model: torch.nn.Module, point: Point) -> AbstractContextManager[Any]:
        """Use the rank of `point`; any rank up to R is one, listed or not."""
        return lowrank.control_of(model).using(rank_of(point, self.rank))

    def as_peft(self, model: torch.nn.Module, point: Point) -> peft_lora.PeftAdapter | None:
        """Return the first b ranks with r = b and alpha unchanged."""
        rank = rank_of(point, self.rank)
        layers = lowrank.low_rank_layers(model)
        factors = {n: lowrank.truncate(x.lora_A, x.lora_B, rank) for n, x in layers}
        return peft_lora.PeftAdapter(factors, self.alpha, self.targets)

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Put adapters of all R ranks beside the targets; those of `point` are used."""
        used = self.rank if phase == "train" else rank_of(point, self.rank)
        return base.low_rank(self.rank, self.targets, used)


class _DrawnRank(Evolution):
    """Draws the rank of each step; processes that share a seed draw the same one."""

    def __init__(self, method: DyLoRA, model: torch.nn.Module, ctx: Context) -> None:
        self.method, self.model, self.ctx = method, model, ctx

    def before_step(self) -> None:
        probabilities = self.method.probabilities()
        drawn = torch.multinomial(probabilities, 1, generator=self.ctx.generator)
        lowrank.control_of(self.model).active = self.method.rank_set()[int(drawn)]


def powers(rank: int) -> tuple[int, ...]:
    """Return the powers of two below `rank`, and `rank`."""
    return (*(2**i for i in range((rank - 1).bit_length())), rank)
