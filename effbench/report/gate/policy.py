"""What a run must hold to be let through: margins of metrics, limits of resources, from YAML."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from effbench.api.schema import build
from effbench.report.labels import better
from effbench.stats import Better
from effbench.util.errors import UserError
from effbench.util.sizes import UNITS
from effbench.util.yamls import read

Tier = Literal["must", "should"]
"""Whether the verdict hangs on it, or it is only shown."""

HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
NUMBER = r"(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)"
MARGIN = re.compile(rf"\s*{NUMBER}\s*(%?)\s*")
LIMIT = re.compile(rf"\s*(<=|>=|<|>)\s*{NUMBER}\s*(\S*)\s*")


@dataclass(frozen=True)
class Rule:
    """How much worse a metric may be than that of the run it is held against."""

    margin: str | float
    """In the metric's unit, or in per cent of the other run's value (`1 %`)."""
    direction: Literal["", "higher", "lower", "either"] = ""
    """Which values are good; empty is what the metric's name says, `either` none: then it has to
    be equivalent."""
    tier: Tier = "must"
    task: str = ""
    """Benchmark task; empty takes all that both runs have."""
    split: str = ""
    """Split of the data; empty takes all that both runs have."""

    def better(self, metric: str) -> Better:
        """Return the good direction of a metric, empty for an equivalence.

        Raises:
            UserError: When neither the policy nor the name of the metric says it.
        """
        known: Better = better(metric)
        if self.direction == "either":
            return ""
        if not (self.direction or known):
            raise UserError(
                f"Whether more or less of {metric} is better is not known.",
                f"Say it in the policy: metrics.{metric}.direction: lower (higher, either).",
            )
        return self.direction or known

    def size(self, metric: str, base: float) -> float:
        """Return the margin in the metric's unit.

        Args:
            metric: Its name, for messages.
            base: Value of the run that the other one is held against.

        Raises:
            UserError: For what is no number above zero.
        """
        found = MARGIN.fullmatch(str(self.margin))
        share = abs(base) / 100 if found and found[2] else 1.0
        size = float(found[1]) * share if found else 0.0
        if not size > 0:
            against = f" of a value of {base:g}" if found and found[2] else ""
            raise UserError(
                f"metrics.{metric}.margin: {self.margin!r}{against} is no number above zero.",
                "For example: 0.01 (in the metric's unit), or 1 % (of the other run's value).",
            )
        return size


@dataclass(frozen=True)
class Limit:
    """A bound on a resource: an amount, or a multiple of the other run's."""

    limit: str
    """Such as `<= 2 GiB` or `>= 1.2x`."""
    tier: Tier = "must"
    phase: str = ""
    """Part of the run (train, decode); empty takes every one that measured it."""

    def parts(self, metric: str) -> tuple[str, float, str]:
        """Return comparison, number and unit.

        Raises:
            UserError: When the limit is of another form.
        """
        found = LIMIT.fullmatch(self.limit)
        if not found:
            raise UserError(
                f"limits.{metric}: {self.limit!r} is no limit.",
                'For example: "<= 2 GiB", or ">= 1.2x" of the run that it is held against.',
            )
        return found[1], float(found[2]), found[3]

    def bound(self, metric: str, unit: str) -> float:
        """Return an absolute bound in the unit of the metric.

        Raises:
            UserError: When the limit is in another unit.
        """
        _, number, said = self.parts(metric)
        if unit.startswith("bytes") and said.lower() in UNITS:
            return number * UNITS[said.lower()]
        if said not in ("", unit):
            known = "B, MiB, GiB, MB or GB" if unit.startswith("bytes") else unit or "no unit"
            raise UserError(f"limits.{metric} is in {said!r}.", f"It is measured in {known}.")
        return number


@dataclass(frozen=True)
class Policy:
    """All that a run must hold, and should."""

    metrics: dict[str, Rule] = field(default_factory=dict)
    limits: dict[str, Limit] = field(default_factory=dict)


def policy_in(path: Path) -> Policy:
    """Return the policy in a file.

    Raises:
        UserError: When it cannot be read, has unknown keys, or asks for nothing.
    """
    values = read(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys.", "Begin with metrics: or limits:.")
    whole = {**values}
    for part, key in (("metrics", "margin"), ("limits", "limit")):
        if isinstance(inner := values.get(part), dict):
            whole[part] = {str(name): _long(value, key) for name, value in inner.items()}
    found = build(Policy, whole, path.name, path.name)
    _check(found, path)
    return found


def _long(value: Any, key: str) -> Any:
    """Return what one metric has as a mapping; a margin or limit may stand alone."""
    return value if isinstance(value, dict) else {key: value}


def _check(policy: Policy, path: Path) -> None:
    """Refuse what no run could be judged by, before any run is read."""
    for metric, rule in policy.metrics.items():
        rule.size(metric, 1.0)
    for metric, limit in policy.limits.items():
        limit.parts(metric)
    parts: list[Rule | Limit] = [*policy.metrics.values(), *policy.limits.values()]
    if not any(part.tier == "must" for part in parts):
        raise UserError(
            f"{path} has no metric or limit that must be kept.", "Give one of them tier: must."
        )
