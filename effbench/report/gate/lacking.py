"""What a gate says of a metric that it cannot judge, and which command would measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from effbench.report.gate.arms import Arm
from effbench.report.gate.policy import Policy
from effbench.results.records import Metric
from effbench.util.errors import UserError, did_you_mean, nearest


@dataclass(frozen=True)
class Measures:
    """What evaluators measure."""

    evaluators_of: Callable[[str], Sequence[str]]
    """Returns the names of the evaluators that give a metric; none when it is not known."""
    known: frozenset[str] = frozenset()
    """Metrics that evaluators are known to give."""


NAME = "NAME"
"""Stands for an evaluator that is to be chosen."""


class Asked(NamedTuple):
    """Where a metric is looked for, or was measured; empty is anywhere."""

    task: str = ""
    split: str = ""
    phase: str = ""

    def __str__(self) -> str:
        named = ((" of ", self.task), (" on ", self.split), (" in phase ", self.phase))
        return "".join(word + name for word, name in named if name)

    def meant(self, there: Sequence[Metric]) -> str:
        """Return a hint at what is misspelled, among the places of some metrics."""
        for word, known in zip(self, zip(*map(_place, there), strict=True), strict=True):
            if word and word not in known and (close := nearest(word, filter(None, known))):
                return f"{did_you_mean(word, close)} "
        return ""


@dataclass(frozen=True)
class Sides:
    """The two arms of a gate, and what is known of what they lack."""

    policy: Policy
    run: Arm
    base: Arm
    measures: Measures

    @property
    def arms(self) -> tuple[Arm, Arm]:
        """The run and what it is held against."""
        return self.run, self.base

    def unmeasured(self, metric: str) -> UserError:
        """Return that one or both have no such metric, with the command that measures it."""
        lack = [arm for arm in self.arms if metric not in arm.names()]
        if self.run.group.keys == self.base.group.keys:
            lack = lack[:1]
        either = f"neither {self.run.ref} nor {self.base.ref} has it"
        nobody = f"Nobody measured {metric}: {either}."
        said = f"{lack[0].ref} has no {metric}." if len(lack) == 1 else nobody
        if self.measures.evaluators_of(metric):
            return UserError(said, "Measure it: " + "; ".join(map(self._command, lack)))
        if has := [arm.ref for arm in self.arms if metric in arm.names()]:
            return UserError(said, f"{has[0]} has it; no evaluator is known to give it.")
        theirs = {name for arm in self.arms for name in arm.names()}
        if close := nearest(metric, theirs) or nearest(metric, self.measures.known):
            return UserError(said, did_you_mean(metric, close))
        return UserError(said, f"No evaluator is known to give it. {did_you_mean(metric, theirs)}")

    def elsewhere(self, metric: str, where: Asked, arm: Arm) -> UserError:
        """Return that an arm has a metric, but not there, with the places where it has it."""
        has = [m for record in arm.records for m in record.metrics if m.name == metric]
        here = [m for m in has if m.point in ("", arm.point)]
        part = sorted({m.point for m in has})
        if not here:
            at = f"{arm.ref.partition('@')[0]}@{part[0]}"
            return UserError(
                f"{arm.ref} has no {metric} at this point.",
                f"It has it at {', '.join(part)}. Judge {at}, or measure it here.",
            )
        runs = [{_place(m) for m in record.metrics if m.name == metric} for record in arm.records]
        if less := [r.key[:8] for r, own in zip(arm.records, runs, strict=True) if not own]:
            hint = f"Measure it: {self._command(arm, less)}"
            return UserError(f"Not all seeds of {arm.ref} have {metric}.", hint)
        there = ", ".join(f"{metric}{place}" for place in dict.fromkeys(map(_place, here)))
        meant = where.meant(here)
        return UserError(f"{arm.ref} has no {metric}{where}.", f"{meant}It has {there}.")

    def _command(self, arm: Arm, keys: Sequence[str] = ()) -> str:
        """Return what measures all metrics of the policy on an arm, in one record."""
        own = keys or [record.key[:8] for record in arm.records]
        names = [*self.policy.metrics, *self.policy.limits]
        by = {metric: found for metric in names if (found := self._evaluators(metric))}
        wanted = [*dict.fromkeys(e[0] if len(e) == 1 else NAME for e in by.values())]
        evaluators = f"[{','.join(wanted)}]" if len(wanted) > 1 else "".join(wanted)
        several = "-m " if len(own) > 1 else ""
        left = [f"for {metric} {' or '.join(e)}" for metric, e in by.items() if len(e) > 1]
        which = f" ({NAME}: {', '.join(left)})" if left else ""
        return f"effbench eval {several}from={','.join(own)} evaluator={evaluators}{which}"

    def _evaluators(self, metric: str) -> Sequence[str]:
        """Return what gives a metric; where several do, the one that the arms have, if any."""
        names = self.measures.evaluators_of(metric)
        specs = [record.spec for arm in self.arms for record in arm.records]
        used = {plugin["name"] for spec in specs for plugin in spec.get("evaluators") or ()}
        return next(([name] for name in names if name in used), names)


def _place(metric: Metric) -> Asked:
    return Asked(metric.task, metric.split, metric.phase)
