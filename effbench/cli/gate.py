"""What is read before two runs, each at one operating point, are held against each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from effbench.api import registry
from effbench.config.files import options
from effbench.report.flips import flips, flips_text
from effbench.report.gate.arms import arm
from effbench.report.gate.lacking import Measures
from effbench.report.gate.policy import policy_in
from effbench.report.gate.verdict import Judgement, judge
from effbench.results.records import Record, read
from effbench.results.store import Store, record_files
from effbench.util.errors import UserError, did_you_mean


def judgement_of(policy: Path, run: str, base: str, results: Path) -> Judgement:
    """Return what a policy says of a run.

    Args:
        policy: A file, or the name of one that comes with effbench.
        run: What is to be let through, as `gate.arms.arm` reads it.
        base: What it is held against.
        results: Folder of runs and records.

    Raises:
        UserError: For what cannot be read, and for what was not measured.
    """
    known = options("policy")
    own = known.get(str(policy))
    if own is None and not policy.suffix and not policy.exists():
        raise UserError(
            f"There is no policy {str(policy)!r}, and no file of that name.",
            did_you_mean(str(policy), known),
        )
    rules, folder = policy_in(own or policy), results / "records"
    sides = arm(run, folder), arm(base, folder)
    return judge(rules, *sides, measures(folder))


def flips_of(runs: Sequence[str], results: Path, most: int) -> str:
    """Return the items that changed sides between two runs.

    Args:
        runs: Two names, as `gate.arms.arm` reads them.
        results: Folder of runs and records.
        most: Items to show of each way.

    Raises:
        UserError: Unless there are two, with items in common that are right or wrong.
    """
    if len(runs) != 2:
        raise UserError("--flips is between two runs.", "For example: compare 3f2a 91bc --flips 5")
    first, second = (arm(ref, results / "records") for ref in runs)
    found = flips(first, second)
    return "\n\n".join(flips_text(f, first, second, Store(results), most) for f in found)


def measures(folder: Path) -> Measures:
    """Return what evaluators measure, as they say and as the records of a folder show."""
    classes = [registry.find("evaluators", name) for name in registry.names("evaluators")]
    known = frozenset(metric for cls in classes for metric in (cls.headline, *cls.gives) if metric)
    return Measures(lambda metric: evaluators_of(metric, folder), known)


def evaluators_of(metric: str, folder: Path) -> list[str]:
    """Return the evaluators that say that they give a metric, else the one that gave it to records.

    Args:
        metric: Its name.
        folder: Folder of the records.
    """
    known = {name: registry.find("evaluators", name) for name in registry.names("evaluators")}
    said = [name for name, cls in known.items() if metric in (cls.headline, *cls.gives)]
    return said or _seen(metric, folder)


def _seen(metric: str, folder: Path) -> list[str]:
    """Return the one evaluator that all records with a metric have in common, where there is."""
    named = f'"name":{json.dumps(metric)}'
    measured = (path for path in record_files(folder) if named in path.read_text("utf-8"))
    used = [_evaluators(read(path, outcomes=False)) for path in measured]
    shared = set.intersection(*used) if used else set()
    return [*shared] if len(shared) == 1 else []


def _evaluators(record: Record) -> set[str]:
    return {plugin["name"] for plugin in record.spec.get("evaluators") or ()}
