"""An MLP of experts that are low-rank updates of one frozen MLP, and the router before them.

    E_e(x) = (Wd + s Bd_e Ad_e) (act((Wg + s Bg_e Ag_e) x) * ((Wu + s Bu_e Au_e) x))
    y = sum over the k chosen e of w_e E_e(x)    w = softmax(Wr x), the k largest over their sum

Source: Li et al., MixLoRA, arXiv 2404.15159. What experts share is computed once for each token:
Wg x and Wu x, and Wd of the weighted sum of hidden states, for Wd is linear.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from effbench.nn.adapters.lowrank import init_a

ROUTER_SCALE = 0.02
"""Standard deviation of the router's weights at the start."""


class ExpertsLinear(nn.Module):
    """A frozen linear with one low-rank update for each expert; the caller says which applies.

    Args:
        base: Anything with `in_features` and `out_features`.
        experts: E.
        rank: R of each.
        seed: The run's seed.
        name: Qualified name; the first expert starts as a plain adapter there would.
    """

    def __init__(self, base: nn.Module, experts: int, rank: int, seed: int, name: str) -> None:
        super().__init__()
        self.in_features = int(base.in_features)  # type: ignore[arg-type]
        self.out_features = int(base.out_features)  # type: ignore[arg-type]
        self.base = base
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.lora_A = nn.Parameter(torch.zeros(experts, rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(experts, self.out_features, rank, device=device))
        for expert in range(experts):
            own = f"{name}.{expert}" if expert else name
            init_a(self.lora_A[expert], seed, own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return W x, [*, d_out]; what experts add to it is `update`."""
        y: torch.Tensor = self.base(x)
        return y

    def update(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Return B_e A_e x of one expert, [*, d_out] float32, unscaled."""
        a, b = self.lora_A[expert], self.lora_B[expert]
        return nn.functional.linear(nn.functional.linear(x.to(a.dtype), a), b)


class MixtureMLP(nn.Module):
    """A gated MLP as experts on what it was.

    Args:
        base: The MLP, laid out as Llama's.
        experts: E.
        top_k: Experts of a token, k.
        rank: R of each update.
        scale: s.
        dropout: Probability of dropping an input of an update in training.
        seed: The run's seed.
        name: Qualified name.
    """

    gate_proj: ExpertsLinear
    up_proj: ExpertsLinear
    down_proj: ExpertsLinear

    def __init__(
        self,
        base: Any,
        experts: int,
        top_k: int,
        rank: int,
        scale: float,
        dropout: float,
        seed: int,
        name: str,
    ) -> None:
        super().__init__()
        self.experts, self.top_k, self.scale = experts, top_k, scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        for part in ("gate_proj", "up_proj", "down_proj"):
            linear = ExpertsLinear(getattr(base, part), experts, rank, seed, f"{name}.{part}")
            setattr(self, part, linear)
        self.act_fn = base.act_fn
        self.router = nn.Linear(self.gate_proj.in_features, experts, bias=False)
        with torch.no_grad():
            drawn = torch.randn(self.router.weight.shape, generator=_draws(seed, name))
            self.router.weight.copy_(ROUTER_SCALE * drawn)
        self.router.to(self.gate_proj.lora_A.device)
        self.seen: list[torch.Tensor] | None = None
        """Where the router's logits go, [tokens, E] for each pass, while somebody collects them."""

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of the chosen experts and their numbers, [N, k] each, for x [N, d]."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x.float())
        if self.seen is not None:
            self.seen.append(logits)
        top, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        return top / top.sum(-1, keepdim=True), chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mixture's output, [*, d], in the dtype of the frozen MLP's."""
        rows = x.flatten(0, -2)
        weights, chosen = self.route(rows)
        gate, up = self.gate_proj(rows), self.up_proj(rows)
        inner = gate.new_zeros(len(rows), self.top_k, gate.shape[-1])
        added = torch.zeros(len(rows), self.top_k, x.shape[-1], device=x.device)
        for expert in range(self.experts):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            mine = self.dropout(rows[token])
            g = gate[token] + self.scale * self.gate_proj.update(expert, mine)
            u = up[token] + self.scale * self.up_proj.update(expert, mine)
            h = self.act_fn(g.to(gate.dtype)) * u.to(up.dtype)
            inner.index_put_((token, slot), h)
            low = self.scale * self.down_proj.update(expert, self.dropout(h))
            added.index_put_((token, slot), low)
        mixed = (weights[..., None] * inner).sum(1).to(gate.dtype)
        out = self.down_proj(mixed)
        y = (out + (weights[..., None] * added).sum(1)).to(out.dtype)
        return y.view_as(x)


def mixtures(model: nn.Module) -> list[MixtureMLP]:
    """Return the mixtures of a model, first layer first."""
    return [m for m in model.modules() if isinstance(m, MixtureMLP)]


@contextmanager
def router_logits(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the routers' logits of the passes inside the context, [tokens, E] for each layer."""
    found: list[torch.Tensor] = []
    for mixture in mixtures(model):
        mixture.seen = found
    try:
        yield found
    finally:
        for mixture in mixtures(model):
            mixture.seen = None


def balance(logits: torch.Tensor, mask: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return how unevenly experts are used: k where they are used alike, more where they are not.

    E times the sum over choices and experts of the share of tokens that have the expert as this
    choice, and its mean probability. The gradient reaches the probabilities alone.

    Args:
        logits: Of the routers, [layers * tokens, E].
        mask: 1 for real tokens, [layers * tokens].
        top_k: Choices of a token.
    """
    probabilities = logits.softmax(-1)[mask.bool()]
    experts = logits.shape[-1]
    chosen = probabilities.topk(top_k, dim=-1).indices
    share = nn.functional.one_hot(chosen, experts).float().mean(0).sum(0)
    return experts * (share * probabilities.mean(0)).sum()


def _draws(seed: int, name: str) -> torch.Generator:
    number = hashlib.sha256(f"{seed}:{name}.router".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(number, "little") >> 1)
