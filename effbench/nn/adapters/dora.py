"""Weights in magnitude and direction: the layer of DoRA.

For a frozen W [d_out, d_in], the factors A [r, d_in] and B [d_out, r], a scale s, and one magnitude
m per output [d_out]:

    V = W + s B A,    y = (m / ||V||) * (V x) + bias        ||V|| the norm of each row of V, [d_out]

||V|| is a constant for gradients (Liu et al., DoRA, arXiv 2402.09353, section 4.3). It depends on
weights alone, so that it is computed once where they do not change (`fixed_gains`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from effbench.nn.adapters.lowrank import init_a
from effbench.nn.quant.linears import QuantisedLinear

SMALLEST = 1e-12
"""Least norm of a row, so that a row of zeros stays one."""


class DoRALinear(nn.Module):
    """A frozen linear layer whose directions get an update of low rank, and whose magnitudes train.

    Args:
        base: A linear, dense or packed.
        rank: r.
        scale: s.
        dropout: Probability of dropping an input of A in training; W's are never dropped.
        seed: The run's seed.
        name: Qualified name of the layer, for the start of A.
    """

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, dropout: float, seed: int, name: str
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.gain: torch.Tensor | None = None
        """m / ||V||, while it is fixed."""
        device = next(chain(base.parameters(), base.buffers())).device
        self.lora_A = _factor(self.in_features, rank, device)
        self.lora_B = _factor(rank, self.out_features, device)
        init_a(self.lora_A.weight, seed, name)
        self.lora_magnitude = nn.Parameter(self.norms())

    @torch.no_grad()
    def norms(self) -> torch.Tensor:
        """Return the norm of each row of V, [d_out] float32."""
        w = self._dense(self.lora_A.weight.dtype)
        return torch.linalg.vector_norm(self.direction(w), dim=1).clamp_min(SMALLEST)

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(self.base, QuantisedLinear):
            return self.base.dense_weight(dtype)
        return self.base.weight.to(dtype)

    def direction(self, weight: torch.Tensor) -> torch.Tensor:
        """Return V [d_out, d_in] from W, float32."""
        a, b = self.lora_A.weight.detach(), self.lora_B.weight.detach()
        return torch.addmm(weight, b, a, alpha=self.scale)

    def gains(self) -> torch.Tensor:
        """Return m / ||V||, [d_out], without a gradient."""
        return self.lora_magnitude.detach() / self.norms()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [*, d_out] for x [*, d_in], in the dtype of the base layer's output."""
        y: torch.Tensor = self.base(x)
        bias, dtype = self.base.bias, y.dtype
        if bias is not None:
            y = y - bias
        hidden = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))
        gain = self.lora_magnitude / self.norms() if self.gain is None else self.gain
        y = gain * (y + self.lora_B(hidden) * self.scale)
        return (y if bias is None else y + bias).to(dtype)

    def extra_repr(self) -> str:
        """Return the sizes that `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, rank={self.lora_A.out_features}"


def _factor(d_in: int, d_out: int, device: torch.device) -> nn.Linear:
    """Return a float32 linear of zeros; the random numbers of training do not depend on it."""
    linear = nn.utils.skip_init(
        nn.Linear, d_in, d_out, bias=False, device=device, dtype=torch.float32
    )
    nn.init.zeros_(linear.weight)
    return linear


def dora_layers(model: nn.Module) -> Iterator[tuple[str, DoRALinear]]:
    """Yield `(qualified name, layer)` of every adapted linear."""
    for name, module in model.named_modules():
        if isinstance(module, DoRALinear):
            yield name, module


@contextmanager
def fixed_gains(model: nn.Module) -> Iterator[None]:
    """Compute each layer's m / ||V|| once, for a context in which no weight changes."""
    layers = [layer for _, layer in dora_layers(model)]
    try:
        for layer in layers:
            layer.gain = layer.gains()
        yield
    finally:
        for layer in layers:
            layer.gain = None
