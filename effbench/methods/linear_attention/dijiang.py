"""DiJiang: linear attention out of a trained model by features in the frequency domain.

Chen et al., DiJiang: Efficient Large Language Models through Compact Kernelization, ICML 2024,
arXiv 2403.19928. Layers are converted and the model is then trained further:

    phi(x) = softmax(x P)      x [d] a turned query or key; P = C diag(w) [d, d] fixed for a layer:
                               C the DCT, w normal quantiles of uniform draws
    S <- gamma S + phi(k)^T v,   y = phi(q) S        S [kv heads, d, d], gamma for each of them
    out = W_o (norm(y) * silu(W_g x))                W_g [H d, d_model] new

That is the released code; the paper has phi(x) = D exp(x P) with a learned D (`features=exp`). The
other features, projections and decays are there to compare with (`nn.linear_attention`). Our
choices: one decay for each key/value head, so that its query heads read one state; tables of decays
kept relative to it; float32 features, state and norm; which layers `count` takes; that only
converted layers may train.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from effbench.api.method_types import Context, Paper, Weights
from effbench.api.parts import LayerShape
from effbench.api.points import Point
from effbench.api.recurrent import linear_attention
from effbench.api.schema import NonNegativeInt, PositiveFloat, PositiveInt
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.methods.trains import Trains
from effbench.nn.linear_attention import attention
from effbench.nn.llama import stack
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class DiJiang(Trains):
    """Conversion of some layers or all to linear attention, and training."""

    paper: ClassVar[Paper | None] = Paper(
        "DiJiang: Efficient Large Language Models through Compact Kernelization",
        "ICML 2024",
        "2403.19928",
    )
    learning_rate: ClassVar[float] = 3e-4
    identity: ClassVar[dict[str, Any] | None] = {"layers": []}

    layers: tuple[NonNegativeInt, ...] | None = None
    """The layers that are converted, counted from 0; null takes `count` of them."""
    count: PositiveInt | None = None
    """How many are converted where they are not listed, evenly spaced; null is all."""
    features: Literal["softmax", "exp", "prf", "elu"] = "softmax"
    """phi: DiJiang's by its code or its paper, Performer's random features, or elu(x) + 1."""
    projection: Literal["dct", "orthogonal"] = "dct"
    """C of `softmax` and `exp`: the cosine transform, or a random orthogonal matrix."""
    weighted: bool = True
    """Whether the columns of C are scaled by normal quantiles; false is w = 1."""
    decay: Literal["fixed", "learned", "table"] = "fixed"
    """gamma fixed, learned, or with learned factors for each position of queries and keys."""
    gate: bool = True
    """Whether the normed output is multiplied by silu(W_g x)."""
    author_groups: bool = False
    """Whether the norm has d groups of H features, as the code has it, not one group a head."""
    eps: PositiveFloat = 1e-5
    """Of that norm."""
    trains: Literal["full", "converted"] = "full"
    """Every weight, or those of the converted layers alone."""

    @property
    def weights(self) -> Weights:
        """The base is held as float32 masters."""
        return "float32"

    # -- the converted layers ------------------------------------------------------------------

    def chosen(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of a model of so many that are converted, ascending."""
        if self.layers is not None:
            return tuple(sorted(self.layers))
        count = num_layers if self.count is None else self.count
        return tuple((2 * i + 1) * num_layers // (2 * count) for i in range(count))

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse layers that cannot be converted, and settings that would change nothing."""
        self._require_layers(shape)
        if self.features in ("prf", "elu") and (self.projection != "dct" or not self.weighted):
            raise UserError(
                f"method.features={self.features} has no C and w.",
                "Leave method.projection and method.weighted out.",
            )
        if self.trains == "converted" and self.layers == ():
            raise UserError(
                "method.trains=converted trains nothing where no layer is converted.",
                "List layers in method.layers, or set method.trains=full.",
            )
        return self

    def _require_layers(self, shape: AnyShape) -> None:
        total, listed = shape.num_layers, self.layers or ()
        if shape.shares:
            raise UserError(
                "Some layers of this model take states from others, which have to be keys.",
                "Choose a model whose layers do not share.",
            )
        if self.layers is not None and self.count is not None:
            raise UserError("method.layers and method.count are both there.", "Give one of them.")
        if (self.count or 0) > total:
            raise UserError(f"There are {total} layers, not {self.count}.", "Lower method.count.")
        if len(set(listed)) < len(listed) or any(layer >= total for layer in listed):
            raise UserError(
                f"method.layers={list(listed)} are not different layers of {total}.",
                f"Choose from 0 to {total - 1}, each once.",
            )
        if bare := [i for i in self.chosen(total) if shape.layers[i].mixer is None]:
            raise UserError(
                f"Layer {bare[0]} of this model has no attention left to convert.",
                "List others in method.layers.",
            )

    # -- structure -----------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Convert the chosen layers and mark what trains."""
        blocks = stack.decoder_layers(model)
        chosen = self.chosen(len(blocks))
        attention.convert(model, chosen, self._design(), ctx.seed)
        model.requires_grad_(self.trains == "full")
        for index in chosen:
            blocks[index].requires_grad_(True)
        return model

    def _design(self) -> attention.Design:
        return attention.Design(
            features=self.features,
            projection=self.projection,
            weighted=self.weighted,
            decay=self.decay,
            gate=self.gate,
            author_groups=self.author_groups,
            eps=self.eps,
        )

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return what trains, and the directions that were drawn."""
        return {**super().artefact_tensors(model), **attention.directions_of(model)}

    # -- accounting ----------------------------------------------------------------------------

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Put states in the place of caches; what knows Llama's blocks alone cannot follow."""
        chosen = self.chosen(base.num_layers)
        if not chosen:
            return base.trained()
        model = base.map(
            lambda i, x: self._converted(x, base.max_positions) if i in chosen else x
        ).trained()
        if self.trains == "converted":
            model = model.frozen().map(lambda i, x: x.training() if i in chosen else x)
        return replace(model, anatomy="other")

    def _converted(self, layer: LayerShape, positions: int) -> LayerShape:
        """Return a layer of a model of so many positions, converted."""
        assert layer.mixer is not None
        groups = layer.mixer.kv_heads
        learned = {
            "rates": groups * (self.decay == "learned"),
            "tables": 2 * groups * positions * (self.decay == "table"),
            "gain": layer.mixer.head_dim * (self.features == "exp"),
        }
        sizes = {name: size for name, size in learned.items() if size}
        return linear_attention(layer, self.features, self.gate, sizes)
