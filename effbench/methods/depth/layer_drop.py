"""Whole decoder layers taken out: the baseline of methods that skip or share layers.

What goes is either listed or the layers with the lowest block influence, of which the model is
asked once, before any is gone:

    influence_l = 1 - E[cos(x_l, x_{l+1})]     x_l: what layer l reads, [d], over all tokens

Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024,
arXiv 2403.03853. Other choices are here to compare with: the last layers (Gromov et al., The
Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887, choose a run of layers by an
angle, which is mostly a deep one), evenly spaced ones, random ones. No layer is trained; go on from
it with `effbench train from=RUN`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper
from effbench.api.points import Point
from effbench.api.schema import NonNegativeInt
from effbench.api.shape import LAYERS_DIFFER, AnyShape, ModelShape, Phase
from effbench.methods.base import Method
from effbench.methods.compresses import Compresses, Part
from effbench.nn.depth import influence, submodel
from effbench.nn.llama import stack
from effbench.util.errors import UserError
from effbench.util.files import write_atomic
from effbench.util.lazy import torch

KEPT = "layers.json"
"""The artefact: which layers of the base stay."""


@dataclass(frozen=True)
class LayerDrop(Compresses):
    """Layers removed in one shot."""

    paper: ClassVar[Paper | None] = Paper(
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        "Findings of ACL 2025",
        "2403.03853",
    )

    layers: tuple[NonNegativeInt, ...] | None = None
    """The layers that go, counted from 0; null chooses them."""
    remove: NonNegativeInt | None = None
    """How many go where they are not listed; null is a quarter."""
    criterion: Literal["influence", "last", "even", "random"] = "influence"
    """Which: those with the lowest block influence, the deepest, evenly spaced or random ones."""

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse layers that are not there, and a model of which none would be left."""
        if not shape.uniform:
            raise UserError(*LAYERS_DIFFER)
        listed = self.layers or ()
        if self.layers is not None and not listed:
            raise UserError("method.layers=[] removes nothing.", "List layers, or leave it out.")
        if any(layer >= shape.num_layers for layer in listed) or len(set(listed)) < len(listed):
            raise UserError(
                f"method.layers={list(listed)} are not different layers of {shape.num_layers}.",
                f"Choose from 0 to {shape.num_layers - 1}, each once.",
            )
        if self.count(shape.num_layers) >= shape.num_layers:
            raise UserError(
                f"No layer of {shape.num_layers} would be left.",
                "Lower method.remove, or list fewer in method.layers.",
            )
        return self

    def count(self, num_layers: int) -> int:
        """Return how many layers go."""
        if self.layers is not None:
            return len(self.layers)
        return (num_layers + 2) // 4 if self.remove is None else self.remove

    def num_parts(self, model: torch.nn.Module, calibration: Sequence[Batch]) -> int:
        """Return rows that are read, and the choice."""
        return len(calibration) * self.calibrates + 1

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Read row by row how much each layer changes, where that is asked for, then cut."""
        stack.require_layers_alike(model)
        root: Any = model
        sums = torch.zeros(root.config.num_hidden_layers, dtype=torch.float64)
        tokens = torch.zeros((), dtype=torch.int64)

        def add(read: Mapping[str, torch.Tensor]) -> None:
            sums.add_(read["cosines"].cpu())
            tokens.add_(read["tokens"].cpu())

        if self.layers is None and self.criterion == "influence":
            for row, batch in enumerate(calibration):
                yield Part(f"rows.{row}", partial(self._passed, model, batch), add)
        choose = partial(self._choose, sums, tokens, ctx.seed)
        yield Part("layers", choose, partial(self._keep, model))

    def _passed(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Return what each layer changes of one batch; see `influence.passed`."""
        real = batch.attention_mask.bool()
        return influence.passed(model.model.layers, real, lambda: Method().logits(model, batch))

    def _choose(
        self, sums: torch.Tensor, tokens: torch.Tensor, seed: int
    ) -> dict[str, torch.Tensor]:
        """Return which layers stay, [L] bool, and each one's influence, [L]."""
        found = influence.influence(sums, int(tokens))
        gone = self.gone(found, seed)
        kept = torch.tensor([index not in gone for index in range(len(found))])
        return {"influence": found, "kept": kept}

    def _keep(self, model: torch.nn.Module, verdict: Mapping[str, torch.Tensor]) -> None:
        """Leave the chosen layers alone in the model."""
        config: Any = model.config
        config.kept_layers = verdict["kept"].nonzero()[:, 0].tolist()
        submodel.keep_layers(model, config.kept_layers)

    def gone(self, influence: torch.Tensor, seed: int) -> set[int]:
        """Return the layers that go, given each one's influence, [L]."""
        total, count = len(influence), self.count(len(influence))
        if self.layers is not None:
            return set(self.layers)
        if self.criterion == "random":
            draws = torch.rand(total, generator=torch.Generator().manual_seed(seed))
            return set(draws.argsort()[:count].tolist())
        if self.criterion == "even":
            return {(2 * i + 1) * total // (2 * count) for i in range(count)}
        if self.criterion == "last":
            return set(range(total - count, total))
        return set(influence.argsort(stable=True)[:count].tolist())

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write which layers stay."""
        config: Any = model.config
        write_atomic(folder / KEPT, (json.dumps({"kept": config.kept_layers}) + "\n").encode())

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` without the layers that went."""
        config: Any = model.config
        config.kept_layers = _kept_in(folder)
        submodel.keep_layers(model, config.kept_layers)
        return model

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Leave layers out; which ones, only an artefact tells, and all are alike."""
        count = base.num_layers
        if folder is not None and (folder / KEPT).is_file():
            return base.only(_kept_in(folder))
        return base.only(range(count - self.count(count)))


def _kept_in(folder: Path) -> list[int]:
    """Return the layers that an artefact keeps.

    Raises:
        UserError: When it cannot be read.
    """
    try:
        kept: list[int] = json.loads((folder / KEPT).read_text())["kept"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder / KEPT} cannot be read: {error}.", "Run again with --fresh to make it anew."
        ) from None
    return kept
