"""Fewer key/value heads: each is the mean of those that it stands for, without training.

Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
Checkpoints, EMNLP 2023, arXiv 2305.13245.

    W_k' [n', D, d] = mean over each run of n / n' heads of W_k [n, D, d]        W_v' likewise

Query heads go on reading in runs, so each group of them reads the mean of the heads that it read.
One head is multi-query attention. The rotation of keys is linear, so means of rotated keys are
rotated means. The result is a model of transformers' own; the paper then trains it further, which
here is a run of its own: `effbench train from=RUN method=full`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper
from effbench.api.points import Point
from effbench.api.schema import PositiveInt
from effbench.api.shape import Anatomy, AnyShape, ModelShape, Phase
from effbench.api.sharing import require_unshared
from effbench.api.slices import sliced_shape
from effbench.methods.compresses import Compresses, Part, compress_whole
from effbench.nn.llama import attention, weights
from effbench.util.errors import UserError
from effbench.util.lazy import torch

POOLED = ("k_proj", "v_proj")


@dataclass(frozen=True)
class GQA(Compresses):
    """Grouped-query or multi-query attention out of a model with more key/value heads."""

    paper: ClassVar[Paper | None] = Paper(
        "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
        "EMNLP 2023",
        "2305.13245",
    )
    anatomy: ClassVar[Anatomy] = "plain"

    kv_heads: PositiveInt = 1
    """Key/value heads of each layer; 1 is multi-query attention."""

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse numbers of heads that do not divide the model's, and models that share."""
        require_unshared(shape, self.name)
        if shape.num_kv_heads % self.kv_heads:
            fits = [n for n in range(1, shape.num_kv_heads) if shape.num_kv_heads % n == 0]
            raise UserError(
                f"method.kv_heads={self.kv_heads} does not divide the model's "
                f"{shape.num_kv_heads} key/value heads.",
                f"Choose one of: {', '.join(map(str, fits)) or 'none, it has one head only'}.",
            )
        return self

    def num_parts(self, model: Any, calibration: Sequence[Batch]) -> int:
        """Return the number of projections that are pooled."""
        return len(POOLED) * len(model.model.layers)

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Pool the heads of one projection after the other."""
        attention.require_llama(model)
        root: Any = model
        for index, layer in enumerate(root.model.layers):
            for name in POOLED:
                linear, width = getattr(layer.self_attn, name), root.config.head_dim
                yield Part(
                    f"model.layers.{index}.self_attn.{name}",
                    partial(self._pooled, linear, width),
                    partial(self._narrow, linear, width),
                )
        self._settle(root)

    def _pooled(self, linear: Any, width: int) -> dict[str, torch.Tensor]:
        """Return a projection's parameters with the mean of each run of heads."""

        def mean(old: torch.Tensor) -> torch.Tensor:
            heads = old.float().view(self.kv_heads, -1, width, *old.shape[1:])
            return heads.mean(1).reshape(-1, *old.shape[1:]).to(old.dtype)

        return {name: mean(parameter.data) for name, parameter in linear.named_parameters()}

    def _narrow(self, linear: Any, width: int, pooled: Mapping[str, torch.Tensor]) -> None:
        """Give a projection its pooled parameters."""
        for name, parameter in linear.named_parameters():
            parameter.data = pooled[name]
        linear.out_features = self.kv_heads * width

    def _settle(self, model: Any) -> None:
        model.config.num_key_value_heads = self.kv_heads
        for layer in model.model.layers:
            layer.self_attn.num_key_value_groups = model.config.num_attention_heads // self.kv_heads

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the pooled projections."""
        named = model.named_parameters()
        return {n: p.detach() for n, p in named if n.split(".")[-2] in POOLED}

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` with the pooled projections of `folder`."""
        compress_whole(self, model, [], ctx)
        weights.load_tensors(self.artefact_tensors(model), folder / "weights.safetensors")
        return model

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Give every layer fewer key/value heads."""
        sizes = [replace(x.size, num_kv_heads=self.kv_heads) for x in base.layers]
        return sliced_shape(base, base.hidden_size, sizes)
