"""Causal products of features without a softmax, all at once, in stretches, or token by token.

For features q of R queries and k of one key a position, values v and a decay gamma in [0, 1],

    y_n = sum over m <= n of gamma^(n - m) (q_n . k_m) v_m

is one and the same in three forms (Sun et al., Retentive Network, arXiv 2307.08621):

    parallel     Y = (Q K^T * D) V,  D_nm = gamma^(n - m) for m <= n, else 0
    recurrent    S <- gamma S + k^T v,  y = q S
    chunked      Y = (Q K^T * D) V + (Q * gamma^(1 ... c)) S
                 S <- gamma^c S + (K * gamma^(c-1 ... 0))^T V

Shapes: q [B, G, R, T, d], k and v [B, G, T, d], gamma [G], S [B, G, d, d], y as q. Only differences
of positions are exponents, so that nothing overflows however long a sequence is.
"""

from __future__ import annotations

import torch

from effbench.api.recurrent import CHUNK


def parallel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, fading: torch.Tensor
) -> torch.Tensor:
    """Return y of positions that nothing came before; work and memory grow with T^2.

    Args:
        q: [B, G, R, T, d].
        k: [B, G, T, d].
        v: [B, G, T, d].
        fading: D of `decays`, [G, T, T].
    """
    rows, groups, heads, length, size = q.shape
    scores = q.reshape(rows, groups, -1, size) @ k.transpose(-1, -2)
    faded = scores.view(rows, groups, heads, length, length) * fading[:, None]
    return (faded.view(rows, groups, -1, length) @ v).view(q.shape)


def decays(gamma: torch.Tensor, length: int) -> torch.Tensor:
    """Return D, [G, T, T]: gamma^(n - m) for m <= n, else 0."""
    n = torch.arange(length, device=gamma.device)
    return (gamma[:, None, None] ** (n[:, None] - n).clamp(min=0)).tril()


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = CHUNK,
    ends: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y and the state S after it, stretch by stretch; work grows with T c.

    Args:
        q: [B, G, R, T, d].
        k: [B, G, T, d].
        v: [B, G, T, d].
        gamma: [G].
        state: After what came before, [B, G, d, d]; None for nothing.
        chunk: Positions of a stretch, c; T need not be a multiple of it.
        ends: Whether nothing comes after it; then no state is made of the last stretch.
    """
    found, fading = [], decays(gamma, min(chunk, q.shape[3]))
    for start in range(0, q.shape[3], chunk):
        part = slice(start, start + chunk)
        here, keys, values = q[:, :, :, part], k[:, :, part], v[:, :, part]
        length = keys.shape[2]
        y = parallel(here, keys, values, fading[:, :length, :length])
        if state is not None:
            y = y + _carried(here, gamma, state)
        last = start + chunk >= q.shape[3]
        state = None if last and ends else _absorbed(keys, values, gamma, state)
        found.append(y)
    return torch.cat(found, dim=3), state


def _carried(q: torch.Tensor, gamma: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Return what a stretch [B, G, R, c, d] reads from the state before it."""
    past = gamma[:, None] ** torch.arange(1, q.shape[3] + 1, device=q.device)
    faded = q * past[:, None, :, None]
    return (faded.flatten(2, 3) @ state).view(q.shape)


def _absorbed(
    k: torch.Tensor, v: torch.Tensor, gamma: torch.Tensor, state: torch.Tensor | None
) -> torch.Tensor:
    """Return the state after a stretch [B, G, c, d]."""
    length = k.shape[2]
    left = gamma[:, None] ** torch.arange(length - 1, -1, -1, device=k.device)
    own = (k * left[:, :, None]).transpose(-1, -2) @ v
    return own if state is None else own + (gamma**length)[:, None, None] * state


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma: torch.Tensor,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y of one position and the state after it; work does not depend on what came before.

    Args:
        q: [B, G, R, 1, d].
        k: [B, G, 1, d].
        v: [B, G, 1, d].
        gamma: [G].
        state: [B, G, d, d]; None for nothing.
    """
    own = k.transpose(-1, -2) @ v
    state = own if state is None else own + gamma[:, None, None] * state
    return (q.squeeze(3) @ state).unsqueeze(3), state
