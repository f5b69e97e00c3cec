"""Per-token losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORED = -100
"""Label of a position that does not count."""


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each predicted token, in nats.

    Args:
        logits: [B, T, V]; position t predicts token t + 1.
        labels: [B, T], not shifted; -100 where a token does not count.

    Returns:
        [B, T - 1] float32, zero where the label is -100.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORED
    nll = torch.zeros(targets.shape, dtype=torch.float32, device=logits.device)
    nll[counted] = F.cross_entropy(
        logits[:, :-1][counted].float(), targets[counted], reduction="none"
    )
    return nll
