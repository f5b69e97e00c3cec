"""Which rows a training step sees, and how they are cut into micro-batches with little padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch

from effbench.api.batch import Batch, collate
from effbench.api.examples import IGNORED, Example
from effbench.api.footprint import Pass
from effbench.util.errors import UserError

PASS_TOKENS = {"cpu": 128, "cuda": 256}
"""Tokens whose arithmetic takes about as long as one more pass over the weights does, by device."""


def rows_of_step(count: int, seed: int, step: int, size: int) -> list[int]:
    """Return the rows of a step: a function of the seed and the step alone, each row once an epoch.

    Args:
        count: Rows there are.
        seed: Of the run.
        step: From 0.
        size: Rows of one step.
    """
    rows = []
    for place in range(step * size, (step + 1) * size):
        epoch, offset = divmod(place, count)
        rows.append(_permutation(count, (seed * 1_000_003 + epoch) % 2**63)[offset])
    return rows


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int) -> list[int]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=draws).tolist()


def micro_batches(
    lengths: Sequence[int], most: int, pass_tokens: int, sizes: Sequence[int] = ()
) -> list[list[int]]:
    """Return the positions in groups that together take the least time.

    Rows of one group are padded to its longest; each group costs one more pass over the weights.
    The best cut of the rows in order of length is found by dynamic programming.

    Args:
        lengths: Tokens of each row's longest sequence.
        most: Rows that a group may have.
        pass_tokens: What a pass costs, in tokens.
        sizes: Sequences of each row; one where it is empty.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    before = [0, *accumulate(sizes[i] if sizes else 1 for i in order)]
    best: list[tuple[int, int]] = [(0, 0)]  # (cost, start of the last group) of the first n rows
    for end in range(1, len(order) + 1):
        choices = [
            (
                best[start][0]
                + (before[end] - before[start]) * lengths[order[start]]
                + pass_tokens,
                start,
            )
            for start in range(max(0, end - most), end)
        ]
        best.append(min(choices))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.insert(0, order[start:end])
        end = start
    return groups


def groups_of(rows: Sequence[Example], most: int, device: torch.device) -> list[list[int]]:
    """Return the positions of a step's rows, by micro-batch."""
    sizes = [len(r.sequences) for r in rows]
    return micro_batches([r.longest for r in rows], most, PASS_TOKENS.get(device.type, 128), sizes)


def parts_of(group: Sequence[int], processes: int) -> list[Sequence[int]]:
    """Return the part of each process in a micro-batch, as alike in length as rows in order allow.

    A process without a row of its own passes the longest one, which counts nothing then, so that
    all of them make the same passes.
    """
    return [group[rank::processes] or group[:1] for rank in range(processes)]


def passes_of(
    examples: Sequence[Example],
    steps: int,
    seed: int,
    size: int,
    most: int,
    device: torch.device,
    processes: int = 1,
) -> tuple[set[Pass], int]:
    """Return the micro-batches of the first steps, as far as memory depends on them.

    Args:
        examples: The training rows.
        steps: How many are looked at.
        seed: Of the run.
        size: Rows of one step.
        most: Rows that a micro-batch may have.
        device: Decides how they are dealt.
        processes: How many share each; what is returned is what one of them has.

    Returns:
        What they are, and how many a step has at the most.
    """
    found, many = set(), 1
    for step in range(steps):
        rows = [examples[i] for i in rows_of_step(len(examples), seed, step, size)]
        groups = groups_of(rows, most, device)
        many = max(many, len(groups))
        for part in (part for group in groups for part in parts_of(group, processes)):
            members = [rows[i] for i in part]
            sequences = sum(len(e.sequences) for e in members)
            longest = max(e.longest for e in members)
            found.add(Pass("train", sequences, longest, sum(e.loss_tokens for e in members)))
    return found, many


def window(
    examples: Sequence[Example],
    rows: Sequence[int],
    most: int,
    pad: int,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
) -> list[Batch]:
    """Return the micro-batches of one step; their losses add up to the mean over all its tokens.

    An example's sequences are never dealt into different micro-batches. Several processes have the
    same micro-batches, each a part of every one of them, so that draws for each agree.

    Args:
        examples: The training rows.
        rows: The rows of this step.
        most: Rows that a micro-batch may have.
        pad: Token that fills up.
        device: Where the batches go.
        rank: Which of the processes is asked for.
        processes: How many share each micro-batch.

    Raises:
        UserError: When no token of the step counts in the loss.
    """
    weights = [examples[i].columns.get("weight", 1) for i in rows]
    tokens = sum(w * examples[i].loss_tokens for w, i in zip(weights, rows, strict=True))
    if tokens == 0:
        raise UserError(
            "A whole accumulation window has no token to learn from.",
            "Raise dataset.max_length, or check the answers.",
        )
    batches = []
    for group in groups_of([examples[i] for i in rows], most, device):
        chosen = [rows[position] for position in group]
        places = parts_of(range(len(chosen)), processes)[rank]
        own = [chosen[place] for place in places]
        batch = collate([examples[i] for i in own], pad)
        batch.rows = [own[place] for place in batch.rows]
        if processes > 1:
            _share(batch, [len(examples[i].sequences) for i in chosen], places)
        if rank >= len(chosen):
            batch.labels.fill_(IGNORED)
        batch.window_tokens = tokens
        batch.window_examples = sum(weights)
        batches.append(batch.to(device))
    return batches


def _share(batch: Batch, sizes: Sequence[int], own: Sequence[int]) -> None:
    """Tell a batch which part it is of a micro-batch.

    Args:
        batch: Some of its examples.
        sizes: Sequences of each of all its examples.
        own: The places of the batch's examples among them.
    """
    before = [0, *accumulate(sizes)]
    batch.whole = before[-1]
    batch.places = [place for i in own for place in range(before[i], before[i + 1])]
