"""Layers that take the attention map of an earlier one: listed, or chosen by how alike they are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge

from effbench.api.examples import Example
from effbench.api.method_types import Context
from effbench.api.schema import Fraction, NonNegativeInt, PositiveInt
from effbench.api.shape import AnyShape
from effbench.api.sharing import LayerMap, listed_map, require_unshared
from effbench.methods.sharing.shares import Shares
from effbench.nn.sharing import ranking, similarity
from effbench.util.errors import UserError
from effbench.util.lazy import torch

CHOSEN = "shared"
"""Key of the chosen layers in `ctx.state`."""


@dataclass(frozen=True)
class ChoosesLayers(Shares):
    """Sharing of attention maps by some layers; which, `layers` says or a measurement."""

    layers: tuple[int, ...] | None = None
    """The shared layers, counted from 0; null chooses them by `ratio` and `choice`."""
    ratio: Fraction = 0.4
    """Share of all layers that are shared, where they are chosen."""
    keep_first: PositiveInt = 1
    """Layers at the beginning that are never chosen."""
    keep_last: NonNegativeInt = 1
    """Layers at the end that are never chosen."""
    choice: Literal["similar", "random"] = "similar"
    """Whether those most like their sources are chosen, or any (seeded)."""
    samples: PositiveInt = 16
    """Texts that similarity is measured on, from the training rows."""
    tokens: Annotated[int, Ge(2)] = 256
    """Tokens of each."""

    def candidates(self, num_layers: int) -> range:
        """Return the layers that may be chosen."""
        return range(self.keep_first, num_layers - self.keep_last)

    def count(self, num_layers: int) -> int:
        """Return how many layers are shared."""
        return ranking.count_of(self.ratio, num_layers) if self.layers is None else len(self.layers)

    def sharing(self, num_layers: int) -> LayerMap:
        """Return the map of the listed layers, or of any that are as many."""
        count = self.count(num_layers)
        chosen = self.candidates(num_layers)[:count] if self.layers is None else self.layers
        return listed_map(num_layers, chosen, "qk")

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse layers that cannot be shared, and more than there are."""
        require_unshared(shape, self.name)
        allowed = len(self.candidates(shape.num_layers))
        if self.layers is not None:
            listed_map(shape.num_layers, self.layers, "qk")
        elif (count := self.count(shape.num_layers)) > allowed:
            raise UserError(
                f"method.ratio={self.ratio} shares {count} of {shape.num_layers} layers, but only "
                f"{allowed} may be chosen.",
                "Lower method.ratio, method.keep_first or method.keep_last.",
            )
        return self

    def dataset(
        self, examples: Sequence[Example], model: torch.nn.Module, ctx: Context
    ) -> list[Example]:
        """Choose the layers, by the similarity of their attention on the training rows."""
        if self.layers is None and self.choice == "similar":
            ctx.state[CHOSEN] = self._most_similar(model, examples, ctx.device)
        return super().dataset(examples, model, ctx)

    def _most_similar(
        self, model: Any, examples: Sequence[Example], device: torch.device
    ) -> list[int]:
        texts = ranking.joined((e.ids for e in examples), self.tokens, self.samples)
        if not texts:
            raise UserError(
                f"The training rows have fewer than method.tokens={self.tokens} tokens.",
                "Lower method.tokens, or name the layers: method.layers=[...]",
            )
        matrix = similarity.mean_attention(model, [torch.tensor(t, device=device) for t in texts])
        found = ranking.ranking(matrix, self.keep_first, self.keep_last)
        return sorted(found[: self.count(len(matrix))])

    def chosen(self, num_layers: int, ctx: Context) -> list[int]:
        """Return the shared layers, ascending; measured ones are in `ctx.state`."""
        if self.layers is not None:
            return sorted(self.layers)
        if self.choice == "random":
            candidates = self.candidates(num_layers)
            return sorted(random.Random(ctx.seed).sample(candidates, self.count(num_layers)))
        return list(ctx.state[CHOSEN])
