"""How far coefficients of a perturbed loss may go below zero before it has several minima.

The proxy of a teacher is the minimiser over the simplex of a sum of functions of one p each:

    f(p) = p_t [ -log p + sum_m eps_m (1 - p)^m ]
    f''(p) = p_t / p^2 [ 1 + sum_m eps_m m (m - 1) p^2 (1 - p)^(m - 2) ]

Each f is convex, and the minimiser is the only one, if

    sum_m max(0, -eps_m) peak_m <= 1          peak_m = max_p m (m - 1) p^2 (1 - p)^(m - 2)

The peak is at p = 2 / m: 0, 2, 0.889, 0.750, 0.691 for m = 1 to 5. The condition is sufficient, not
necessary, and our choice: the paper (arXiv 2305.05010) has none. `LIMIT` stays below 1, so that no
curvature vanishes and Newton's method converges. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from effbench.util.errors import UserError

LIMIT = 0.95
"""Most that coefficients may use of the room."""


def peak(order: int) -> float:
    """Return the largest value of m (m - 1) p^2 (1 - p)^(m - 2) over p in [0, 1]."""
    if order < 2:
        return 0.0
    p = 2 / order
    return order * (order - 1) * p**2 * (1 - p) ** (order - 2)


def peaks(orders: int) -> list[float]:
    """Return the peaks of the orders from 1 on."""
    return [peak(order) for order in range(1, orders + 1)]


def used(coefficients: Sequence[float]) -> float:
    """Return the share of the room below zero that eps_1, eps_2, ... take: below 1 is convex."""
    room = zip(coefficients, peaks(len(coefficients)), strict=True)
    return sum(max(0.0, -eps) * top for eps, top in room)


def check(rows: Sequence[Sequence[float]] | None, groups: int | None) -> None:
    """Refuse coefficients of another shape, and those beyond the bound.

    Args:
        rows: A list for each group; None is not given.
        groups: How many there are; None is not known yet.

    Raises:
        UserError: Naming `method.eps`.
    """
    if rows is None:
        return
    if not rows or len({len(row) for row in rows}) > 1:
        raise UserError("method.eps is no list of equally long lists.", "Try [[0.5,-0.2]].")
    if groups and len(rows) != groups:
        raise UserError(
            f"method.eps has {len(rows)} lists for {groups} groups of classes.",
            "Give one list of coefficients for each group: see method.groups.",
        )
    for row in rows:
        if (share := used(row)) > LIMIT:
            raise UserError(
                f"method.eps={list(row)} goes too far below zero: the loss may have several minima "
                f"({share:.2f} of a room of {LIMIT}).",
                "Bring the negative ones of order 2 and above nearer to zero.",
            )
