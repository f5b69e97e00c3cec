"""What an evaluator is: a frozen dataclass of settings that turns a model into metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.lazy import torch
from effbench.methods.base import Batch, Method
from effbench.records import Metric, Outcomes

if TYPE_CHECKING:
    from effbench.datasets import Data


@dataclass
class Subject:
    """A model at one operating point, ready to be evaluated."""

    model: torch.nn.Module
    method: Method
    point: str
    data: Data
    device: torch.device
    seed: int
    pad_token_id: int
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    """Called with what is done, how many and of how many."""

    def batch(self, sequences: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """Return `(ids, labels)` pairs as one padded batch on the device."""
        return make_batch(sequences, self.pad_token_id).to(self.device)


@dataclass
class Result:
    """Metrics of one evaluator at one operating point, and the outcome of every item."""

    metrics: list[Metric] = field(default_factory=list)
    outcomes: list[Outcomes] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluator:
    """Base of all evaluators."""

    name: ClassVar[str] = ""
    """The name of its file and its config; set by the registry."""

    def run(self, subject: Subject) -> Result:
        """Return what was measured.

        Raises:
            UserError: When the evaluator does not apply to the data or the model.
        """
        raise NotImplementedError


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
