"""A model as its own teacher: the same frozen weights with an earlier copy of the adapters.

    L_layer = sum over four teacher layers t of min over student layers s of MSE(Tr(H_s), H_t)

One teacher layer is drawn from each quarter of the depth; each is matched anew at every step with
the nearest student layer that still has a block. Tr(h) = h + B A h starts as the identity. Source:
Zhao et al., APT, arXiv 2401.12200. Our choices: one Tr for all layers, errors over the dimensions
that masks leave, and a copy from the last step before pruning begins instead of the best on a
development set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from effbench.api.batch import Batch
from effbench.nn.adapters.growth import set_factors
from effbench.nn.adapters.lowrank import low_rank_layers
from effbench.nn.depth.droppable import LowRankMap
from effbench.nn.losses.token import token_kl
from effbench.nn.pruning.masks import Masks


@contextmanager
def as_teacher(
    model: nn.Module, masks: Masks, copies: Mapping[str, Sequence[torch.Tensor]]
) -> Iterator[None]:
    """Work with copied adapters and without masks inside the context, and without gradients."""
    layers = dict(low_rank_layers(model))
    own = {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}
    try:
        for name, (a, b) in copies.items():
            set_factors(layers[name], *_frozen(a, b))
        with masks.off(), torch.no_grad():
            yield
    finally:
        for name, (a, b) in own.items():
            set_factors(layers[name], a, b)


def _frozen(a: torch.Tensor, b: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)


@contextmanager
def captured(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the output of every decoder layer, [B, T, d] each, inside the context."""
    found: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def draw_layers(count: int, generator: torch.Generator) -> list[int]:
    """Return one layer of each quarter of `count` layers; fewer where there are fewer than four."""
    quarters = min(4, count)
    bounds = [count * q // quarters for q in range(quarters + 1)]
    return [
        int(torch.randint(low, high, (1,), generator=generator)) for low, high in pairwise(bounds)
    ]


def layer_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    drawn: Sequence[int],
    candidates: Sequence[int],
    transfer: nn.Module,
    dims: torch.Tensor,
    real: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum over drawn teacher layers of the error of the nearest student layer, a scalar.

    Args:
        student: Output of each layer, [B, T, d].
        teacher: Likewise.
        drawn: Teacher layers.
        candidates: Student layers that may be matched.
        transfer: B A of Tr, without the identity.
        dims: Masks of the dimensions, [d]; what they leave is compared.
        real: [B, T] bool, the tokens that count.
        weights: Of each row, [B]; None is alike.
    """
    weight = dims / dims.sum()
    each = None if weights is None else weights[real.nonzero()[:, 0]].float()
    moved = {}
    for index in candidates:
        rows = student[index][real].float()
        moved[index] = rows + transfer(rows)

    def error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        found = ((a - b).square() * weight).sum(-1)
        if each is None:
            return found.mean()
        return (each * found).sum() / each.sum().clamp(min=torch.finfo(found.dtype).tiny)

    total = torch.zeros((), device=dims.device)
    for place in drawn:
        target = teacher[place][real].float()
        with torch.no_grad():
            errors = {index: float(error(moved[index], target)) for index in candidates}
        nearest = min(candidates, key=lambda index: errors[index])
        total = total + error(moved[nearest], target)
    return total


def not_empty(masks: Masks) -> list[int]:
    """Return the layers with a block whose mask is above 0."""
    views = enumerate(masks.layout.views(masks.values))
    return [i for i, view in views if bool((view.groups > 0).any() or (view.neurons > 0).any())]


def add_transfer(model: Any, rank: int, scale: float, seed: int) -> None:
    """Put B A of Tr into a model, as its submodule `transfer`."""
    draws = torch.Generator().manual_seed(seed)
    transfer = LowRankMap(model.config.hidden_size, rank, scale, draws)
    model.add_module("transfer", transfer.to(model.model.embed_tokens.weight.device))


@dataclass(frozen=True)
class SelfTeacher:
    """An earlier copy of a model's adapters, to learn from."""

    model: Any
    """With its transfer map as `model.transfer`."""
    masks: Masks
    """Of the student."""
    copies: Mapping[str, Sequence[torch.Tensor]]
    """The teacher's adapters."""
    generator: torch.Generator
    """Draws the teacher's layers."""

    def losses(
        self,
        run: Callable[[], torch.Tensor],
        logits: torch.Tensor,
        layers: Sequence[torch.Tensor],
        batch: Batch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum over tokens of KL(teacher || student), and L_layer.

        Args:
            run: Gives the logits of the batch; it is run once more, as the teacher.
            logits: The student's, [B, T, V].
            layers: Outputs of the student's layers, [B, T, d] each.
            batch: What was read.
        """
        real = batch.attention_mask.bool()
        with as_teacher(self.model, self.masks, self.copies), captured(self.model) as teacher:
            target = run()
        dims = self.masks.layout.dims(self.masks.values)
        drawn, left = draw_layers(len(teacher), self.generator), not_empty(self.masks)
        how = self.model.transfer, dims, real, batch.weights
        errors = layer_loss(layers, teacher, drawn, left, *how)
        return batch.weighed(token_kl(target, logits, batch.labels, 1.0)).sum(), errors

    def loss(
        self,
        run: Callable[[], torch.Tensor],
        batch: Batch,
        logits: torch.Tensor,
        layers: Sequence[torch.Tensor],
        weights: tuple[float, float],
    ) -> torch.Tensor:
        """Return the distillation loss of a micro-batch, a scalar: its share of the window's.

        Args:
            run: Gives the logits of the batch; see `losses`.
            batch: What was read.
            logits: The student's, [B, T, V].
            layers: Outputs of the student's layers, [B, T, d] each.
            weights: Of the divergence and of L_layer.
        """
        soft, errors = self.losses(run, logits, layers, batch)
        soft, share = soft / batch.window_tokens, batch.weighted_tokens / batch.window_tokens
        return weights[0] * soft + weights[1] * share * errors
