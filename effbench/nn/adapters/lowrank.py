"""Low-rank adapters that work at any rank b up to R, and what LoRA needs around them.

For an input x [*, d_in], a frozen linear layer W and the factors A [R, d_in] and B [d_out, R]:

    y = W x + (alpha / b) * B[:, :b] (A[:b] drop(x))

Source: Valipour et al., DyLoRA, arXiv 2210.07558. They write alpha / R and multiply each factor by
sqrt(R / b), which is the same product; at b = R it is LoRA (Hu et al., arXiv 2106.09685).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from effbench.util.errors import UserError

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [r, d_in] and B [d_out, r] of one layer."""

Mode = Literal["nested", "frozen"]


def init_a(tensor: torch.Tensor, seed: int, name: str) -> None:
    """Fill A in place: Kaiming-uniform with a = sqrt(5), drawn on the CPU in float32.

    The draw depends on nothing but the arguments, so all methods that share a seed start from the
    same adapters, on every device and whatever was drawn before.

    Args:
        tensor: [R, d_in].
        seed: The run's seed.
        name: Qualified name of the layer.
    """
    number = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(number, "little") >> 1)
    drawn = torch.empty(tensor.shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        tensor.copy_(drawn)


@dataclass
class RankControl:
    """Which leading ranks are in use: one object shared by all layers of a model."""

    max_rank: int
    """R."""
    mode: Mode = "nested"
    """What learns at rank b: the ranks 1 … b (`nested`) or rank b alone (`frozen`)."""
    active: int = 0
    """b; R at first."""

    def __post_init__(self) -> None:
        self.active = self.active or self.max_rank

    def inactive(self) -> list[slice]:
        """Return the ranks that do not learn now."""
        above = slice(self.active, self.max_rank)
        return [above] if self.mode == "nested" else [slice(0, self.active - 1), above]

    @contextmanager
    def using(self, rank: int) -> Iterator[None]:
        """Use the first `rank` ranks inside the context."""
        before = self.active
        self.active = rank
        try:
            yield
        finally:
            self.active = before


class LowRankLinear(nn.Module):
    """A frozen linear layer with an adapter whose leading b ranks are in use.

    Args:
        base: Anything with `in_features` and `out_features`: dense, 4-bit or packed.
        control: Says b; shared with the model's other layers.
        alpha: Numerator of the scale.
        dropout: Probability of dropping an adapter input in training.
    """

    def __init__(
        self, base: nn.Module, control: RankControl, alpha: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.in_features = int(base.in_features)  # type: ignore[arg-type]
        self.out_features = int(base.out_features)  # type: ignore[arg-type]
        self.base = base
        self.control = control
        self.alpha = alpha
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        device = next(chain(base.parameters(), base.buffers())).device
        rank = control.max_rank
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [*, d_out] for x [*, d_in], in the dtype of the base layer's output."""
        y: torch.Tensor = self.base(x)
        a, b = self.active_factors()
        hidden = F.linear(self.dropout(x.to(a.dtype)), a)
        # The order and the casts of peft's layer, so that b = R gives the same bits as LoRA.
        return (y + F.linear(hidden, b) * (self.alpha / self.control.active)).to(y.dtype)

    def active_factors(self) -> Factors:
        """Return A[:b] and B[:, :b], with only rank b attached to the graph in frozen mode."""
        rank = self.control.active
        a, b = self.lora_A[:rank], self.lora_B[:, :rank]
        if self.control.mode == "frozen" and rank > 1:
            a = torch.cat([a[:-1].detach(), a[-1:]])
            b = torch.cat([b[:, :-1].detach(), b[:, -1:]], dim=1)
        return a, b

    def extra_repr(self) -> str:
        """Return the sizes that `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, max_rank={self.control.max_rank}"


def adapter(
    base: nn.Module, name: str, control: RankControl, alpha: float, seed: int, dropout: float = 0.0
) -> LowRankLinear:
    """Return a linear with an adapter beside it that changes nothing yet: see `init_a`; B is zero.

    Args:
        base: The frozen linear.
        name: Its qualified name.
        control: Says b.
        alpha: Numerator of the scale.
        seed: The run's seed.
        dropout: Probability of dropping an adapter input in training.
    """
    layer = LowRankLinear(base, control, alpha, dropout)
    init_a(layer.lora_A, seed, name)
    return layer


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Yield `(qualified name, layer)` of every adapted linear."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            yield name, module


def copy_adapters(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return copies of all adapters' factors, `[A, B]` by name."""
    return {
        name: [layer.lora_A.detach().clone(), layer.lora_B.detach().clone()]
        for name, layer in low_rank_layers(model)
    }


def control_of(model: nn.Module) -> RankControl:
    """Return what says the rank of all of a model's adapters."""
    return next(low_rank_layers(model))[1].control


@contextmanager
def inactive_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Leave inactive ranks and their optimiser moments as they were, bit for bit.

    A zero gradient is not enough for that: Adam's momentum and weight decay move such ranks too.

    Raises:
        UserError: When the optimiser keeps quantised moments, whose parts cannot be put back.
    """
    ranks = control_of(model).inactive()
    layers = [layer for _, layer in low_rank_layers(model)]
    factors = [(f, axis) for n in layers for axis, f in enumerate((n.lora_A, n.lora_B))]
    before = []
    for factor, axis in factors:
        now = _with_moments(factor, optimizer)
        before.append({key: [p.clone() for p in _cut(t, axis, ranks)] for key, t in now.items()})
    yield
    for (factor, axis), old in zip(factors, before, strict=True):
        for key, tensor in _with_moments(factor, optimizer).items():
            for i, part in enumerate(_cut(tensor, axis, ranks)):
                # A moment that did not exist before would have started at zero.
                part.copy_(old[key][i]) if key in old else part.zero_()


def _with_moments(
    factor: nn.Parameter, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    found = {"": factor.data}
    for key, value in optimizer.state.get(factor, {}).items():
        if isinstance(value, torch.Tensor) and value.shape == factor.shape:
            found[key] = value
            if not value.is_floating_point():
                raise UserError(
                    "method.protect_inactive=true cannot hold an 8-bit optimiser's moments.",
                    "Set train.optimizer=adamw, or method.protect_inactive=false.",
                )
    return found


def _cut(tensor: torch.Tensor, axis: int, ranks: list[slice]) -> list[torch.Tensor]:
    return [tensor[r] if axis == 0 else tensor[:, r] for r in ranks]


def truncate(a: torch.Tensor, b: torch.Tensor, rank: int) -> Factors:
    """Return the first `rank` ranks of A [R, d_in] and B [d_out, R], as copies."""
    return a[:rank].detach().clone(), b[:, :rank].detach().clone()


def svd_truncate(a: torch.Tensor, b: torch.Tensor, rank: int) -> Factors:
    """Return the rank-`rank` factors whose product is nearest to B A in the Frobenius norm.

    Computed in float64 from the factors' QR decompositions, so that the largest matrix that is
    decomposed is R x R; the singular values are shared out evenly. The scale of the adapter has to
    stay what it was (alpha / R), since the factors approximate B A itself.

    Args:
        a: [R, d_in].
        b: [d_out, R].
        rank: At most R.
    """
    q_b, r_b = torch.linalg.qr(b.detach().double())
    q_a, r_a = torch.linalg.qr(a.detach().double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    near_a = root[:, None] * (vh[:rank] @ q_a.T)
    near_b = (q_b @ u[:, :rank]) * root
    return near_a.to(a.dtype), near_b.to(b.dtype)


def merged_weight(linear: Any) -> torch.Tensor:
    """Return the weight of a dense linear with its adapter's update in it, [d_out, d_in]."""
    if not isinstance(linear, LowRankLinear):
        weight: torch.Tensor = linear.weight
        return weight
    base: Any = linear.base
    a, b = linear.active_factors()
    update = (b @ a) * (linear.alpha / linear.control.active)
    merged: torch.Tensor = (base.weight.float() + update.float()).to(base.weight.dtype)
    return merged
