"""How fast the past fades: one rate for each key/value head, fixed or learned.

    gamma_g = 1 - exp(linspace(log 1/32, log 1/512, G))_g      (Retentive Network, arXiv 2307.08621)

DiJiang's code multiplies queries by gamma^n and keys by gamma^-m and trains both tables, [H, L].
Written out, gamma^-n of the first head is beyond float16 from 350 tokens on, and beyond float32
from 2,800. So ours are kept relative to the rates,

    A_nm = gamma^(n - m) exp(a_n + b_m) phi(q_n) . phi(k_m),    a = b = 0 at first,

which says the same as long as entries are positive, and still has a state. All that is learned is
an offset from where it starts: rates gamma = sigmoid(logit gamma_0 + delta) stay within (0, 1), and
a weight decay pulls back to the start.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from effbench.util.errors import UserError

Fading = Literal["fixed", "learned", "table"]


def head_decays(heads: int) -> torch.Tensor:
    """Return gamma of each head, [G] float32, from 1 - 1/32 up to 1 - 1/512."""
    return 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), heads).exp()


class Decay(nn.Module):
    """The rates of a layer, and what multiplies features beside them.

    Args:
        kind: `fixed` rates, `learned` rates, or fixed rates with a learned `table` of offsets.
        heads: Key/value heads G.
        positions: Rows of the tables, L.
    """

    start: torch.Tensor

    def __init__(self, kind: Fading, heads: int, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.register_buffer("start", head_decays(heads), persistent=False)
        self.delta = nn.Parameter(torch.zeros(heads)) if kind == "learned" else None
        """Offsets of the rates' logits, [G]."""
        tables = torch.zeros(2, heads, positions)
        self.tables = nn.Parameter(tables) if kind == "table" else None
        """a of queries and b of keys, [2, G, L]."""

    def rates(self) -> torch.Tensor:
        """Return gamma, [G]."""
        if self.delta is None:
            return self.start
        return torch.sigmoid(torch.logit(self.start) + self.delta.to(self.start.dtype))

    def factors(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return exp(a) and exp(b) at positions [B, T], each [B, G, T, 1]; None for ones.

        Raises:
            UserError: When a position is behind the table's end.
        """
        if self.tables is None:
            return None
        if int(positions.max()) >= self.positions:
            raise UserError(
                f"The tables of decays have {self.positions} positions, and this text has more.",
                "Shorten it, or train with method.decay=fixed or learned, which have no end.",
            )
        found = self.tables.to(self.start.dtype)[:, :, positions].exp()
        queries, keys = found.transpose(1, 2)[..., None]
        return queries, keys
