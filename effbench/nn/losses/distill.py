"""Distillation in three parts: outputs of blocks, distributions, most likely tokens.

    L_I = (1 / m) sum over m blocks of mean over features of (h_s - h_t)^2
    L_S = KL(softmax(s) || softmax(t)), or with the two exchanged
    L_H = -log softmax(s)[argmax t]

h are the outputs of a block's last layer [B, T, d], s and t the logits [B, T, V] of student and
teacher. Each term is a sum over the positions whose next token counts. Source: Rajabzadeh et al.,
EchoAtt, arXiv 2409.14595, whose L_I is a squared norm; the mean over features is ours, so that
its size does not depend on the width.

The teacher's logits are computed once, for both terms. The student's are made in float32 for a few
positions at a time, and again in the backward pass, so that they are never whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from effbench.api.objectives import CHUNK
from effbench.nn.llama.head import IGNORED
from effbench.nn.losses.self_distill import captured

Direction = Literal["student_teacher", "teacher_student"]
"""Whose distribution weighs the difference of the logarithms: KL(first || second)."""

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Terms:
    """The three terms, scalars: sums over the positions that count."""

    blocks: torch.Tensor
    """L_I."""
    soft: torch.Tensor
    """L_S, nats."""
    hard: torch.Tensor
    """L_H, nats."""


def three_terms(
    student: Any,
    teacher: Any,
    inputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    ends: Sequence[int],
    direction: Direction = "student_teacher",
    weights: torch.Tensor | None = None,
) -> Terms:
    """Return the terms of one batch; no gradient reaches the teacher.

    Args:
        student: A Llama-style causal language model.
        teacher: Another one of the same depth, width and vocabulary.
        inputs: `input_ids` and `attention_mask`, [B, T] each.
        labels: [B, T], not shifted; -100 where a token does not count.
        ends: The last layer of each block, counted from 0; without any L_I is 0.
        direction: Of the divergence.
        weights: Of each position that counts, [N]; None is 1.
    """
    counted = labels[:, 1:] != IGNORED
    with torch.no_grad(), captured(teacher) as wanted:
        target = teacher.model(**inputs, use_cache=False).last_hidden_state[:, :-1][counted]
        target = teacher.lm_head(target)
    with captured(student) as given:
        hidden = student.model(**inputs, use_cache=False).last_hidden_state[:, :-1][counted]
    soft, hard = logit_terms(student.lm_head, hidden, target, direction, weights=weights)
    pairs = [(given[i][:, :-1][counted], wanted[i][:, :-1][counted]) for i in ends]
    return Terms(block_term(pairs, hidden, weights), soft, hard)


def block_term(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    like: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return L_I, a sum over positions.

    Args:
        pairs: The student's and the teacher's output of each block, [N, d] each.
        like: Gives the device where there is no block.
        weights: Of each position, [N]; None is 1.
    """
    each = [(s.float() - t.float()).square().mean(-1) for s, t in pairs]
    errors = [own.sum() if weights is None else (weights * own).sum() for own in each]
    if not errors:
        return torch.zeros((), device=like.device)
    return torch.stack(errors).mean()


def logit_terms(
    head: Head,
    hidden: torch.Tensor,
    target: torch.Tensor,
    direction: Direction = "student_teacher",
    chunk: int = CHUNK,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return L_S and L_H, sums over positions in float32.

    Args:
        head: Gives the student's logits [n, V] of hidden states [n, d].
        hidden: The student's, [N, d].
        target: The teacher's logits, [N, V].
        direction: Of the divergence.
        chunk: Positions at a time.
        weights: Of each position, [N]; None is 1.
    """

    def piece(states: torch.Tensor, wanted: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
        return torch.stack(_terms(head(states), wanted, direction, *own))

    parts = (hidden, target) if weights is None else (hidden, target, weights)
    total = in_chunks(piece, *parts, chunk=chunk)
    return total[0], total[1]


def in_chunks(
    piece: Callable[..., torch.Tensor], *parts: torch.Tensor, chunk: int = CHUNK
) -> torch.Tensor:
    """Return the sum of what `piece` gives of a few rows at a time.

    Each is computed once more in the backward pass, so that nothing of it is kept.

    Args:
        piece: Takes as many tensors as there are parts.
        *parts: With N rows each.
        chunk: Rows at a time.
    """
    total = torch.zeros((), device=parts[0].device)
    for rows in zip(*(part.split(chunk) for part in parts), strict=True):
        found = checkpoint(piece, *rows, use_reentrant=False, preserve_rng_state=False)
        total = total + found
    return total


def _terms(
    logits: torch.Tensor,
    target: torch.Tensor,
    direction: Direction,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_s, log_t = logits.to(dtype).log_softmax(-1), target.to(dtype).log_softmax(-1)
    first, second = (log_s, log_t) if direction == "student_teacher" else (log_t, log_s)
    # F.kl_div(input, target) is KL(target || input).
    if weights is None:
        soft = F.kl_div(second, first, reduction="sum", log_target=True)
        return soft, F.nll_loss(log_s, target.argmax(-1), reduction="sum")
    each = F.kl_div(second, first, reduction="none", log_target=True).sum(-1)
    hard = F.nll_loss(log_s, target.argmax(-1), reduction="none")
    return (weights * each).sum(), (weights * hard).sum()
