"""Resources at their limits: memory, bytes and speed, with the intervals that they were given."""

from __future__ import annotations

import math
from collections.abc import Sequence

from effbench.report.comparison.metric_table import Kind
from effbench.report.gate.arms import Arm
from effbench.report.gate.checks import Check, State
from effbench.report.gate.lacking import Asked, Sides
from effbench.report.gate.policy import HOLDS, Limit
from effbench.report.table import Value, readable
from effbench.results.records import Metric, Record
from effbench.util.errors import UserError

Found = dict[Kind, list[Metric]]


def resources(sides: Sides) -> list[Check]:
    """Return which limits of a policy a run keeps.

    A limit is kept when the whole interval of the value is within it, and broken when none of it
    is; a value without an interval is taken as it is, the mean over seeds with the widest one.

    Args:
        sides: Policy, the run, and what multiples are of.

    Raises:
        UserError: When a metric was not measured, or the limit is in another unit.
    """
    limits = sides.policy.limits.items()
    return [check for metric, limit in limits for check in _checks(metric, limit, sides)]


def _checks(metric: str, limit: Limit, sides: Sides) -> list[Check]:
    run, base = sides.arms
    own, other = (_measured(metric, limit, arm) for arm in sides.arms)
    relative = limit.parts(metric)[2] == "x"
    if not own:
        raise _lacks(metric, limit, run, sides)
    shared = [kind for kind in own if kind in other] if relative else [*own]
    if not shared:
        raise _lacks(metric, limit, base, sides)
    return [_check(kind, limit, (run, own[kind]), (base, other.get(kind, []))) for kind in shared]


def _measured(metric: str, limit: Limit, arm: Arm) -> Found:
    """Return the values that all runs of an arm have, by phase, task and how they were obtained."""
    found: Found = {}
    for m in (m for own in arm.values(metric) for m in own if limit.phase in ("", m.phase)):
        kind = Kind("", m.name, m.task, m.split, m.phase, m.obtained)
        found.setdefault(kind, []).append(m)
    return {kind: values for kind, values in found.items() if len(values) == len(arm.records)}


def _lacks(metric: str, limit: Limit, arm: Arm, sides: Sides) -> UserError:
    if metric not in arm.names():
        return sides.unmeasured(metric)
    return sides.elsewhere(metric, Asked(phase=limit.phase), arm)


def _check(
    kind: Kind, limit: Limit, run: tuple[Arm, list[Metric]], base: tuple[Arm, list[Metric]]
) -> Check:
    sign, number, unit = limit.parts(kind.metric)
    value, other = _mean(run[1]), _mean(base[1]) if base[1] else None
    held, bound, settles = value, number, ""
    if unit == "x":
        assert other is not None
        held = _ratio(value, other)
    else:
        bound = limit.bound(kind.metric, value.unit)
    state = _state(held, sign, bound)
    if unit == "x" and kind.obtained == "measured" and _machine(run[0]) != _machine(base[0]):
        state, settles = "open", "both measured on one machine: they were not"
    elif state == "open":
        settles = "more repeats, or a quieter machine: the interval holds the limit"
    shown = f"{sign} {number:g}x" if unit == "x" else f"{sign} {readable(bound, value.unit)}"
    return Check(str(kind), limit.tier, state, value, other, shown, settles=settles)


def _state(held: Value, sign: str, bound: float) -> State:
    ends = {held.value if end is None else end for end in (held.low, held.high)}
    within = {HOLDS[sign](end, bound) for end in ends}
    return "open" if len(within) > 1 else "kept" if within == {True} else "broken"


def _mean(metrics: Sequence[Metric]) -> Value:
    """Return the mean over runs, from the least lower to the highest upper end of theirs."""
    value = sum(m.value for m in metrics) / len(metrics)
    lows = [m.value if m.low is None else m.low for m in metrics]
    highs = [m.value if m.high is None else m.high for m in metrics]
    if min(lows) == max(highs):
        return Value(value, metrics[0].unit)
    return Value(value, metrics[0].unit, min(lows), max(highs))


def _ratio(a: Value, b: Value) -> Value:
    """Return a / b between the least and the most that it can be."""
    low, high = (b.value if end is None else end for end in (b.low, b.high))
    first, last = (a.value if end is None else end for end in (a.low, a.high))
    if not low > 0:
        return Value(math.nan, "", -math.inf, math.inf)
    return Value(a.value / b.value, "", first / high, last / low)


def _machine(arm: Arm) -> list[tuple[str, ...]]:
    return sorted({_hardware(record) for record in arm.records})


def _hardware(record: Record) -> tuple[str, ...]:
    """Return processor, threads and GPUs of a run, as far as its record says them."""
    known = record.environment
    return tuple(str(known.get(part)) for part in ("cpu", "threads", "gpus"))
