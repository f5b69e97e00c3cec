"""Deep LoRA: an update of three factors, whose training stays in a small subspace by itself.

Yaras et al., Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation, ICML
2024, arXiv 2406.04112.

    y = W x + W3 W2 W1 x        W1 [k, d_in], W2 [k, k], W3 [d_out, k]

Every factor starts as eps times a matrix with orthonormal rows or columns, none of them at zero, so
the update starts with singular values eps^3. There is no scale alpha / r. Three forms:

- `narrow`: k = r.
- `full`: k = min(d_in, d_out).
- `compressed`: the full form's trajectory in r directions, left (W3 W2 W1) right^T with inner
  factors [r, r] that start at eps I, and frames left [d_out, r] and right [d_in, r] that are chosen
  from the first gradient and train at `frame_rate` times the learning rate.

Our choices: the subspace comes from a truncated decomposition of the frozen weight's gradient
(the same subspace as the paper's null-space construction, without a d x d decomposition); where
d_in and d_out differ each frame gets its own directions, and the factor of the longer side starts
as what the full form is between them; all seven linears of a block; clipping and schedule as for
the other methods here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.method_types import Context, Paper
from effbench.api.parts import Adapter, Linear, deep_update
from effbench.api.points import Point
from effbench.api.schema import NonNegativeFloat, PositiveFloat, PositiveInt
from effbench.api.shape import LINEARS, Anatomy, AnyShape, ModelShape, Phase
from effbench.methods.adapters.targets import check_rank_fits, check_targets, targets_in
from effbench.methods.trains import Trains
from effbench.nn.adapters import deep, peft_lora
from effbench.nn.llama import surgery
from effbench.nn.model_kinds import base as model_kinds
from effbench.util.errors import UserError
from effbench.util.lazy import torch

Depth = Annotated[int, Ge(2)]


@dataclass(frozen=True)
class DeepLoRA(Trains):
    """Adaptation by a deep linear update."""

    paper: ClassVar[Paper | None] = Paper(
        "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation",
        "ICML 2024",
        "2406.04112",
    )
    anatomy: ClassVar[Anatomy] = "other"
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "classifier", "seq2seq"})
    learning_rate: ClassVar[float] = 1e-2
    version: ClassVar[int] = 3
    """2: the frames come from all rows of the first step, and not from its first micro-batch. 3: a
    classifier's head trains too."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "packed"})
    produces: ClassVar[str] = "adapted"
    merges: ClassVar[bool] = True
    identity: ClassVar[dict[str, Any] | None] = {"init_scale": 1e-30}

    form: Literal["narrow", "full", "compressed"] = "compressed"
    """Which of the three forms; the paper's tables are `full`, its scripts `narrow`."""
    rank: PositiveInt = 8
    """Inner width r; `compressed` wants an even one, twice the rank that the update is to have."""
    depth: Depth = 3
    """Factors; 2 is LoRA's product with another start."""
    init_scale: PositiveFloat = 1e-3
    """eps: the singular values of every factor at the start."""
    frame_rate: NonNegativeFloat = 1e-2
    """Learning rate of the frames over that of the inner factors; 0 leaves them as they start."""
    subspace: Literal["gradient", "random"] = "gradient"
    """Where the frames start: from the first gradient, or anywhere (to tell the two apart)."""
    targets: tuple[str, ...] = LINEARS
    """Linear layers that get an update."""

    def __post_init__(self) -> None:
        check_targets(self.targets)
        if self.form == "compressed" and self.rank % 2:
            raise UserError(
                f"method.rank={self.rank} is odd, but form=compressed takes half of its directions "
                "from each side of the gradient.",
                f"Set method.rank={self.rank + 1}, or method.form=narrow.",
            )

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method with the model's own targets; refuse a rank that is more than full."""
        if self.form != "full":
            targets = targets_in(shape, self.targets)
        check_rank_fits(shape, self.rank, targets)
        return replace(self, targets=targets)

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Freeze the base and put a deep update beside each target."""

        def adapt(name: str, linear: torch.nn.Module) -> deep.DeepLinear:
            return deep.DeepLinear(
                linear, self.form, self.rank, self.depth, self.init_scale, ctx.seed, name
            )

        model_kinds.freeze(model)
        surgery.replace_linears(model, adapt, self.targets)
        for _, layer in deep.deep_layers(model):
            layer.factors.requires_grad_(True)
            if self.form == "compressed":
                layer.left.requires_grad_(self.frame_rate > 0)
                layer.right.requires_grad_(self.frame_rate > 0)
        return model

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what chooses the frames of the compressed form from the first gradient."""
        if self.form != "compressed" or self.subspace == "random":
            return Evolution()
        return _Frames(self, model, ctx)

    def param_groups(self, model: torch.nn.Module) -> list[tuple[list[torch.nn.Parameter], float]]:
        """Train the frames at `frame_rate` times the learning rate."""
        layers = [layer for _, layer in deep.deep_layers(model)]
        found = [([p for layer in layers for p in layer.factors], 1.0)]
        if self.form == "compressed" and self.frame_rate:
            frames = [p for layer in layers for p in (layer.left, layer.right)]
            found.append((frames, self.frame_rate))
        return found

    def trained_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return what trains, and the frames, frozen ones too."""
        found = super().trained_tensors(model)
        for name, layer in deep.deep_layers(model):
            for part, tensor in layer.named_parameters():
                if not part.startswith("base."):
                    found[f"{name}.{part}"] = tensor.detach()
        return found

    def as_peft(self, model: torch.nn.Module, point: Point) -> peft_lora.PeftAdapter | None:
        """Return the update as a plain adapter: of rank r, or, for the full form, of its
        singular values above a thousandth of the largest.
        """
        layers = dict(deep.deep_layers(model))
        most = max(min(x.in_features, x.out_features) for x in layers.values())
        most, tolerance = (most, 1e-3) if self.form == "full" else (self.rank, 0.0)
        pairs = deep.low_rank_pair([x.delta() for x in layers.values()], most, tolerance)
        rank = pairs[0][0].shape[0]
        return peft_lora.PeftAdapter(dict(zip(layers, pairs, strict=True)), rank, self.targets)

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Put an update of several factors beside each target; the inner ones are multiplied out
        once while it trains.
        """
        once = phase == "train"

        def update(_: int, linear: Linear) -> Adapter:
            return deep_update(
                self.form, linear.d_in, linear.d_out, self.rank, self.depth, once, self.frame_rate
            )

        return base.adapted(update, self.targets)


class _Frames(Evolution):
    """Chooses the frames of every update from the gradient of the first step's rows."""

    def __init__(self, method: DeepLoRA, model: torch.nn.Module, ctx: Context) -> None:
        self.method, self.model, self.ctx = method, model, ctx

    def begin(self, window: Sequence[Batch]) -> None:
        found: dict[deep.DeepLinear, deep.Frames] = {}

        def look(layer: deep.DeepLinear, gradient: torch.Tensor) -> None:
            found[layer] = layer.directions(gradient, self.ctx.generator)

        layers = [layer for _, layer in deep.deep_layers(self.model)][::-1]
        deep.window_gradients(layers, [partial(self._pass, batch) for batch in window], look)
        for layer, directions in found.items():
            layer.set_subspace(directions)
        self.model.zero_grad(set_to_none=True)

    def _pass(self, batch: Batch) -> None:
        with self.ctx.autocast():
            loss = self.method.loss(self.model, batch, self.ctx)
        loss.backward()
