"""Sorted-LoRA: one set of LoRA adapters with which any listed depth is a model.

H. Rajabzadeh, Efficient Learning for Large Language Models, PhD dissertation, University of
Waterloo, of which the abstract alone was at hand. It speaks of stochastic depth-aware training that
co-trains sub-models of several depths within a single cycle, on a frozen base. We read it as the
drawn depths of SortedNet (arXiv 2309.00255), the shared head of SoFT (see `sorted_full`) and LoRA:

    f_n(x) = W_out norm(h_n),  h_i = layer_i(h_{i-1}),  y = W x + (alpha / R) B A x  in every linear

Each micro-batch draws a depth n from D and runs layers 1 ... n alone; the adapters of layer i
belong to all depths from i on. Base and head are frozen, the final norm trains.

Our choices, for the dissertation's are not known: rank 16, alpha 32, all seven linears, D of every
ceil(L / 10)-th depth from 60 % of the layers on, draws in cycles through D, and the learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from effbench.api.method_types import Context, Paper, Weights
from effbench.api.points import Point
from effbench.api.schema import PositiveFloat, PositiveInt
from effbench.api.shape import LINEARS, AnyShape, ModelShape
from effbench.api.weights import FLOAT32
from effbench.methods.adapters.lora import Dropout, LoRA
from effbench.methods.depth.sorted_full import SortedFull
from effbench.nn.adapters import peft_lora
from effbench.nn.depth import submodel
from effbench.nn.llama import stack
from effbench.nn.pruning import plain
from effbench.util.lazy import torch


@dataclass(frozen=True)
class SortedLoRA(SortedFull):
    """Low-rank adaptation for several depths at once."""

    paper: ClassVar[Paper | None] = Paper(
        "SortedNet: A Scalable and Generalized Framework for Training Modular Deep Neural Networks",
        "arXiv 2023",
        "2309.00255",
    )
    data_parallel: ClassVar[frozenset[str]] = frozenset({"none"})
    learning_rate: ClassVar[float] = 5e-4
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "packed"})
    produces: ClassVar[str] = "adapted"
    merges: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("peft",)
    shallowest: ClassVar[float] = 0.6

    objective: Literal["soft", "sampled", "layerskip"] = "sampled"
    """The loss of a drawn depth, the mean loss of all depths in each micro-batch, or LayerSkip's:
    two weighted exits, and layers left out at random."""
    rank: PositiveInt = 16
    """Rank R of the update."""
    alpha: PositiveFloat = 32.0
    """Numerator of the update's scale alpha / R."""
    dropout: Dropout = 0.0
    """Probability of dropping an adapter input in training."""
    targets: tuple[str, ...] = LINEARS
    """Linear layers that get an adapter."""
    train_norm: bool = True
    """Whether the final norm, which all depths share, trains too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adapter()

    @property
    def weights(self) -> Weights:
        """The base is held in the compute dtype."""
        return "compute"

    def adapter(self) -> LoRA:
        """Return the method that puts the adapters in."""
        return LoRA(self.rank, self.alpha, self.dropout, self.targets)

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method with its depths; refuse what cannot work as adapter or as depths."""
        self.adapter().resolve(shape)
        return super().resolve(shape)

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Freeze the base, put adapters in, and make the final norm train."""
        stack.require_layers_alike(model)
        model.requires_grad_(False)
        model = self.adapter().prepare(model, ctx)
        submodel.freeze_all_but(model, self.trained_layers(len(stack.decoder_layers(model))))
        if self.train_norm:
            submodel.train_norm(model)
        return model

    def as_peft(self, model: torch.nn.Module, point: Point) -> peft_lora.PeftAdapter | None:
        """Return the adapters of a depth, for the base with `num_hidden_layers` set to it."""
        count, root = len(stack.decoder_layers(model)), cast(Any, model)
        with stack.at_layers(model, self.kept(self.depth_of(point, count), count)):
            return peft_lora.PeftAdapter(
                {name: (a.weight, b.weight) for name, a, b in peft_lora.peft_adapters(model)},
                self.alpha,
                self.targets,
                {"model.norm": root.model.norm.weight} if self.train_norm else {},
            )

    def export(self, model: torch.nn.Module, point: Point, folder: Path) -> None:
        """Write the sub-model with its adapters merged, and the adapters alone in `adapter/`."""
        plain.write(self.as_plain(model, point), folder)
        adapter = self.as_peft(model, point)
        assert adapter is not None
        (folder / "adapter").mkdir()
        peft_lora.write_adapter(adapter, folder / "adapter", peft_lora.base_of(model))

    def trained_shape(self, base: ModelShape) -> ModelShape:
        """Return the base with adapters, and with the norm in float32 if it trains."""
        adapted = base.low_rank(self.rank, self.targets)
        if not self.train_norm:
            return adapted
        norm = replace(adapted.readout.norm, format=FLOAT32, trains=True)
        return replace(adapted, readout=replace(adapted.readout, norm=norm))
