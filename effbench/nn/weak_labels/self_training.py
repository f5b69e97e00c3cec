"""Learning from one's own predictions, sharpened.

Xie, Girshick and Farhadi, Unsupervised Deep Embedding for Clustering Analysis, ICML 2016 (the
targets); Meng et al., Weakly-Supervised Neural Text Classification, CIKM 2018 (for weak labels).
"""

from __future__ import annotations

import torch


def sharpened(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the targets q, [N, K]: q_ik = (p_ik^2 / f_k) / sum_k' (p_ik'^2 / f_k').

    f_k = sum_i p_ik, so that no class takes all; where f is uniform, no row of q has more entropy
    than that of p.
    """
    raised = probabilities.square() / probabilities.sum(0).clamp(min=1e-12)
    return raised / raised.sum(1, keepdim=True)


def divergence(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(q || p) of each row in nats, [N].

    Args:
        targets: q, [N, K].
        logits: Of p, [N, K].
    """
    gap = torch.log(targets.clamp(min=1e-12)) - logits.log_softmax(1)
    return (targets * gap).sum(1)
