"""Two adapters u and w with two heads over one frozen base, of which w stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.method_types import Context
from effbench.api.parts import Linear
from effbench.api.points import Point
from effbench.api.shape import ModelShape, Phase
from effbench.methods.preference.reward import HEAD
from effbench.methods.preference.weighing import Weighs
from effbench.nn.adapters import twin
from effbench.nn.weighting import bilevel, grouping
from effbench.util.lazy import torch

GROUP = "group"
"""Column of a pair's group."""


@dataclass(frozen=True)
class TwinAdapters(Weighs):
    """A reward model with a twin in training, where `twins` says so."""

    @property
    def twins(self) -> bool:
        """Whether there are two."""
        return False

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Put w in, and u beside it, alike at first."""
        model = super().prepare(model, ctx)
        if self.twins:
            twin.add_twin(model, self.owners(model))
        return model

    def owners(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """Return the modules whose weights w and u are, the head last."""
        factors = [part for _, a, b in self.adapters(model) for part in (a, b)]
        return [*factors, model.get_submodule(HEAD)]

    def param_groups(self, model: torch.nn.Module) -> list[tuple[list[torch.nn.Parameter], float]]:
        """Return what trains and the heads, those of u beside those of w."""
        found = super().param_groups(model)
        if not self.twins:
            return found
        (rest, share), (head, rate) = found
        other = twin.twin_of(model)[-1]
        return [([p for p in rest if p is not other], share), ([*head, other], rate)]

    def sets(self, model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
        """Return what trains, that of u and that of w apart."""
        second = twin.twin_of(model)
        places = {id(p) for p in second}
        first = [p for p in model.parameters() if p.requires_grad and id(p) not in places]
        return [second, first]

    def passed(
        self,
        model: torch.nn.Module,
        window: Sequence[Batch],
        weights: Sequence[torch.Tensor],
        share: float,
        ctx: Context,
    ) -> torch.Tensor:
        """Add `share` times the gradient of the weighted mean loss; return the losses, [rows]."""
        found = []
        for batch, weight in zip(window, weights, strict=True):
            with ctx.autocast():
                losses, _ = self.validation(model, batch)
                loss = share * (losses * weight).sum() / batch.window_examples
            ctx.backward(loss)
            found.append(losses.detach())
        return torch.cat(found)

    def finalize(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Leave w alone."""
        if self.twins:
            twin.remove_twin(model)
        return super().finalize(model, ctx)

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return w and its head."""
        found = super().artefact_tensors(model)
        return {name: t for name, t in found.items() if not name.startswith(f"{twin.TWIN}.")}

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base with w."""
        model = super().load(model, folder, ctx)
        if self.twins:
            twin.remove_twin(model)
        return model

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """While it trains count adapters and heads twice, and three passes a step."""
        model = super().shape(base, point, phase, folder)
        if phase != "train" or not self.twins:
            return model

        def twice(_: int, linear: Linear) -> Linear:
            own = linear.adapter
            adapter = own and replace(own, copies=2 * own.copies)
            return replace(linear, adapter=adapter)

        return replace(model.map_linears(twice), more=2 * model.more, passes=3)


class Weighing(Evolution):
    """p while two adapters learn.

    Args:
        mixture: p and what it has seen.
        groups: Of the training pairs.
    """

    def __init__(self, mixture: bilevel.Mixture, groups: grouping.Groups) -> None:
        self.mixture, self.groups = mixture, groups

    def importance(self, batch: Batch) -> torch.Tensor:
        """Return n lambda_g / n_g of each pair, [E]: weights under which a mean is unbiased."""
        own = self.groups.sizes.sum() * self.mixture.shares / self.groups.sizes
        of = batch.columns[GROUP]
        return own.to(of.device, torch.float32)[of]

    def metrics(self) -> dict[str, float]:
        """Return the largest and the smallest share of a group."""
        shares = self.mixture.shares
        return {"largest_share": float(shares.max()), "smallest_share": float(shares.min())}

    def state_dict(self) -> dict[str, Any]:
        """Return p, running means and the state of p's optimiser."""
        return self.mixture.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.mixture.load_state_dict(state)
