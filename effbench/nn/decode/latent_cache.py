"""Which caches keep coordinates, as values without torch, and models that they apply to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.nn.decode import handing, latent, view
from effbench.nn.decode.latent_plan import Plan
from effbench.nn.decode.policy import CachePolicy
from effbench.nn.decode.quantised_cache import QuantisedCache
from effbench.nn.decode.scratch import states
from effbench.nn.llama import factorised, stack
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.parts import Mixer
    from effbench.nn.quant.calibration import Walk


@dataclass(frozen=True)
class LatentCache(CachePolicy):
    """Keeps coordinates; keys before their turn, which no direction outlives."""

    turns_at_places: ClassVar[bool] = True

    point: str
    """The operating point whose ranks the model's config tells."""
    codes: QuantisedCache | None = None
    """How coordinates, and what has none, are held in few bits; None where they are not."""

    def layers(self, model: Any, undo: int) -> Sequence[view.LayerCache]:
        """Return an empty entry for each layer."""
        own = model.config.latent_plan.at(self.point).by_layer()
        blocks = stack.decoder_layers(model)
        return [
            latent.LatentLayer(block.self_attn, keys, values, self._inner(undo))
            for block, (keys, values) in zip(blocks, own, strict=True)
        ]

    def _inner(self, undo: int) -> view.LayerCache:
        return self.codes.layer(undo) if self.codes else handing.KeepingLayer()

    def cycle(self) -> tuple[int, int]:
        """Return after how many tokens the cache grows evenly, and over how many at a time."""
        return self.codes.cycle() if self.codes else super().cycle()

    def scratch(self, mixer: Mixer, rows: int, tokens: int, queries: int, element: int) -> float:
        """Return the bytes of the keys of all tokens, made and turned, and of values."""
        made = 5 * states(mixer, rows, tokens, element)
        if self.codes is None:
            return made
        return made + self.codes.scratch(mixer, rows, tokens, queries, element)


@dataclass(frozen=True)
class LatentValues(LatentCache):
    """Keeps keys whole, as they are turned, and coordinates of values."""

    turns_at_places: ClassVar[bool] = False


def hold(model: Any, plan: Plan, found: Sequence[Mapping[str, torch.Tensor]] = ()) -> None:
    """Factorise a model's projections, and let its config tell the ranks to who decodes.

    Args:
        model: Of Llama's family, dense.
        plan: Ranks of all operating points.
        found: The `nn.llama.factorised.bases` of each layer; without them, factors wait for their
            weights.
    """
    model.config.latent_plan = plan
    factorised.factorise(model, plan.factors(), found)


def bases_of(block: Any, walk: Walk | None) -> dict[str, torch.Tensor]:
    """Return the directions of a block's keys and values, and their sizes.

    Args:
        block: With dense projections.
        walk: Before the block, for directions of what its rows make of the weights; None for those
            of the weights.
    """
    gram = None
    if walk:
        [group] = (g for g in walk.groups() if "self_attn.k_proj" in g)
        gram = walk.inputs(group).gram
    return factorised.bases(block.self_attn, gram)
