"""What `effbench gate` reads before it judges."""

from __future__ import annotations

from pathlib import Path

from effbench.api import registry
from effbench.config.files import options
from effbench.report.gate.arms import arm
from effbench.report.gate.policy import policy_in
from effbench.report.gate.verdict import Judgement, judge
from effbench.results.records import read_all


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
    known = read_all(folder, outcomes=False)
    sides = arm(run, folder, known), arm(base, folder, known)
    return judge(rules, sides[0], sides[1], lambda metric: evaluator_of(metric, folder))


def evaluator_of(metric: str, folder: Path) -> str:
    """Return the evaluator that a metric is the headline of, or that gave it to a record.

    Args:
        metric: Its name.
        folder: Folder of the records.
    """
    for name in registry.names("evaluators"):
        if registry.find("evaluators", name).headline == metric:
            return name
    kept = (o for record in read_all(folder) for o in record.outcomes)
    return next((o.evaluator for o in kept if o.metric == metric), "")
