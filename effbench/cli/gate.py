"""What is read before two runs, each at one operating point, are held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effbench.api import registry
from effbench.config.files import options
from effbench.report.flips import flips, flips_text
from effbench.report.gate.arms import arm
from effbench.report.gate.policy import policy_in
from effbench.report.gate.verdict import Judgement, judge
from effbench.results.records import read
from effbench.results.store import Store, record_files
from effbench.util.errors import UserError


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
    own = options("policy").get(str(policy))
    rules, folder = policy_in(own or policy), results / "records"
    sides = arm(run, folder), arm(base, folder)
    return judge(rules, sides[0], sides[1], lambda metric: evaluator_of(metric, folder))


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


def evaluator_of(metric: str, folder: Path) -> str:
    """Return the evaluator that a metric is the headline of, or that gave it to a record.

    Args:
        metric: Its name.
        folder: Folder of the records.
    """
    for name in registry.names("evaluators"):
        if registry.find("evaluators", name).headline == metric:
            return name
    measured = (read(path) for path in record_files(folder) if metric in path.read_text("utf-8"))
    kept = (o for record in measured for o in record.outcomes)
    return next((o.evaluator for o in kept if o.metric == metric), "")
