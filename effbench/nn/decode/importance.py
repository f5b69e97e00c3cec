"""How much the entries of a layer's cache are worth to those who will ask.

Every score takes what one layer has at hand when queries have come in, and returns a number for
each entry of each key/value head: larger ones stay, infinite ones are pinned. Computed in float32
at least, whatever the model is in.

    a = softmax(q K^T / sqrt(d))      weights of queries over the entries up to their own

B sequences, H query heads, G key/value heads, R = H / G, W queries of the last of S columns, each
of width d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import rotate_half

Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""From queries [B, H, W, d] of the last columns, keys and values [B, G, S, d], and the empty
columns on the left of each sequence, [B] or None, to scores [B, G, S]; [B, 1, S] where heads agree.
"""


def attention(
    query: torch.Tensor, keys: torch.Tensor, empty: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weights of queries over the entries up to their own, [B, G, R, W, S].

    Args:
        query: Of the last W columns, [B, H, W, d].
        keys: [B, G, S, d].
        empty: Columns on the left with nothing in them, [B], which have no weight.
    """
    heads, length, size = keys.shape[1:]
    asked = _exact(query).unflatten(1, (heads, -1))
    products = asked @ _exact(keys)[:, :, None].mT / size**0.5
    if query.shape[2] == 1 and empty is None:  # it sees all
        return products.softmax(-1)
    columns = torch.arange(length, device=keys.device)
    own = columns[length - query.shape[2] :, None]
    real = torch.ones_like(columns, dtype=torch.bool)[None, None]
    if empty is not None:
        real = (columns >= empty[:, None])[:, None]
    # What is empty sees itself, for a row of attention with nothing in it is NaN.
    seen = (real & (columns <= own)) | (columns == own)
    return products.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)


def window_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    empty: torch.Tensor | None,
    *,
    window: int,
    kernel: int,
) -> torch.Tensor:
    """Return what the last queries look at, smoothed over neighbours; their own entries are pinned.

        s_j = mean over R, and over |i - j| <= kernel // 2, of mean_w a_wi,   j < S - window

    Li et al., SnapKV, arXiv 2404.14469.

    Args:
        query: [B, H, W, d], at least `window` of them.
        keys: [B, G, S, d].
        values: [B, G, S, d].
        empty: [B] or None.
        window: Queries that look.
        kernel: Entries over which weights are averaged, odd; beyond the ends they are 0.
    """
    weights = attention(query[:, :, -window:], keys, empty)[..., :-window].mean(3)
    smooth = F.avg_pool1d(weights.flatten(1, 2), kernel, stride=1, padding=kernel // 2)
    scores = smooth.view(weights.shape).mean(2)
    return F.pad(scores, (0, window), value=torch.inf)


def last_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, empty: torch.Tensor | None
) -> torch.Tensor:
    """Return what the last query looks at, a mean over all heads, [B, 1, S].

    Oren et al., Transformers are Multi-State RNNs, arXiv 2401.06104.
    """
    return attention(query[:, :, -1:], keys, empty)[..., 0, :].mean((1, 2))[:, None]


def key_norms(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, empty: torch.Tensor | None
) -> torch.Tensor:
    """Return minus the L2 norm of each key: small ones are looked at.

    Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv
    2406.11430.
    """
    return -_exact(keys).norm(dim=-1)


def expected_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    empty: torch.Tensor | None,
    *,
    rotary: Any,
    sinks: int,
    future: int,
    covariance: bool,
    epsilon: float,
) -> torch.Tensor:
    """Return how much later queries are expected to look at each entry; first ones are pinned.

    With mean m and covariance C of a head's queries before their turn, and the mean M of the turns
    at the next positions:

        z_j = (M m) . k_j / sqrt(d) + k_j^T M C M^T k_j / (2 d)      log E[exp(q . k_j / sqrt(d))]
        s_j = (mean over R of softmax(z)_j + epsilon) |v_j|

    Devoto et al., Expected Attention, arXiv 2510.00636.

    Args:
        query: Of all columns, turned at their places, [B, H, S, d].
        keys: [B, G, S, d].
        values: [B, G, S, d].
        empty: [B] or None.
        rotary: The model's module that gives cosine and sine of positions.
        sinks: First entries, which are pinned and whose queries do not count.
        future: Next positions over which turns are averaged.
        covariance: Whether C counts.
        epsilon: Added before the norms of values count.
    """
    asked, length = _exact(query), query.shape[2]
    starts = query.new_zeros(len(query), dtype=torch.long) if empty is None else empty
    places = torch.arange(length, device=query.device) - starts[:, None]
    counted = places >= sinks
    mean, spread = _moments(_unturned(asked, *rotary(asked, places.clamp(min=0))), counted)
    ahead = (length - starts)[:, None] + torch.arange(future, device=query.device)
    cos, sin = (t.mean(1)[:, None, None] for t in rotary(asked, ahead))
    key = _exact(keys)
    back = key * cos - rotate_half(key * sin)  # M^T k
    mean, spread = (t.unflatten(1, (keys.shape[1], -1)) for t in (mean, spread))
    size = keys.shape[3]
    found = torch.einsum("bgrd,bgsd->bgrs", mean, back) / size**0.5
    if covariance:
        found = found + torch.einsum("bgsi,bgrij,bgsj->bgrs", back, spread, back) / (2 * size)
    weights = found.masked_fill(~counted[:, None, None], -torch.inf).softmax(-1).mean(2)
    scores = (weights + epsilon) * _exact(values).norm(dim=-1)
    return torch.where(counted[:, None], scores, torch.inf)


def _moments(x: torch.Tensor, counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean [B, H, d] and covariance [B, H, d, d] of the vectors [B, H, S, d] that count."""
    chosen = counted[:, None, :, None]
    number = chosen.sum(2).clamp(min=1)
    mean = (x * chosen).sum(2) / number
    around = (x - mean[:, :, None]) * chosen
    return mean, around.mT @ around / number[..., None]


def _unturned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return [B, H, S, d] before they were turned by angles [B, S, d]."""
    cos, sin = cos[:, None], sin[:, None]
    return (x * cos - rotate_half(x) * sin) / (cos**2 + sin**2)


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
