"""Per-token losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from effbench.nn.llama.head import IGNORED, has_plain_head
from effbench.nn.model_kinds.base import kind_of


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


def answer_nll(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Return what `token_nll` gives on a causal model's logits, with less work.

    The head is applied only to the positions that predict a counted token: in prompt/answer data
    most positions do not, and the head is a fifth of the work of a small model.

    Args:
        model: A model of transformers.
        input_ids: [B, T].
        attention_mask: [B, T].
        labels: [B, T], not shifted; -100 where a token does not count.

    Returns:
        [B, T - 1] float32, zero where the label is -100.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    causal: Any = model
    if not has_plain_head(causal):
        return token_nll(kind_of(causal).logits(causal, input_ids, attention_mask, labels), labels)
    decoder = getattr(causal, causal.base_model_prefix)
    return head_nll(causal, decoder(**inputs).last_hidden_state, labels)


class Readout(NamedTuple):
    """States of the positions that predict a counted token, and what makes logits of them."""

    states: torch.Tensor
    """[N, d] last hidden states, or [N, V] logits where the model's head is more than a product."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """[n, d] to logits [n, V]."""


def counted_readout(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
) -> Readout:
    """Return what the logits of the positions that count are made of, row by row; see `answer_nll`.

    Args:
        model: A model of transformers.
        input_ids: [B, T].
        attention_mask: [B, T].
        labels: [B, T], not shifted; -100 where a token does not count.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    counted = labels[:, 1:] != IGNORED
    causal: Any = model
    if not has_plain_head(causal):
        logits = kind_of(causal).logits(causal, input_ids, attention_mask, labels)
        return Readout(logits[:, :-1][counted], lambda logits: logits)
    decoder = getattr(causal, causal.base_model_prefix)
    states = decoder(**inputs).last_hidden_state[:, :-1][counted]
    return Readout(states, causal.get_output_embeddings())


def head_nll(model: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each predicted token from last hidden states.

    Args:
        model: Its head is applied to the positions that predict a counted token.
        hidden: [B, T, d], normed.
        labels: [B, T], not shifted; -100 where a token does not count.

    Returns:
        [B, T - 1] float32, zero where the label is -100.
    """
    causal: Any = model
    targets = labels[:, 1:]
    counted = targets != IGNORED
    logits = causal.get_output_embeddings()(hidden[:, :-1][counted])
    nll = torch.zeros(targets.shape, dtype=torch.float32, device=logits.device)
    nll[counted] = F.cross_entropy(logits.float(), targets[counted], reduction="none")
    return nll


def token_kl(
    teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return KL(teacher || student) at each position whose next token counts, in nats.

    Args:
        teacher: Logits [B, T, V].
        student: Logits [B, T, V].
        labels: [B, T], not shifted; -100 where a token does not count.
        temperature: What both logits are divided by.

    Returns:
        [N] float32, N the number of tokens that count.
    """
    counted = labels[:, 1:] != IGNORED
    log_p, log_q = (
        F.log_softmax(logits[:, :-1][counted].float() / temperature, dim=-1)
        for logits in (teacher, student)
    )
    return (log_p.exp() * (log_p - log_q)).sum(-1)
