"""Adapters in the form of a singular value decomposition, whose ranks can be pruned one by one.

For an input x [*, d_in], a frozen linear layer W, Q [R, d_in], lambda [R] and P [d_out, R]:

    y = W x + s * P (lambda * (Q drop(x)))

Lambda starts at zero, P and Q are random: a rank whose lambda is set to zero is out, and can come
back. Source: Zhang et al., AdaLoRA, arXiv 2303.10512. Names of parameters are peft's: `lora_A` is
Q, `lora_E` lambda and `lora_B` P.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from effbench.api.rank_budgets import RANKS
from effbench.nn.adapters.lowrank import LowRankLinear, RankControl, init_a
from effbench.nn.llama.surgery import decoder_linears, replace_module


class SVDLinear(nn.Module):
    """A frozen linear layer with an update P diag(lambda) Q.

    Args:
        base: Anything with `in_features` and `out_features`: dense, 4-bit or packed.
        rank: R.
        scale: s.
        dropout: Probability of dropping an adapter input in training.
        seed: The run's seed.
        name: Qualified name of the layer. Q starts as A of our other methods, P in the same way
            from a name of its own.
    """

    def __init__(
        self, base: nn.Module, rank: int, scale: float, dropout: float, seed: int, name: str
    ) -> None:
        super().__init__()
        self.in_features = int(base.in_features)  # type: ignore[arg-type]
        self.out_features = int(base.out_features)  # type: ignore[arg-type]
        self.base = base
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        device = next(chain(base.parameters(), base.buffers())).device
        columns = torch.empty(rank, self.out_features)
        init_a(columns, seed, f"{name}.P")
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_E = nn.Parameter(torch.zeros(rank, device=device))
        self.lora_B = nn.Parameter(columns.T.contiguous().to(device))
        init_a(self.lora_A, seed, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [*, d_out] for x [*, d_in], in the dtype of the base layer's output."""
        y: torch.Tensor = self.base(x)
        hidden = F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A) * self.lora_E
        return (y + F.linear(hidden, self.lora_B) * self.scale).to(y.dtype)

    def extra_repr(self) -> str:
        """Return the sizes that `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, rank={len(self.lora_E)}"


def svd_layers(model: nn.Module) -> dict[str, SVDLinear]:
    """Return every adapted linear by its qualified name, in the order they run."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SVDLinear)}


def orthogonality(layers: Iterable[SVDLinear]) -> torch.Tensor:
    """Return how far P and Q are from orthonormal: the mean of ||P^T P - I|| and ||Q Q^T - I||.

    Frobenius norms, over all factors, as in the authors' code; the paper squares and sums them.
    """
    found = []
    for layer in layers:
        for rows in (layer.lora_A, layer.lora_B.T):
            unit = torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
            found.append(torch.linalg.matrix_norm(rows @ rows.T - unit))
    return torch.stack(found).mean()


@torch.no_grad()
def prune(layers: Mapping[str, SVDLinear], kept: Mapping[str, Sequence[int]]) -> None:
    """Set the lambdas of all ranks to zero that are not listed."""
    for name, layer in layers.items():
        stays = torch.zeros_like(layer.lora_E, dtype=torch.bool)
        stays[list(kept[name])] = True
        layer.lora_E.masked_fill_(~stays, 0.0)


@torch.no_grad()
def fold(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """Put a plain adapter of the listed ranks where each layer is: A is diag(lambda) Q, B is P.

    A layer of which no rank is listed is its base again.
    """
    for name, layer in svd_layers(model).items():
        plain = with_rank(layer.base, len(kept[name]), layer.scale)
        if isinstance(plain, LowRankLinear):
            ranks = list(kept[name])
            plain.lora_A.copy_(layer.lora_E[ranks, None] * layer.lora_A[ranks])
            plain.lora_B.copy_(layer.lora_B[:, ranks])
        replace_module(model, name, plain)
    return model


def write_ranks(model: nn.Module, targets: Iterable[str], folder: Path) -> None:
    """State the rank of each plain adapter in an artefact; 0 where a target has none."""
    ranks = {
        name: linear.control.max_rank if isinstance(linear, LowRankLinear) else 0
        for name, linear in decoder_linears(model, targets)
    }
    (folder / RANKS).write_text(json.dumps(ranks, indent=1))


def follow_ranks(model: nn.Module, scale: float, folder: Path) -> None:
    """Put plain adapters of zeros into a model, of the ranks that an artefact states."""
    for name, rank in json.loads((folder / RANKS).read_text()).items():
        replace_module(model, name, with_rank(model.get_submodule(name), rank, scale))


def with_rank(base: nn.Module, rank: int, scale: float) -> nn.Module:
    """Return `base` with a plain adapter of zeros, whose scale is `scale`; `base` at rank 0."""
    return LowRankLinear(base, RankControl(rank), scale * rank) if rank else base
