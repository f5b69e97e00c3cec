"""Adapters whose ranks follow from training: what a model is with them, before and after it."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from effbench.api.cost import cost_of
from effbench.api.parts import Adapter, Linear, Objective, low_rank
from effbench.api.shape import ModelShape

RANKS = "ranks.json"
"""File of an artefact: the rank of each layer by its qualified name."""
AVERAGE_BYTES = 8
"""Float32 bytes of the two running averages of each trained weight."""


def growing(
    base: ModelShape, names: Collection[str], rank: int, most: int, times: float
) -> ModelShape:
    """Return the frozen model with adapters that may grow.

    Args:
        base: Frozen.
        names: The adapted linears.
        rank: Of each adapter at first; activations and FLOPs are those of it.
        most: Highest rank of each.
        times: How many times their first size all adapters together may reach.
    """
    first, largest = (cost_of(base.low_rank(r, names), "float32").trainable for r in (rank, most))
    grown = min(int(first * times), largest) - first
    return replace(base.low_rank(rank, names), grown=grown)


def weighed(base: ModelShape, names: Collection[str], rank: int, *, orthogonal: bool) -> ModelShape:
    """Return the frozen model with adapters P diag(lambda) Q whose ranks are weighed.

    Two running averages of each trained weight are held, and the loss may have the products of P
    and of Q with itself.

    Args:
        base: Frozen.
        names: The adapted linears.
        rank: Of each adapter, before any is pruned.
        orthogonal: Whether the loss holds P and Q near to orthonormal ones.
    """
    adapted = base.adapted(
        lambda _, x: replace(low_rank(x.d_in, x.d_out, rank), scales=rank), names
    )
    sizes = sum(i + o for _, name, i, o in base.linears() if name in base.chosen(names))
    return replace(
        adapted,
        held_bytes=AVERAGE_BYTES * cost_of(adapted, "float32").trainable,
        objective=Objective(gradient_constant=6 * rank**2 * sizes if orthogonal else 0),
    )


def ranked(base: ModelShape, names: Collection[str], rank: int, folder: Path | None) -> ModelShape:
    """Return the frozen model with adapters of the ranks that an artefact states.

    Args:
        base: Frozen.
        names: The adapted linears.
        rank: Of those that the artefact does not name; of all where there is no artefact.
        folder: Of the artefact.
    """
    found = _ranks_in(folder)

    def stays(block: int, x: Linear) -> Adapter:
        ranks = found.get((block, x.name))
        return low_rank(x.d_in, x.d_out, ranks.pop(0) if ranks else rank)

    return base.adapted(stays, names)


def _ranks_in(folder: Path | None) -> dict[tuple[int, str], list[int]]:
    """Return the ranks that an artefact states, by block and linear; none without one.

    Linears of one name in a block, as GPT-2 has them, stand in the order they run.
    """
    if folder is None or not (folder / RANKS).is_file():
        return {}
    found: dict[tuple[int, str], list[int]] = {}
    for name, rank in json.loads((folder / RANKS).read_text()).items():
        parts = name.split(".")
        block = next(int(part) for part in parts if part.isdigit())
        found.setdefault((block, parts[-1]), []).append(rank)
    return found
