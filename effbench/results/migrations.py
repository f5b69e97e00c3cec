"""What earlier versions of effbench wrote, in the form that this one reads."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from effbench.util.errors import NewerVersionError

Migration = Callable[[dict[str, Any]], dict[str, Any]]

SPECS: dict[int, Migration] = {}
"""From a number of `SPEC_VERSION`: a function that turns such a spec into one of the next number.
Not needed for a field that was added: `keys.completed` puts it in."""


def present_spec(values: Any) -> dict[str, Any]:
    """Return a plain spec as this version would have written it.

    Raises:
        NewerVersionError: When it has something that is not known here.
        ValueError: When it is no spec.
    """
    from effbench.api.keys import completed, refuse_unknown
    from effbench.api.spec import SPEC_VERSION, Spec

    if not isinstance(values, dict) or not isinstance(values.get("version"), int):
        raise ValueError("it is no spec")
    if values["version"] > SPEC_VERSION:
        raise NewerVersionError(f"its spec has form {values['version']}, known: {SPEC_VERSION}")
    values = migrated_spec(values)
    refuse_unknown(Spec, values)
    return completed(Spec, values)


def migrated_spec(values: dict[str, Any]) -> dict[str, Any]:
    """Return a plain spec in the present form."""
    from effbench.api.spec import SPEC_VERSION

    for number in range(values.get("version", SPEC_VERSION), SPEC_VERSION):
        values = SPECS[number](values)
    return values


# -- records -----------------------------------------------------------------------------------

FUSED = datetime(2026, 11, 24, 13, 30, 9, tzinfo=UTC)
"""When AdamW began to pass once over each weight: version 2 of training."""

UNFUSED = {
    "54cbf2dc749471ff1a472d849313361ef7f9b35b",
    "1af2317c9a78cd9fa233b0507cf156369e0191a3",
    "fe1b93e73f66a1de6a5d7dd86621896d32b79ca9",
}
"""Commits from before it with records; campaigns that ran on them ended later."""


def _with_versions(values: dict[str, Any]) -> dict[str, Any]:
    """Say which version of training a record has, from when and by which commit it was made.

    Its key stays: it is the one under which the run was started.
    """
    started = datetime.fromisoformat(values["started"])
    fused = started >= FUSED and values["environment"].get("commit") not in UNFUSED
    versions = {"train": 2} if fused and values["stage"] == "train" else {}
    return {**values, "schema": 3, "spec": {**values["spec"], "versions": versions}}


RECORDS: dict[int, Migration] = {
    1: lambda values: {**values, "schema": 2},  # 2 added `task` and `clusters`, empty by default
    2: _with_versions,
}
"""From a schema number: a function that turns such a record into one of the next number."""
