"""Token batches: what they hold, and how rows are put into them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from effbench.util.lazy import torch


def make_batch(sequences: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> Batch:
    """Return `(ids, labels)` pairs as one batch [B, T], padded on the right."""
    width = max(len(ids) for ids, _ in sequences)

    def padded(rows: list[list[int]], filler: int) -> Any:
        return torch.tensor([r + [filler] * (width - len(r)) for r in rows])

    return Batch(
        input_ids=padded([ids for ids, _ in sequences], pad_token_id),
        attention_mask=padded([[1] * len(ids) for ids, _ in sequences], 0),
        labels=padded([labels for _, labels in sequences], -100),
        rows=list(range(len(sequences))),
    )


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield positions in groups of similar length, each at most `batch_tokens` when padded."""
    group: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if group and lengths[group[0]] * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(position)
    if group:
        yield group


@dataclass
class Batch:
    """Token batch of B sequences and T positions, padded on the right.

    `labels` are not shifted: position t holds the token that position t - 1 must predict, or -100.
    """

    input_ids: torch.Tensor
    """[B, T] int64."""
    attention_mask: torch.Tensor
    """[B, T] int64, 1 for real tokens."""
    labels: torch.Tensor
    """[B, T] int64."""
    rows: list[int]
    """Index of each sequence in its split."""
    window_tokens: int = 0
    """Loss tokens in the whole accumulation window, over all processes: the loss denominator."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
            self.rows,
            self.window_tokens,
        )

    @property
    def loss_tokens(self) -> int:
        """Positions that count in the loss (the first of a sequence predicts nothing)."""
        return int((self.labels[:, 1:] != -100).sum())
