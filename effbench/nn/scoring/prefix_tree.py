"""Log-likelihoods of continuations after contexts, the way multiple-choice benchmarks need them.

Two ways give the same scores. The padded one computes one row per request, through the method's own
`logits`. The other computes what requests share once: the tokens of all requests make a tree, a
row holds one or several branches of it under a mask that lets a token see its own past alone, and
a long prefix of many rows, such as the examples before a benchmark's questions, is a key/value
cache that all of them start from. The head is applied only where a continuation is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from effbench.api.footprint import HEAD_ROWS
from effbench.nn.llama.head import has_plain_head
from effbench.nn.llama.stack import keeps_states, slides
from effbench.nn.scoring.attention import in_pieces
from effbench.nn.scoring.finite import require_finite

ROW_TOKENS = 192
"""Tokens of a row; a longer one spends more on attention between branches that never meet."""

LARGEST_BRANCH = 1024
"""Tokens up to which requests with a common start stay in one row."""

LEAST_SHARED = 8
"""Tokens that two requests must have in common to be put side by side for their sake."""

LEAST_SAVING = 64
"""Tokens that a stem must save; computing it takes a pass of its own."""

DEEPEST = 64
"""Levels of common starts within common starts that are searched for stems."""


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


# -- one row per request ---------------------------------------------------------------------------


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
            out = logits(batch)[:, :-1]
            targets = batch.labels[:, 1:]
            counted = targets != -100
            picked, best = _at_targets(out[counted], targets[counted], lambda part: part)
        yield _summed(list(group), counted.nonzero()[:, 0].tolist(), picked, best)


# -- what is computed together -----------------------------------------------------------------


@dataclass
class Row:
    """One row of a batch: branches of the tree of tokens, one after the other."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Place of each token in its own sequence."""
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    """Runs of tokens that follow each other: start, end, and the token before the first; -1 when
    that is the last one of the stem, or none."""
    places: list[tuple[int, int, int]] = field(default_factory=list)
    """A token that predicts, the token predicted, and the request that asks for it."""


@dataclass(frozen=True)
class Branch:
    """Sorted inputs `first` to `last`, the latter excluded, that stand side by side in a row."""

    first: int
    last: int
    size: int
    """Different tokens, those of the stem left out."""


@dataclass(frozen=True)
class Group:
    """Rows that are computed together."""

    requests: tuple[int, ...]
    """The requests that they answer."""
    stem: tuple[int, ...]
    """Tokens that all rows start from; computed once for all groups with the same stem."""
    rows: tuple[tuple[Branch, ...], ...]
    width: int
    """Tokens of the longest row."""


class Plan:
    """Which requests are computed together, and what they share.

    Args:
        requests: All requests.
        batch_tokens: Largest batch in tokens, padding included, stem left out.
        row_tokens: Tokens of a row; a branch that needs more makes a longer one.
    """

    def __init__(
        self, requests: Sequence[Request], batch_tokens: int, row_tokens: int = ROW_TOKENS
    ) -> None:
        self.requests = requests
        self.batch_tokens = batch_tokens
        self.row_tokens = min(row_tokens, batch_tokens)
        asked: dict[tuple[int, ...], list[int]] = {}
        for index, r in enumerate(requests):
            asked.setdefault((*r.context, *r.continuation[:-1]), []).append(index)
        self.inputs = sorted(asked)
        """The distinct inputs; the last token of a request is predicted, and never read."""
        self.askers = [asked[i] for i in self.inputs]
        """The requests of each input."""
        self.shared = np.array([0, *(_common(a, b) for a, b in pairwise(self.inputs))])
        """Tokens that each input has in common with the one before it."""
        own = np.array([len(i) for i in self.inputs]) - self.shared
        self._total = np.concatenate([[0], own.cumsum()])
        self._before = np.array([min(len(requests[i].context) for i in a) - 1 for a in self.askers])
        self.groups = [g for run in self._runs() for g in self._grouped(*run)]

    def _size(self, first: int, last: int, stem: int) -> int:
        """Return how many different tokens some inputs have behind a common start."""
        behind = self._total[last] - self._total[first + 1]
        return int(len(self.inputs[first]) - stem + behind)

    # -- stems -------------------------------------------------------------------------------------

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield runs of inputs that cover all of them, each with the length of its stem."""
        done = 0
        for first, last, stem in self._stems(0, len(self.inputs))[1]:
            if done < first:
                yield done, first, 0
            yield first, last, stem
            done = last
        if done < len(self.inputs):
            yield done, len(self.inputs), 0

    def _stems(
        self, first: int, last: int, depth: int = 0
    ) -> tuple[int, list[tuple[int, int, int]]]:
        """Return the stems within a run of inputs that save most tokens, and how many they save.

        The inputs' common start is a stem, or there are stems among those that share still more.
        """
        if last - first < 2 or depth > DEEPEST:
            return 0, []
        inner = self.shared[first + 1 : last]
        common = int(inner.min())
        rows = -(-self._size(first, last, common) // self.row_tokens)
        if rows < 2:
            return 0, []
        stem = min(common, int(self._before[first:last].min()))  # what predicts is in the row
        cuts = [first, *(first + 1 + np.flatnonzero(inner == common)).tolist(), last]
        below = [self._stems(a, b, depth + 1) for a, b in pairwise(cuts)]
        saved = sum(saving for saving, _ in below)
        if (rows - 1) * stem >= max(saved, LEAST_SAVING):
            return (rows - 1) * stem, [(first, last, stem)]
        return saved, [run for _, runs in below for run in runs]

    # -- rows --------------------------------------------------------------------------------------

    def _branches(self, first: int, last: int, stem: int) -> Iterator[Branch]:
        """Yield inputs that share enough to stand side by side."""
        size = len(self.inputs[first]) - stem
        for k in range(first + 1, last):
            more = len(self.inputs[k]) - max(int(self.shared[k]), stem)
            if self.shared[k] - stem >= LEAST_SHARED and size + more <= LARGEST_BRANCH:
                size += more
                continue
            yield Branch(first, k, size)
            first, size = k, len(self.inputs[k]) - stem
        yield Branch(first, last, size)

    def _packed(self, branches: Sequence[Branch]) -> list[list[Branch]]:
        """Return branches in rows, longest row first: each goes where it leaves least room."""
        open_: dict[int, list[list[Branch]]] = {}
        rows: list[list[Branch]] = []
        for branch in sorted(branches, key=lambda b: (-b.size, b.first)):
            fits = (room for room in range(branch.size, self.row_tokens + 1) if open_.get(room))
            room = next(fits, 0)
            if room:
                row = open_[room].pop()
            else:
                row, room = [], max(self.row_tokens, branch.size)
                rows.append(row)
            row.append(branch)
            open_.setdefault(room - branch.size, []).append(row)
        return sorted(rows, key=lambda row: (-_width(row), row[0].first))

    def _grouped(self, first: int, last: int, stem: int) -> Iterator[Group]:
        rows: list[list[Branch]] = []
        prefix = self.inputs[first][:stem]
        for row in self._packed(list(self._branches(first, last, stem))):
            if rows and _width(rows[0]) * (len(rows) + 1) > self.batch_tokens:
                yield self._group(rows, prefix)
                rows = []
            rows.append(row)
        yield self._group(rows, prefix)

    def _group(self, rows: Sequence[Sequence[Branch]], stem: tuple[int, ...]) -> Group:
        inputs = [k for row in rows for branch in row for k in range(branch.first, branch.last)]
        asked = tuple(i for k in inputs for i in self.askers[k])
        return Group(asked, stem, tuple(tuple(row) for row in rows), _width(rows[0]))

    def of(self, requests: Iterable[Sequence[int]]) -> Iterator[Group]:
        """Yield the groups that answer these requests."""
        by_first = {group.requests[0]: group for group in self.groups}
        return (by_first[wanted[0]] for wanted in requests)

    def row(self, branches: Sequence[Branch], stem: int) -> Row:
        """Return the tokens of a row, and what they predict."""
        row = Row()
        for branch in branches:
            path: list[int] = []  # where the tokens behind the stem lie in the row
            for k in range(branch.first, branch.last):
                tokens = self.inputs[k]
                known = max(int(self.shared[k]), stem) if k > branch.first else stem
                del path[known - stem :]
                start = len(row.tokens)
                row.tokens += tokens[known:]
                row.positions += range(known, len(tokens))
                if len(row.tokens) > start:
                    row.segments.append((start, len(row.tokens), path[-1] if path else -1))
                path += range(start, len(row.tokens))
                for i in self.askers[k]:
                    request = self.requests[i]
                    before = len(request.context) - 1 - stem
                    row.places += [
                        (path[before + n], target, i)
                        for n, target in enumerate(request.continuation)
                    ]
        return row


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences start with in common."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


def _width(row: Sequence[Branch]) -> int:
    return sum(branch.size for branch in row)


def visible(row: Row, width: int) -> npt.NDArray[np.bool_]:
    """Return which token of a row sees which: itself and what came before it in its own sequence.

    Args:
        row: The row.
        width: Tokens of the padded row, W; padding sees itself.

    Returns:
        [W, W] bool.
    """
    seen = np.eye(width, dtype=bool)
    for start, end, parent in row.segments:
        if parent >= 0:
            seen[start:end] |= seen[parent]
        seen[start:end, start:end] |= np.tri(end - start, dtype=bool)
    return seen


# -- many branches per row -------------------------------------------------------------------------


def has_trees(model: Any) -> bool:
    """Whether a model takes a mask of our own and sees all that it shows.

    It has to be one whose logits are the head of its last hidden states, whose attention takes any
    mask, and none of whose layers sees a window only or keeps a state, which no mask divides.
    """
    config = model.config
    return (
        has_plain_head(model)
        and config._attn_implementation in ("sdpa", "eager")
        and not slides(config)
        and not keeps_states(model)
    )


def tree_scores(
    model: torch.nn.Module, plan: Plan, groups: Iterator[Group], device: torch.device
) -> Iterator[dict[int, Score]]:
    """Yield the scores of each group of requests.

    Args:
        model: A causal language model of transformers for which `has_trees` holds.
        plan: Of all requests.
        groups: Of the plan.
        device: Where the model is.

    Raises:
        UserError: When the model gives numbers that are not finite; it names the layer.
    """
    stem: tuple[int, ...] = ()
    cached: list[tuple[torch.Tensor, torch.Tensor]] = []
    for group in groups:
        with torch.inference_mode():
            if group.stem != stem:
                stem, cached = group.stem, _read(model, group.stem, device)
            scores = _group_scores(model, plan, group, cached, device)
        yield scores


def _read(
    model: Any, stem: Sequence[int], device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values of each layer after a prefix, [1, heads, P, d] each."""
    if not stem:
        return []
    cache = DynamicCache()
    decoder = getattr(model, model.base_model_prefix)
    decoder(input_ids=torch.tensor([stem], device=device), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr,misc]


def _group_scores(
    model: Any,
    plan: Plan,
    group: Group,
    cached: Sequence[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
) -> dict[int, Score]:
    inputs, asked = group_inputs(plan, group, model.dtype, device)
    decoder = getattr(model, model.base_model_prefix)

    def run() -> torch.Tensor:
        cache = _cache(cached, len(group.rows))
        with in_pieces(model, device):
            hidden: torch.Tensor = decoder(
                **inputs, past_key_values=cache, use_cache=cache is not None
            ).last_hidden_state
        return hidden

    return group_scores(model, group, asked, run(), run)


class Asked(NamedTuple):
    """What a group's requests ask for, one entry per predicted token."""

    at: torch.Tensor
    """Place in the batch [R, W], flattened, that predicts it."""
    targets: torch.Tensor
    """The token."""
    requests: list[int]
    """Whose it is."""


def group_inputs(
    plan: Plan, group: Group, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, torch.Tensor], Asked]:
    """Return the inputs of the decoder for a group, [R, W], and what is asked of its output."""
    stem, width = len(group.stem), group.width
    rows = [plan.row(branches, stem) for branches in group.rows]
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.full((len(rows), width), stem, dtype=np.int64)
    seen = np.ones((len(rows), 1, width, stem + width), dtype=bool)
    for r, row in enumerate(rows):
        tokens[r, : len(row.tokens)] = row.tokens
        positions[r, : len(row.tokens)] = row.positions
        seen[r, 0, :, stem:] = visible(row, width)
    inputs = {
        "input_ids": torch.from_numpy(tokens).to(device),
        "position_ids": torch.from_numpy(positions).to(device),
        "attention_mask": _additive(torch.from_numpy(seen).to(device), dtype),
    }
    places = [(r * width + at, to, i) for r, row in enumerate(rows) for at, to, i in row.places]
    at, targets, askers = (list(column) for column in zip(*places, strict=True))
    asked = Asked(torch.tensor(at, device=device), torch.tensor(targets, device=device), askers)
    return inputs, asked


def group_scores(
    model: Any,
    group: Group,
    asked: Asked,
    hidden: torch.Tensor,
    run: Callable[[], torch.Tensor],
) -> dict[int, Score]:
    """Return the scores of a group's requests from last hidden states [R, W, d].

    Args:
        model: Gives the head.
        group: The group.
        asked: Of `group_inputs`.
        hidden: What `run` gave.
        run: Repeats the pass, to find the layer at which numbers stop being finite.

    Raises:
        UserError: When they do.
    """
    head = model.get_output_embeddings()
    chosen = hidden.flatten(0, 1)[asked.at]
    require_finite(model, chosen, run)
    picked, best = _at_targets(chosen, asked.targets, head)
    require_finite(model, picked, lambda: head(run().flatten(0, 1)[asked.at]))
    order = {i: n for n, i in enumerate(group.requests)}
    return _summed(list(order), [order[i] for i in asked.requests], picked, best)


def _cache(cached: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: int) -> Any:
    """Return a cache in which every row has read the stem; adding to it leaves the stem alone."""
    if not cached:
        return None
    cache = DynamicCache()
    for index, (keys, values) in enumerate(cached):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
    return cache


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask to be added to attention scores, which every kind of attention takes."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


# -- from hidden states to scores ------------------------------------------------------------------


def _at_targets(
    states: torch.Tensor,
    targets: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each target, [N], and whether it is the most likely token.

    Args:
        states: [N, d], or logits.
        targets: [N] int64.
        head: Gives the logits of some states, [n, V].
    """
    picked, best = [], []
    for part, wanted in zip(states.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = head(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = logits.gather(-1, wanted[:, None])[:, 0]
        top = chosen == logits.amax(-1)
        if bool(top.any()):  # of equal ones the first is the most likely token
            top[top.clone()] = logits[top].argmax(-1) == wanted[top]
        # Not logsumexp, which is ten times slower where some exponentials are denormal.
        picked.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0])
        best.append(top)
    return torch.cat(picked), torch.cat(best)


def _summed(
    requests: Sequence[int], place: Sequence[int], picked: torch.Tensor, best: torch.Tensor
) -> dict[int, Score]:
    """Return each request's score; `place` says which request each token belongs to."""
    index = torch.tensor(place)
    sums = torch.zeros(len(requests), dtype=torch.float64)
    sums.index_add_(0, index, picked.double().cpu())
    misses = torch.zeros(len(requests)).index_add_(0, index, (~best).float().cpu())
    return {
        i: Score(total, miss == 0)
        for i, total, miss in zip(requests, sums.tolist(), misses.tolist(), strict=True)
    }
