"""LoRA: a frozen base with a trained low-rank update on its linear layers.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685.

    y = W x + (alpha / R) * B A drop(x)        A [R, d_in], B [d_out, R], x [*, d_in]

The layers are peft's. Our choices: A starts from a seed and the layer's name alone, so that all
methods with adapters start alike; adapters are float32 on a base in the compute dtype; alpha 16,
no dropout and all seven linears of a block, as the tiny runs of the other methods have it.

`eval_ranks` cuts the trained adapter to lower ranks afterwards, which it was not trained for: the
baseline of the methods that are. The scale stays alpha / R, as the adapter was trained with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Interval

from effbench.api.method_types import Context, Paper
from effbench.api.points import UNNAMED, Point
from effbench.api.schema import PositiveFloat, PositiveInt
from effbench.api.shape import LINEARS, Anatomy, AnyShape, ModelShape, Phase
from effbench.methods.adapters.targets import (
    check_rank_fits,
    check_ranks,
    check_targets,
    targets_in,
)
from effbench.methods.trains import Trains
from effbench.nn.adapters import lowrank, peft_lora
from effbench.util.lazy import torch

Dropout = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class Rank(Point):
    """The first ranks of an adapter alone."""

    rank: int
    """How many."""

    @property
    def name(self) -> str:
        """`r<rank>`."""
        return f"r{self.rank}"


@dataclass(frozen=True)
class LoRA(Trains):
    """Low-rank adaptation through peft."""

    paper: ClassVar[Paper | None] = Paper(
        "LoRA: Low-Rank Adaptation of Large Language Models", "ICLR 2022", "2106.09685"
    )
    anatomy: ClassVar[Anatomy] = "other"
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "classifier", "seq2seq"})
    data_parallel: ClassVar[frozenset[str]] = frozenset({"none", "fsdp"})
    learning_rate: ClassVar[float] = 1e-3
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "packed"})
    produces: ClassVar[str] = "adapted"
    merges: ClassVar[bool] = True
    eval_settings: ClassVar[frozenset[str]] = frozenset({"eval_ranks", "truncation"})
    libraries: ClassVar[tuple[str, ...]] = ("peft",)

    rank: PositiveInt = 16
    """Rank R of the update."""
    alpha: PositiveFloat = 16.0
    """Numerator of the update's scale alpha / R."""
    dropout: Dropout = 0.0
    """Probability of dropping an adapter input in training."""
    targets: tuple[str, ...] = LINEARS
    """Linear layers that get an adapter."""
    eval_ranks: tuple[PositiveInt, ...] = ()
    """Ranks that the trained adapter is cut to for evaluation; empty takes it as it is."""
    truncation: Literal["plain", "svd"] = "plain"
    """How it is cut: the first ranks, or the best approximation of the product B A."""

    def __post_init__(self) -> None:
        check_targets(self.targets)
        check_ranks("eval_ranks", self.eval_ranks, self.rank)

    @property
    def numerator(self) -> float:
        """What over R is the update's scale."""
        return self.alpha

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method with the model's own targets; refuse a rank that is more than full."""
        targets = targets_in(shape, self.targets)
        check_rank_fits(shape, self.rank, targets)
        return replace(self, targets=targets)

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Freeze the base and put peft's LoRA layers around the targets; A is ours, B zero."""
        return peft_lora.inject(
            model, self.targets, self.rank, self.numerator, self.dropout, ctx.seed
        )

    def adapters(self, model: torch.nn.Module) -> peft_lora.Adapters:
        """Yield `(qualified name, A, B)` of every adapted layer."""
        return peft_lora.peft_adapters(model)

    def magnitudes(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return what an exported adapter holds beside its factors, by layer: nothing."""
        return {}

    def points(self) -> tuple[Point, ...]:
        """Return a point for each of `eval_ranks`, or one without a name."""
        return tuple(map(Rank, self.eval_ranks)) or (UNNAMED,)

    @contextmanager
    def at(self, model: torch.nn.Module, point: Point) -> Iterator[None]:
        """Put the cut adapter in inside the context; the same tensors are back after it."""
        rank = rank_of(point, self.rank)
        whole = [(a, b, a.weight, b.weight) for _, a, b in self.adapters(model)]
        try:
            if rank < self.rank:
                for a, b, all_a, all_b in whole:
                    a.weight, b.weight = map(torch.nn.Parameter, self.cut(all_a, all_b, rank))
            yield
        finally:
            for a, b, all_a, all_b in whole:
                a.weight, b.weight = all_a, all_b

    def cut(self, a: torch.Tensor, b: torch.Tensor, rank: int) -> lowrank.Factors:
        """Return A [R, d_in] and B [d_out, R] cut to `rank`; their scale is still alpha / R."""
        svd = self.truncation == "svd" and rank < self.rank
        return (lowrank.svd_truncate if svd else lowrank.truncate)(a, b, rank)

    def as_peft(self, model: torch.nn.Module, point: Point) -> peft_lora.PeftAdapter | None:
        """Return the adapter; its alpha keeps the trained scale when the rank is cut."""
        rank = rank_of(point, self.rank)
        return peft_lora.PeftAdapter(
            {n: self.cut(a.weight, b.weight, rank) for n, a, b in self.adapters(model)},
            self.numerator * rank / self.rank,
            self.targets,
            magnitudes=self.magnitudes(model),
        )

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Put float32 adapters beside the targets, cut to the rank of `point` for use."""
        rank = self.rank if phase == "train" else rank_of(point, self.rank)
        return base.low_rank(rank, self.targets)


def rank_of(point: Point, rank: int) -> int:
    """Return the rank that is used at a point, of the trained `rank`; all of it without a name.

    Raises:
        ValueError: For a rank that was not trained.
    """
    used = point.rank if isinstance(point, Rank) else rank
    if not 1 <= used <= rank:
        raise ValueError(f"There is no rank {used} of 1 to {rank}.")
    return used
