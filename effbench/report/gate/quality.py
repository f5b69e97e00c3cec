"""Metrics of items at their margins: non-inferiority by the paired tests of a comparison.

A metric is kept when its run is shown not to be worse by the margin, and broken when it is shown to
be worse by more (each one-sided at 5 %, adjusted after Holm over the metrics of its tier). A
metric of no direction has to be equivalent: two one-sided tests (Schuirmann, 1987).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from effbench.report.comparison.contrast import Contrast, contrast
from effbench.report.gate.arms import Arm, Place
from effbench.report.gate.checks import Check, State
from effbench.report.gate.lacking import Asked, Sides
from effbench.report.gate.policy import Rule
from effbench.report.power import Wanted, estimate, items_needed, seeds_needed
from effbench.report.table import Value, readable
from effbench.results.records import Record
from effbench.stats import ALPHA, Equivalence, holm
from effbench.util.errors import UserError


@dataclass(frozen=True)
class Tested:
    """A metric of two arms on the same items."""

    metric: str
    rule: Rule
    place: Place
    run: Arm
    base: Arm
    contrast: Contrast
    unit: str

    @property
    def equivalence(self) -> Equivalence:
        """What the difference shows at the margin."""
        found = self.contrast.difference.equivalence
        assert found is not None
        return found

    @property
    def p(self) -> float:
        """p-value of being worse by the margin; of not being equivalent without a direction."""
        worse = self.equivalence.p_worse
        return self.equivalence.p if worse is None else worse

    @property
    def gap(self) -> float:
        """How far the difference is from the margin that it would break, in the metric's unit."""
        value, margin = self.contrast.difference.value, self.equivalence.margin
        sign = {"lower": 1, "higher": -1}.get(self.rule.better(self.metric))
        return abs(margin - (abs(value) if sign is None else sign * value))


def quality(sides: Sides) -> list[Check]:
    """Return what the items of both runs show of each metric of a policy.

    Args:
        sides: Policy and runs.

    Raises:
        UserError: When a metric was not measured, kept no items, has none in common, or no
            direction.
    """
    tests = [
        _test(metric, rule, place, sides.run, sides.base)
        for metric, rule in sides.policy.metrics.items()
        for place in _shared(metric, rule, sides)
    ]
    found: list[Check] = []
    for tier in ("must", "should"):
        found += _judged([t for t in tests if t.rule.tier == tier])
    return found


# -- which items -------------------------------------------------------------------------------


def _shared(metric: str, rule: Rule, sides: Sides) -> list[Place]:
    """Return where both kept the items of a metric, and the rule looks."""
    places = [[p for p in arm.places(metric) if _asked(p, rule)] for arm in sides.arms]
    for arm, there in zip(sides.arms, places, strict=True):
        if not there:
            raise _lacks(metric, rule, arm, sides)
    both = [place for place in places[0] if place in places[1]]
    if not both:
        had = zip(sides.arms, places, strict=True)
        raise UserError(
            f"{metric} has no items in common: "
            f"{', '.join(f'{arm.ref} has it{own[0]}' for arm, own in had)}.",
            "Evaluate both on the same data: effbench eval from=RUN dataset=NAME.",
        )
    return both


def _asked(place: Place, rule: Rule) -> bool:
    return rule.task in ("", place.task) and rule.split in ("", place.split)


def _lacks(metric: str, rule: Rule, arm: Arm, sides: Sides) -> UserError:
    """Return why an arm has no items of a metric, and what would give it some."""
    if any(metric not in side.names() for side in sides.arms):
        return sides.unmeasured(metric)
    kept = {o.metric for record in arm.records for o in record.outcomes}
    if metric in kept or not any(map(len, arm.values(metric))):
        return sides.elsewhere(metric, Asked(rule.task, rule.split), arm)
    return UserError(
        f"{arm.ref} kept no items of {metric}, so there is no test of it.",
        f"Put it under limits:, or test one of: {', '.join(sorted(kept)) or 'none is there'}.",
    )


# -- the tests ---------------------------------------------------------------------------------


def _test(metric: str, rule: Rule, place: Place, run: Arm, base: Arm) -> Tested:
    same = run.group.keys == base.group.keys
    a, b = run.side(metric, place, 0), base.side(metric, place, 0 if same else 1)
    if not a.same_items(b):
        sizes = " and ".join(f"{len(side.outcomes[0].values):,}" for side in (a, b))
        raise UserError(
            f"{run.ref} and {base.ref} did not see the same items of {metric}{place} ({sizes}).",
            "Evaluate both on the same rows: effbench compare shows how their specs differ.",
        )
    margin = rule.size(metric, float(b.values.mean()))
    unit = next((m.unit for own in run.values(metric) for m in own), "")
    found = contrast(a, b, margin, rule.better(metric))
    return Tested(metric, rule, place, run, base, found, unit)


def _judged(tests: Sequence[Tested]) -> list[Check]:
    """Return the checks of one tier, adjusted for each other."""
    kept = holm([t.p for t in tests])
    beyond = holm([t.equivalence.p_beyond for t in tests])
    return [
        _check(t, p, q, ALPHA / len(tests)) for t, p, q in zip(tests, kept, beyond, strict=True)
    ]


def _check(test: Tested, p: float, p_beyond: float, alpha: float) -> Check:
    state: State = "kept" if p <= ALPHA else "broken" if p_beyond <= ALPHA else "open"
    same, found = test.equivalence, test.contrast.difference
    sign = {"lower": "+", "higher": "-"}.get(test.rule.better(test.metric), "±")
    return Check(
        f"{test.metric}{test.place}",
        test.rule.tier,
        state,
        _mean(test, test.run),
        _mean(test, test.base),
        f"{sign}{readable(same.margin, test.unit)}",
        Value(found.value, "", same.low, same.high),
        found.n,
        test.contrast.covers,
        p,
        p_beyond,
        _settles(test, alpha) if state == "open" else "",
    )


def _mean(test: Tested, arm: Arm) -> Value:
    values = arm.side(test.metric, test.place, 0).values
    return Value(float(values.mean()), test.unit)


# -- what would settle it ----------------------------------------------------------------------


def _settles(test: Tested, alpha: float) -> str:
    """Return how many items or seeds would show on which side of the margin the difference is.

    The power is that of seeing the distance from the margin, one-sided, at the strictest level of
    Holm's procedure, should the difference stay as it is.
    """
    case = estimate(
        [_alone(test, r, arm) for arm in (test.run, test.base) for r in arm.records], test.metric
    )
    wanted, now = Wanted(alpha=2 * alpha), test.contrast.difference.n
    if test.gap == 0:
        return "the difference is the margin itself: no number of items tells"
    if test.contrast.covers != "items":
        seeds, have = seeds_needed(case, wanted, test.gap, now), len(test.run.records)
        if seeds is not None:
            return f"about {max(seeds, have + 1):,} seeds of each ({have} now)"
    items = items_needed(case, wanted, test.gap)
    if items is None:
        return "more items than can be had: the difference is too near the margin"
    more = " and more seeds" if test.contrast.covers != "items" else ""
    return f"about {max(items, now + 1):,} items ({now:,} now){more}"


def _alone(test: Tested, record: Record, arm: Arm) -> Record:
    """Return a record with the items of the test alone."""
    place = arm.records.index(record)
    return replace(record, outcomes=[arm.outcomes(test.metric, test.place)[place]])
