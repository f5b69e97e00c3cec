"""Who accepts and rejects rules.

In the paper people do. A run can replay their decisions (`recorded`); without people an oracle
stands in for them, which sees labels of the development half: they are part of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from effbench.api.schema import digest
from effbench.nn.weak_labels import rules as rule_files
from effbench.nn.weak_labels.rules import Rule
from effbench.util.errors import UserError

By = Literal["oracle", "noisy", "recorded", "all", "none"]


@dataclass(frozen=True)
class Judge:
    """Decides about candidates from their evidence."""

    by: By = "oracle"
    min_precision: float = 0.8
    """The oracle's least precision on the development half."""
    min_matches: int = 3
    """Its least matches there."""
    min_coverage: float = 0.001
    """Its least coverage of the unlabelled rows."""
    noise: float = 0.0
    """Probability that `noisy` says the opposite."""
    seed: int = 0
    """Of what is flipped."""
    path: Path | None = None
    """File of decisions, for `recorded`."""

    def decide(self, candidates: Sequence[Rule]) -> list[Rule]:
        """Return the candidates with the decisions about them, in order.

        Raises:
            UserError: When some wait for a decision; they are put into the file.
        """
        if self.by == "recorded":
            return self._recorded(candidates)
        return [replace(r, accepted=self._accepts(r), by=self.by) for r in candidates]

    def _accepts(self, rule: Rule) -> bool:
        if self.by in ("all", "none"):
            return self.by == "all"
        seen = rule.evidence
        good = (
            seen.precision >= self.min_precision
            and seen.matches >= self.min_matches
            and seen.coverage >= self.min_coverage
        )
        return good != (self.by == "noisy" and self._flips(rule))

    def _flips(self, rule: Rule) -> bool:
        """Whether this decision is one of the wrong ones; it follows from the rule alone."""
        return int(digest([self.seed, rule.id]), 16) / 16**16 < self.noise

    def _recorded(self, candidates: Sequence[Rule]) -> list[Rule]:
        assert self.path is not None
        known = {r.id: r for r in rule_files.read(self.path)}
        waiting = [r for r in candidates if r.id not in known or known[r.id].accepted is None]
        if waiting:
            rule_files.write(
                self.path, [*known.values(), *(r for r in waiting if r.id not in known)]
            )
            raise UserError(
                f"{len(waiting)} rules of round {waiting[0].round} wait for a decision.",
                f"Judge them: effbench judge {self.path}; then give the same command again.",
            )
        decided = (known[r.id] for r in candidates)
        return [
            replace(r, accepted=d.accepted, by=d.by or "recorded")
            for r, d in zip(candidates, decided, strict=True)
        ]
