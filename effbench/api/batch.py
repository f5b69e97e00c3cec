"""Token batches: what they hold, and how examples are put into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from effbench.api.examples import IGNORED, Example
from effbench.util.lazy import torch


def make_batch(sequences: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> Batch:
    """Return `(ids, labels)` pairs as one batch [B, T], padded on the right."""
    width = max(len(ids) for ids, _ in sequences)
    return Batch(
        input_ids=_padded([ids for ids, _ in sequences], width, pad_token_id),
        attention_mask=_padded([[1] * len(ids) for ids, _ in sequences], width, 0),
        labels=_padded([labels for _, labels in sequences], width, -100),
        rows=list(range(len(sequences))),
    )


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Return all sequences of some examples as one batch, those of an example side by side.

    Columns of examples become [E, ...], those of sequences [B], those of tokens [B, T] with zeros
    on the padding.

    Raises:
        ValueError: When some have a column that others lack.
    """
    sequences = [s for e in examples for s in e.sequences]
    batch = make_batch([(s.ids, s.labels()) for s in sequences], pad_token_id)
    batch.rows = [i for i, e in enumerate(examples) for _ in e.sequences]
    batch.sizes = [len(e.sequences) for e in examples]
    width = batch.input_ids.shape[1]
    for name, values in _columns([s.columns for s in sequences]).items():
        of_tokens = isinstance(values[0], list)
        batch.columns[name] = _padded(values, width, 0) if of_tokens else torch.tensor(values)
    for name, values in _columns([e.columns for e in examples]).items():
        batch.columns[name] = torch.tensor(values)
    return batch


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of each column."""
    names = {name for row in rows for name in row}
    if any(names - row.keys() for row in rows):
        raise ValueError(f"not every row of a batch has the columns {', '.join(sorted(names))}")
    return {name: [row[name] for row in rows] for name in sorted(names)}


def _padded(rows: Sequence[list[Any]], width: int, filler: int) -> Any:
    return torch.tensor([r + [filler] * (width - len(r)) for r in rows])


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
    """Token batch of E examples, B sequences and T positions, padded on the right.

    `labels` are not shifted: position t holds the token that position t - 1 must predict, or -100.
    Mostly each example is one sequence; the sequences of one follow each other.
    """

    input_ids: torch.Tensor
    """[B, T] int64."""
    attention_mask: torch.Tensor
    """[B, T] int64, 1 for real tokens."""
    labels: torch.Tensor
    """[B, T] int64."""
    rows: list[int]
    """Index of each sequence's example in its split."""
    window_tokens: float = 0
    """Loss tokens in the whole accumulation window, over all processes: the loss denominator. Each
    counts with the weight of its row, where rows have any."""
    window_examples: float = 0
    """Examples in the whole accumulation window, with their weights: the denominator of a loss that
    has one value for each example."""
    sizes: list[int] = field(default_factory=list)
    """Sequences of each example; empty when each has one."""
    whole: int = 0
    """Sequences of the micro-batch that several processes share; 0 where this is all of it."""
    places: list[int] = field(default_factory=list)
    """Where this one's sequences stand among them."""
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """Further values by name: [E, ...] of examples, [B] of sequences, [B, T] of tokens."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            columns={name: column.to(device) for name, column in self.columns.items()},
        )

    @property
    def loss_tokens(self) -> int:
        """Positions that count in the loss (the first of a sequence predicts nothing)."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def weighted_tokens(self) -> float:
        """Loss tokens with the weights of their rows: what this batch is of `window_tokens`."""
        counted = (self.labels[:, 1:] != IGNORED).float()
        return self.loss_tokens if self.weights is None else float(self.weighed(counted).sum())

    def drawn(self, draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Return random numbers of each sequence, [B, ...].

        Processes that share a micro-batch draw for all of it, and so agree.

        Args:
            draw: Returns those of so many sequences.
        """
        return draw(self.whole)[self.places] if self.whole else draw(len(self.rows))

    @property
    def weights(self) -> torch.Tensor | None:
        """Weight of each sequence's row, [B]; None where the rows have none."""
        if "weight" not in self.columns:
            return None
        weight = self.columns["weight"]
        if not self.sizes:
            return weight
        return weight.repeat_interleave(torch.tensor(self.sizes, device=weight.device))

    @property
    def token_weights(self) -> torch.Tensor | None:
        """Weight of each loss token, [N], row by row; None where the rows have none."""
        weights = self.weights
        if weights is None:
            return None
        return weights[(self.labels[:, 1:] != IGNORED).nonzero()[:, 0]]

    def weighed(self, losses: torch.Tensor) -> torch.Tensor:
        """Return losses times the weight of their row, as the tokens in `window_tokens` count.

        Args:
            losses: Of all places, [B, T - 1], or of the loss tokens alone, [N].
        """
        weights = self.weights if losses.ndim > 1 else self.token_weights
        if weights is None:
            return losses
        return losses * (weights[:, None] if losses.ndim > 1 else weights)
