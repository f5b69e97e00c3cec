"""The scales at which a table can have cells.

| scale | model | what it can say |
|---|---|---|
| `mechanism` | some million parameters, pretrained here | whether the mechanism works |
| `offline` | SmolLM2-135M on two cores | directions, with their controls |
| `gpu` | SmolLM2-135M to convergence; cost at 7B shapes | sizes, on small models |
| `paper` | the paper's models and tokens | the claim itself |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from effbench.report.tuning import Tuning

Scale = Literal["mechanism", "offline", "gpu", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)


@dataclass(frozen=True)
class Cells:
    """The cells of a table at another scale than its own."""

    experiment: str
    """Config of conf/experiment that its arms share."""
    arms: dict[str, list[str]]
    """As those of the table."""
    seeds: list[int] = field(default_factory=lambda: [0])
    start: str | None = None
    """As that of the table, which it is where none is named; empty for none."""
    tune: Tuning | None = None
    """As that of the table, which it is where none is named."""
