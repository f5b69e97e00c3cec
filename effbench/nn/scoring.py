"""Log-likelihoods of continuations after contexts, the way multiple-choice benchmarks need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Request:
    """A continuation to be scored after a context, as tokens."""

    context: list[int]
    """At least one token."""
    continuation: list[int]
    """At least one token."""


@dataclass(frozen=True)
class Score:
    """What a model says of a continuation."""

    loglikelihood: float
    """Summed over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the most likely one at its place."""


def padded_scores(
    logits: Callable[[Any], torch.Tensor],
    batch_of: Callable[[Sequence[tuple[list[int], list[int]]]], Any],
    requests: Sequence[Request],
    groups: Iterator[Sequence[int]],
) -> Iterator[dict[int, Score]]:
    """Yield the scores of each group of requests, computed one padded row per request.

    Args:
        logits: Gives the logits of a batch, [B, T, V].
        batch_of: Makes a padded batch of `(ids, labels)` pairs.
        requests: All requests.
        groups: Indices of the requests that are computed together.
    """
    for group in groups:
        rows = [
            (r.context + r.continuation, [-100] * len(r.context) + r.continuation)
            for r in (requests[i] for i in group)
        ]
        batch = batch_of(rows)
        with torch.inference_mode():
            out = logits(batch)[:, :-1].float()
            targets = batch.labels[:, 1:]
            counted = targets != -100
            chosen = out[counted]
            picked = chosen.log_softmax(-1).gather(-1, targets[counted][:, None])[:, 0]
            matches = chosen.argmax(-1) == targets[counted]
            place = counted.nonzero()[:, 0]
            sums = torch.zeros(len(rows), dtype=torch.float64, device=out.device)
            sums.index_add_(0, place, picked.double())
            misses = torch.zeros(len(rows), device=out.device).index_add_(
                0, place, (~matches).float()
            )
        yield {
            i: Score(total, miss == 0)
            for i, total, miss in zip(group, sums.tolist(), misses.tolist(), strict=True)
        }
