"""Sorted fine-tuning (SoFT): one training of every weight after which any listed depth is a model.

Kavehzadeh et al., Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language
Models for Dynamic Inference, Findings of EACL 2024, arXiv 2309.08968. With L layers and a set D of
depths, L among them, sub-model n has the first n layers and the shared final norm and head:

    f_n(x) = W_out norm(h_n),    h_i = layer_i(h_{i-1})          h_i [B, T, d], f_n(x) [B, T, V]

    soft:     loss = (1 / |D|) sum_n CE(f_n(x), y)               one pass over all L layers
    sampled:  loss = CE(f_n(x), y), n drawn from D uniformly     layers 1 ... n alone run

`soft` is the paper's; `sampled` is that of SortedNet (Valipour et al., arXiv 2309.00255): each
micro-batch draws its depth, so that one step over several of them mixes depths. A third objective,
`layerskip`, is another paper's and here to compare with: layers that are left out at random and a
weighted loss of two exits (Elhoushi et al., arXiv 2404.16710; see `effbench.nn.depth.layerskip`).

Decoding: a depth of its own; the first exit whose most likely token is more probable than that
exit's threshold (`exit`); or the shallowest exit drafts and the deepest one verifies, which loses
nothing (`speculative`).

Our choices: the paper's depth set for 40 layers (12, 16, ... 40) scaled to L; draws that go through
all of D in random order before one repeats (`cycle`); exact repair of the key/value cache; a layout
`skip_middle`, which leaves out middle layers instead of the last ones, as an ablation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from effbench.api import submodels
from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.method_types import Context, Paper, Weights
from effbench.api.points import Point
from effbench.api.schema import PositiveInt
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.methods.depth.points import Depth
from effbench.methods.depth.reading import READING, ReadsDepths
from effbench.methods.trains import Trains
from effbench.nn.depth import draws, layerskip, submodel
from effbench.nn.llama import stack
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class SortedFull(Trains, ReadsDepths):
    """Training of every weight for several depths at once."""

    paper: ClassVar[Paper | None] = Paper(
        "Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for "
        "Dynamic Inference",
        "Findings of EACL 2024",
        "2309.08968",
    )
    data_parallel: ClassVar[frozenset[str]] = frozenset({"none"})
    learning_rate: ClassVar[float] = 5e-5
    weighted_version: ClassVar[int] = 2
    """2: all terms of the loss have the weights of their rows."""
    identity: ClassVar[dict[str, Any] | None] = {"depths": [4]}
    eval_settings: ClassVar[frozenset[str]] = READING

    depths: tuple[PositiveInt, ...] = ()
    """Depths D that are trained, the number of layers among them; empty derives them from it. One
    depth alone trains that sub-model alone, and the number of layers alone is plain fine-tuning."""
    layout: Literal["prefix", "skip_middle"] = "prefix"
    """Which layers a depth has: the first ones, or first and last ones in equal parts."""
    objective: Literal["soft", "sampled", "layerskip"] = "soft"
    """The mean loss of all depths in each micro-batch, the loss of a drawn one, or LayerSkip's: two
    weighted exits, and layers left out at random."""
    sampling: Literal["cycle", "uniform"] = "cycle"
    """How depths are drawn: all of D in random order, again and again, or independently."""
    reweight: bool = False
    """Multiply a layer's learning rate by 1 / P(layer runs), for deep layers run less often."""

    def __post_init__(self) -> None:
        if self.layout != "prefix":
            submodels.refuse_exits(self.decoding, self.objective)
        if self.reweight and self.objective != "sampled":
            raise UserError(
                "method.reweight=true makes up for depths that are drawn less often, but "
                f"method.objective={self.objective} draws none.",
                "Set method.objective=sampled, or method.reweight=false.",
            )

    @property
    def weights(self) -> Weights:
        """The base is held as float32 masters."""
        return "float32"

    # -- depths --------------------------------------------------------------------------------

    def with_depths(self, num_layers: int) -> Self:
        """Return the method with the depths that are not given."""
        return replace(self, depths=self.depths or submodels.depth_set(num_layers, self.shallowest))

    def kept(self, depth: int, num_layers: int) -> list[int]:
        """Return the layers of the sub-model `depth`, counted from 0."""
        last = depth // 2 if self.layout == "skip_middle" and depth < num_layers else 0
        return [*range(depth - last), *range(num_layers - last, num_layers)]

    def trained_layers(self, num_layers: int) -> list[int]:
        """Return the layers that some trained depth has."""
        return self.kept(max(self.depths), num_layers)

    def submodels(self, num_layers: int) -> list[list[int]]:
        """Return the layers of each trained depth."""
        return [self.kept(depth, num_layers) for depth in self.depths]

    def listed(self) -> tuple[int, ...]:
        """Return the depths to evaluate, once resolved: the trained ones unless some are given."""
        return self.eval_depths or self.depths

    def full_depth(self, num_layers: int) -> int:
        """Return the deepest trained depth."""
        return max(self.depths)

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method with the depths of a model of `shape`.

        Raises:
            UserError: For depths that the model does not have, and exits that lead nowhere.
        """
        submodels.check_trained(self.depths, shape.num_layers)
        return super().resolve(shape)

    # -- structure -----------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Make every weight train but those of layers that no depth has."""
        stack.require_layers_alike(model)
        model.requires_grad_(True)
        submodel.freeze_all_but(model, self.trained_layers(len(stack.decoder_layers(model))))
        return model

    # -- training ------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the loss of a drawn depth, or the mean of those of all, a scalar."""
        if self.objective == "soft":
            return self._mean_loss(model, batch)
        if self.objective == "layerskip":
            return self._layerskip_loss(model, batch, ctx)
        layers = self.kept(ctx.evolution.draw(), len(stack.decoder_layers(model)))
        with stack.at_layers(model, layers):
            return super().loss(model, batch, ctx)

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what draws depths."""
        return draws.DepthDraws(self.depths, self.sampling, ctx.generator)

    def _mean_loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        count = len(stack.decoder_layers(model))
        subs = {n: self.kept(n, count) for n in self.depths}
        inputs = batch.input_ids, batch.attention_mask, batch.labels, batch.token_weights
        total = submodel.summed_nll_of(model, subs, *inputs, nested=self.layout == "prefix")
        return total / (len(self.depths) * batch.window_tokens)

    def _layerskip_loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        weights = layerskip.exit_weights(self.depths, len(stack.decoder_layers(model)), ctx.step)
        inputs = batch.input_ids, batch.attention_mask, batch.labels
        drawn = ctx.generator, batch.token_weights
        return layerskip.summed_nll(model, weights, *inputs, *drawn) / batch.window_tokens

    def update(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        window: Sequence[Batch],
        ctx: Context,
    ) -> torch.Tensor:
        """Make one optimiser step, with a learning rate for each layer when they are reweighted."""
        subs = self.submodels(len(stack.decoder_layers(model)))
        factors = draws.rarities(model, subs) if self.reweight else []
        with submodel.scaled_updates(factors):
            return super().update(model, optimizer, window, ctx)

    def validation_point(self, shape: AnyShape) -> Point:
        """Return the deepest trained depth."""
        return Depth(max(self.with_depths(shape.num_layers).depths))

    # -- artefact ------------------------------------------------------------------------------

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Train the layers of all depths, and keep those of one for use."""
        method, whole = self.with_depths(base.num_layers), self.trained_shape(base)
        kept = method.trained_layers(base.num_layers)
        whole = whole.map(lambda i, x: x if i in kept else x.still())
        return method.stepping(whole) if phase == "train" else method.read_out(whole, point)

    def trained_shape(self, base: ModelShape) -> ModelShape:
        """Return a model that trains in all its layers."""
        return base.trained()

    def stepping(self, whole: ModelShape) -> ModelShape:
        """Return how often a step runs each layer, and its exits."""
        subs = self.submodels(whole.num_layers)
        if self.objective == "layerskip":
            rates = layerskip.drop_rates(whole.num_layers)
            return submodels.with_layers_left_out(whole, subs, rates)
        if self.objective == "sampled":
            return submodels.one_of(whole, subs)
        return submodels.all_of(whole, subs, nested=self.layout == "prefix")
