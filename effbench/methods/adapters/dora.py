"""DoRA: LoRA for the direction of each weight row, and a magnitude that trains by itself.

Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv 2402.09353.

    V = W + (alpha / R) B A,    y = (m / ||V||) * (V x)        m [d_out], ||V|| of each row, [d_out]

A [R, d_in] and B [d_out, R] as in LoRA; m starts as the norms of W's rows, so that the untrained
model is the base. As the paper advises, ||V|| is a constant for gradients. The paper speaks of
columns, of weights that lie the other way round.

Our choices: A starts as in our other methods; magnitudes and factors are float32; norms are
computed in float32 once per micro-batch, and once for a whole evaluation; dropout is on the input
of A alone, whereas peft also drops inputs of W in the magnitudes' share. Without dropout it
computes what peft's layer does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from effbench.api.method_types import Context, Paper
from effbench.api.parts import Linear
from effbench.api.points import Point
from effbench.api.shape import ModelShape, Phase
from effbench.methods.adapters.lora import LoRA
from effbench.nn.adapters import dora, peft_lora
from effbench.nn.llama import surgery
from effbench.nn.model_kinds import base as model_kinds
from effbench.util.lazy import torch


@dataclass(frozen=True)
class DoRA(LoRA):
    """Low-rank adaptation of directions, and training of magnitudes."""

    paper: ClassVar[Paper | None] = Paper(
        "DoRA: Weight-Decomposed Low-Rank Adaptation", "ICML 2024", "2402.09353"
    )
    data_parallel: ClassVar[frozenset[str]] = frozenset({"none"})
    libraries: ClassVar[tuple[str, ...]] = ()

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Freeze the base and put weight-decomposed layers around the targets."""

        def adapt(name: str, linear: Any) -> dora.DoRALinear:
            scale = self.numerator / self.rank
            return dora.DoRALinear(linear, self.rank, scale, self.dropout, ctx.seed, name)

        model_kinds.freeze(model)
        surgery.replace_linears(model, adapt, self.targets)
        return model

    def adapters(self, model: torch.nn.Module) -> peft_lora.Adapters:
        """Yield `(qualified name, A, B)` of every adapted layer."""
        return ((name, layer.lora_A, layer.lora_B) for name, layer in dora.dora_layers(model))

    def magnitudes(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return m of every adapted layer, [d_out]."""
        return {name: layer.lora_magnitude for name, layer in dora.dora_layers(model)}

    @contextmanager
    def at(self, model: torch.nn.Module, point: Point) -> Iterator[None]:
        """Put the cut adapter in, with m as it is, and fix the norms of V's rows."""
        with super().at(model, point), dora.fixed_gains(model):
            yield

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Scale the outputs of what LoRA adapts, by magnitudes over norms fixed for use."""
        adapted = super().shape(base, point, phase, folder)

        def scaled(_: int, linear: Linear) -> Linear:
            adapter = linear.adapter
            return replace(linear, adapter=adapter and replace(adapter, gains=linear.d_out))

        return adapted.map_linears(scaled, self.targets)
