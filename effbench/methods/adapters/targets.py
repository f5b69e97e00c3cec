"""Which linears of a model get an adapter, and which ranks they can have; what is refused."""

from __future__ import annotations

from collections.abc import Sequence

from effbench.api.shape import LINEARS, AnyShape
from effbench.util.errors import UserError, did_you_mean


def check_targets(targets: Sequence[str]) -> None:
    """Refuse no target at all.

    Raises:
        UserError: Naming `method.targets`.
    """
    if not targets:
        raise UserError("method.targets is empty.", f"Name some of: {', '.join(LINEARS)}.")


def targets_in(shape: AnyShape, targets: Sequence[str]) -> tuple[str, ...]:
    """Return the linears of a model that get an adapter: all of its own where all of Llama's are
    asked for.

    Raises:
        UserError: When it has not all of them, naming `method.targets` and those that there are.
    """
    names = shape.linear_names
    bare = [x.name for y in shape.layers for x in y.linears if x.bare and x.copies > 1]
    if bare and set(targets) == set(LINEARS):
        raise UserError(
            f"The experts of this model are single tensors ({bare[0]}), beside which no adapter "
            "can stand.",
            f"Say what gets one: method.targets=[{','.join(names)}]",
        )
    for target in (found := shape.chosen(targets)):
        if target not in names:
            raise UserError(
                f"method.targets names {target!r}, which is no linear layer of a decoder block.",
                did_you_mean(target, names),
            )
    return found


def check_ranks(key: str, ranks: Sequence[int], rank: int) -> None:
    """Refuse ranks that do not rise, or that go above `method.rank`.

    Raises:
        UserError: Naming `method.<key>`.
    """
    if list(ranks) != sorted(set(ranks)) or any(not 1 <= r <= rank for r in ranks):
        raise UserError(
            f"method.{key}={list(ranks)} is not possible with method.rank={rank}.",
            f"Give different ranks from 1 to {rank}, the lowest first.",
        )


def check_rank_fits(shape: AnyShape, rank: int, targets: Sequence[str], key: str = "rank") -> None:
    """Refuse a rank above what a target's weight itself can have.

    Raises:
        UserError: Naming `method.<key>` and the target.
    """
    for _, name, d_in, d_out in shape.linears():
        if name in targets and rank > min(d_in, d_out):
            raise UserError(
                f"method.{key}={rank} is more than {name} can have: it is {d_in} x {d_out}.",
                f"Set method.{key} to {min(d_in, d_out)} or less, "
                f"or leave {name} out of method.targets.",
            )
