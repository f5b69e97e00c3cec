"""Which entries of a layer's cache stay, by their scores."""

from __future__ import annotations

import torch

from effbench.nn.decode.importance import Score
from effbench.nn.decode.view import View


def evicted(
    score: Score,
    budget: int,
    query: torch.Tensor,
    view: View,
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """Return the keys and values that stay, [B, G, k, D], and how many columns of them are empty.

    Args:
        score: See `effbench.nn.decode.importance`.
        budget: k, less than S.
        query: Of the last W columns, [B, H, W, D].
        view: What is there, S columns.
    """
    keys, values, empty = view.keys, view.values, view.empty
    columns = best(score(query, keys, values, empty), budget, empty)
    if empty is not None:
        empty = (empty - (keys.shape[2] - budget)).clamp(min=0)
        empty = empty if empty.any() else None
    return (_taken(keys, columns), _taken(values, columns)), empty


def _taken(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return some columns [B, G or 1, k] of [B, G, S, D], as [B, G, k, D]."""
    rows, heads, length, width = states.shape
    begins = torch.arange(rows * heads, device=states.device).view(rows, heads, 1) * length
    places = (begins + columns).flatten()
    return states.reshape(-1, width).index_select(0, places).view(rows, heads, -1, width)


def best(scores: torch.Tensor, count: int, empty: torch.Tensor | None) -> torch.Tensor:
    """Return the columns of the largest scores, ascending, [B, G, count]; earlier ones of equals.

    Args:
        scores: [B, G, S].
        count: At most S.
        empty: Columns on the left with nothing in them, [B], which come last.
    """
    if empty is not None:
        columns = torch.arange(scores.shape[2], device=scores.device)
        nothing = (columns < empty[:, None])[:, None]
        scores = scores.masked_fill(nothing, -torch.inf)
    if count == scores.shape[2] - 1:  # as after each token; there is no need to sort
        worst = count - scores.flip(2).argmin(2, keepdim=True)
        columns = torch.arange(count, device=scores.device)
        return columns + (columns >= worst)
    order = scores.sort(dim=2, descending=True, stable=True).indices
    return order[..., :count].sort(dim=2).values
