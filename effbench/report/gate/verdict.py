"""One verdict over all metrics and limits of a policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from effbench.report.gate.arms import Arm
from effbench.report.gate.checks import Check
from effbench.report.gate.lacking import Measures, Sides
from effbench.report.gate.limits import resources
from effbench.report.gate.policy import Policy
from effbench.report.gate.quality import quality
from effbench.report.table import Cell, Table
from effbench.results.records import strict

Verdict = Literal["GO", "NO-GO", "INCONCLUSIVE"]
STATUS: dict[Verdict, int] = {"GO": 0, "NO-GO": 1, "INCONCLUSIVE": 3}
"""Exit status of each; 2 is that of a mistake in what was given, here as everywhere."""


@dataclass(frozen=True)
class Judgement:
    """What a policy says of a run."""

    run: str
    base: str
    checks: list[Check]

    @property
    def verdict(self) -> Verdict:
        """GO when all that must be kept is, NO-GO when some of it is shown not to be."""
        states = {check.state for check in self.checks if check.tier == "must"}
        if "broken" in states:
            return "NO-GO"
        return "INCONCLUSIVE" if "open" in states else "GO"

    def lines(self) -> list[str]:
        """Return what would settle what is open, and the verdict, in sentences."""
        lines = [
            f"{check.name} ({check.tier}) would be settled by {check.settles}."
            for check in self.checks
            if check.settles
        ]
        return [*lines, f"{self.verdict}: {self._why()}."]

    def _why(self) -> str:
        must = [check for check in self.checks if check.tier == "must"]
        state = {"GO": "kept", "NO-GO": "broken", "INCONCLUSIVE": "open"}[self.verdict]
        named = ", ".join(check.name for check in must if check.state == state)
        missed = [c.name for c in self.checks if c.tier == "should" and c.state == "broken"]
        also = f"; what should be kept and is not: {', '.join(missed)}" if missed else ""
        said = {"GO": "shown to be kept", "NO-GO": "not kept", "INCONCLUSIVE": "not shown yet"}
        return f"{said[self.verdict]}: {named}{also}"

    def table(self) -> Table:
        """Return a row for each check."""
        covers = " or ".join(sorted({check.covers for check in self.checks if check.covers}))
        notes = (
            f"Difference: run - against, mean over items, 90 % interval over {covers}.",
            "p not worse, p worse: of being worse by the margin, and of not being worse by more, "
            "one-sided, adjusted after Holm over the tier.",
        )
        title = f"{self.run} against {self.base}"
        return Table(title, COLUMNS, [_row(c) for c in self.checks], notes if covers else ())

    def json(self) -> str:
        """Return verdict and checks as JSON."""
        checks = [{**asdict(c), "finding": c.finding} for c in self.checks]
        for check in checks:
            for part in ("run", "base", "difference"):
                check[part] = check[part] and dict(zip(FIELDS, check[part], strict=True))
        head = {"verdict": self.verdict, "run": self.run, "against": self.base}
        whole = {**head, "checks": checks, "words": self.lines()}
        return json.dumps(strict(whole), indent=1, allow_nan=False) + "\n"


COLUMNS = (
    "metric",
    "tier",
    "run",
    "against",
    "difference",
    "allowed",
    "p not worse",
    "p worse",
    "finding",
)
FIELDS = ("value", "unit", "low", "high")


def judge(policy: Policy, run: Arm, base: Arm, measures: Measures) -> Judgement:
    """Return what a policy says of a run that is held against another one.

    Args:
        policy: Margins and limits.
        run: What is to be let through.
        base: What it is held against.
        measures: What would measure a metric that nobody measured.

    Raises:
        UserError: When something that the policy names was not measured, or not on the same items.
    """
    sides = Sides(policy, run, base, measures)
    return Judgement(run.ref, base.ref, _ordered([*quality(sides), *resources(sides)]))


def _ordered(checks: Sequence[Check]) -> list[Check]:
    return sorted(checks, key=lambda check: check.tier != "must")


def _row(check: Check) -> tuple[Cell, ...]:
    return (
        check.name,
        check.tier,
        check.run,
        check.base,
        check.difference,
        check.wanted,
        _p(check.p),
        _p(check.p_beyond),
        check.finding,
    )


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"
