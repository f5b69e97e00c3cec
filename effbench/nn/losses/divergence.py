"""How far two models' next-token distributions lie apart, position by position.

p is the reference's distribution, q the model's, both softmax in float32 or more; all values are in
nats. With d = log q - log p, every term is computed from d alone, so that two equal models give
exact zeros:

    KL(p || q) = -sum p d        KL(q || p) = sum q d        m = (p + q) / 2
    JS = (KL(p || m) + KL(q || m)) / 2,   log(m / p) = log((1 + e^d) / 2),   0 <= JS <= ln 2
"""

from __future__ import annotations

import math

import torch

FIELDS = ("agreement", "kl", "reverse_kl", "js", "probability_loyalty", "logit_mse")
"""What is computed for each position."""

CHUNK = 128
"""Positions whose float32 distributions are held at once."""


def divergences(reference: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return the fields of each position, [N, 6] float64, in the order of `FIELDS`.

    Args:
        reference: Logits [N, V].
        model: Logits [N, V] of the same vocabulary.
    """
    dtype = torch.promote_types(reference.dtype, torch.float32)
    z_p, z_q = reference.to(dtype), model.to(dtype)
    log_p, log_q = z_p.log_softmax(-1), z_q.log_softmax(-1)
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
    mixed = (torch.expm1(-d.abs()) / 2).log1p_()  # log((1 + e^-|d|) / 2), exact at d = 0
    js = -((p * (d.relu() + mixed)).sum(-1) + (q * ((-d).relu() + mixed)).sum(-1)) / 2
    # What is true of the exact values is made true of the rounded ones.
    js = js.double().clamp(0, math.log(2))
    fields = [
        z_p.argmax(-1) == z_q.argmax(-1),
        -(p * d).sum(-1).clamp(max=0),
        (q * d).sum(-1).clamp(min=0),
        js,
        1 - js.sqrt(),
        (z_p - z_q).square().mean(-1),
    ]
    return torch.stack([f.double() for f in fields], dim=1)


def row_sums(reference: torch.Tensor, model: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of each field over a row's positions, and how many there are, [B, 7].

    Args:
        reference: Logits [B, T, V].
        model: Logits [B, T, V].
        labels: [B, T], not shifted; positions whose next label is -100 do not count.

    Returns:
        float64: the fields in the order of `FIELDS`, then the number of positions.
    """
    rows, places = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    sums = torch.zeros(len(labels), len(FIELDS) + 1, dtype=torch.float64, device=labels.device)
    for row, place in zip(rows.split(CHUNK), places.split(CHUNK), strict=True):
        found = divergences(reference[row, place], model[row, place])
        sums.index_add_(0, row, torch.nn.functional.pad(found, (0, 1), value=1.0))
    return sums
