"""Exit heads: early exits that each have a norm and a head of their own.

Kaya et al., Shallow-Deep Networks: Understanding and Mitigating Network Overthinking, ICML 2019,
arXiv 1810.07052, who train classifiers inside a network that is there already, or both together.
Kavehzadeh et al. (Sorted LLaMA, arXiv 2309.08968) compare sorted models, whose depths share one
head, with a fine-tuned model that has such exits; it is here for the same comparison.

    f_n(x) = W_n norm_n(h_n) for n of D below L,    f_L(x) = W_out norm(h_L)

    frozen:   loss = mean over n < L of CE(f_n(x), y)      W_n and norm_n alone learn
    trained:  loss = mean over all n of CE(f_n(x), y)      every weight learns, in float32

A frozen trunk is not changed, so what fine-tuned it stays as good as it was; train it first and go
on from that run. Our choices: every exit starts from the model's own norm and head, D is that of
Sorted-LoRA, and the exits learn in float32 and are kept in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from effbench.api import submodels
from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper, Weights
from effbench.api.points import UNNAMED, Point
from effbench.api.schema import PositiveInt
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.api.weights import COMPUTE, FLOAT32, MASTERS
from effbench.methods.base import Method
from effbench.methods.depth.points import Depth
from effbench.methods.depth.reading import READING, ReadsDepths
from effbench.methods.trains import Trains
from effbench.nn.depth import exit_heads, submodel
from effbench.nn.llama import stack
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class ExitHeads(Trains, ReadsDepths):
    """A norm and a head for each exit, on a frozen trunk or trained with it."""

    paper: ClassVar[Paper | None] = Paper(
        "Shallow-Deep Networks: Understanding and Mitigating Network Overthinking",
        "ICML 2019",
        "1810.07052",
    )
    learning_rate: ClassVar[float] = 2e-4
    weighted_version: ClassVar[int] = 2
    """2: all terms of the loss have the weights of their rows."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "packed", "adapted"})
    produces: ClassVar[str] = "adapted"
    identity: ClassVar[dict[str, Any] | None] = {"depths": [2, 4], "eval_depths": [4]}
    eval_settings: ClassVar[frozenset[str]] = READING
    shallowest: ClassVar[float] = 0.6

    depths: tuple[PositiveInt, ...] = ()
    """Depths D of the exits; empty derives them from the number of layers. The last layer has the
    model's own head, listed or not."""
    trunk: Literal["frozen", "trained"] = "frozen"
    """Whether the model itself learns too."""

    @property
    def weights(self) -> Weights:
        """The base is held as float32 masters where it learns."""
        return "float32" if self.trunk == "trained" else "compute"

    # -- depths --------------------------------------------------------------------------------

    def with_depths(self, num_layers: int) -> Self:
        """Return the method with the depths that are not given."""
        return replace(self, depths=self.depths or submodels.depth_set(num_layers, self.shallowest))

    def listed(self) -> tuple[int, ...]:
        """Return the depths to evaluate, once resolved: the exits' unless some are given."""
        return self.eval_depths or self.depths

    def headed(self, num_layers: int) -> tuple[int, ...]:
        """Return the depths that have a norm and a head of their own."""
        return tuple(n for n in self.depths if n < num_layers)

    def full_point(self, shape: AnyShape) -> Point:
        """Return the unnamed point: all layers, with the exits beside them in memory."""
        return UNNAMED

    def depth_of(self, point: Point, num_layers: int) -> int:
        """Return the depth whose layers a point needs.

        Raises:
            ValueError: When there is no exit at it.
        """
        depth = super().depth_of(point, num_layers)
        if depth < num_layers and depth not in self.depths:
            raise ValueError(f"There is no exit at depth {depth}.")
        return depth

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method with the depths of a model of `shape`.

        Raises:
            UserError: For depths that the model does not have, and exits that nobody trained.
        """
        method = super().resolve(shape)
        submodels.check_depths("depths", method.depths, shape.num_layers)
        if not method.headed(shape.num_layers):
            raise UserError(
                f"method.depths={list(method.depths)} has no exit below layer {shape.num_layers}.",
                "List a shallower depth.",
            )
        draft = () if self.draft_depth is None else (self.draft_depth,)
        for key, used in (("eval_depths", method.eval_depths), ("draft_depth", draft)):
            for n in {*used} - {*method.depths, shape.num_layers}:
                raise UserError(
                    f"method.{key} names depth {n}, which has no head.",
                    f"Choose from {list(method.depths)}.",
                )
        return method

    def check_start(self, earlier: Sequence[Method]) -> None:
        """Refuse a trunk whose logits are not simply those of its layers, or that cannot learn."""
        super().check_start(earlier)
        self.check_plain(earlier)
        kind = earlier[-1].produces if earlier else "dense"
        if self.trunk == "trained" and kind != "dense":
            raise UserError(
                f"method.trunk=trained needs dense linear layers, not {kind} ones.",
                "Set method.trunk=frozen.",
            )

    # -- structure -----------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Add the exits, in float32, and freeze the rest unless it is to learn too."""
        stack.require_layers_alike(model)
        model.requires_grad_(self.trunk == "trained")
        exit_heads.attach_heads(model, self.headed(len(stack.decoder_layers(model))))
        return model

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the mean loss of the exits, a scalar; of the last one too if the trunk learns."""
        count = len(stack.decoder_layers(model))
        trained = self.trunk == "trained"
        depths = (*self.headed(count), *([count] if trained else []))
        with torch.set_grad_enabled(trained):
            states = submodel.exit_states(model, depths, batch.input_ids, batch.attention_mask)
        total = submodel.summed_nll(model, states.items(), batch.labels, batch.token_weights)
        return total / (len(depths) * batch.window_tokens)

    def finalize(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Return the model with its exits in the compute dtype, unless all of it is in float32."""
        return model if self.trunk == "trained" else exit_heads.cast_heads(model, ctx.dtype)

    # -- use -----------------------------------------------------------------------------------

    def validation_point(self, shape: AnyShape) -> Point:
        """Return the deepest exit that learns: on a frozen trunk the last layer's never changes."""
        if self.trunk == "trained":
            return Depth(shape.num_layers)
        return Depth(self.with_depths(shape.num_layers).headed(shape.num_layers)[-1])

    @contextmanager
    def at(self, model: torch.nn.Module, point: Point) -> Iterator[None]:
        """Be the sub-model of an exit inside the context, or decode in the way of the point."""
        depth = self.depth_of(point, len(stack.decoder_layers(model)))
        mine = isinstance(point, Depth)
        own = exit_heads.with_own_head(model, depth) if mine else nullcontext()
        with super().at(model, point), own:
            yield

    # -- artefact ------------------------------------------------------------------------------

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` with the exits of `folder`, in the compute dtype."""
        return exit_heads.cast_heads(super().load(model, folder, ctx), ctx.dtype)

    # -- accounting ----------------------------------------------------------------------------

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Keep an exit's layers under its own norm and head, or all layers beside all exits.

        On a frozen trunk a step runs the layers up to the deepest exit, whose norms and heads are
        in float32.
        """
        method, count = self.with_depths(base.num_layers), base.num_layers
        learns, heads = self.trunk == "trained", method.headed(count)
        held = MASTERS if learns else FLOAT32 if phase == "train" else COMPUTE
        model, own = base.trained() if learns else base, submodels.own_readout(base, held)
        beside = submodels.with_exits(model, own, len(heads))
        if phase == "train":
            return submodels.training_exits(beside, heads, trunk=learns)
        if not isinstance(point, Depth):
            return method.read_out(beside, point)
        cut = method.read_out(model, point)
        return cut if cut.num_layers == count else replace(cut, readout=own)
