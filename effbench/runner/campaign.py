"""Run a campaign: all arms with all seeds, seed by seed.

What is finished is not run again, nor is an arm of one command whose record is there; a run that
an earlier version made counts too, and this is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from effbench.api.keys import earlier_keys
from effbench.api.spec import Spec
from effbench.config.compose import compose
from effbench.report.campaign import Campaign
from effbench.results.records import read
from effbench.results.store import Store
from effbench.runner.local import execute
from effbench.util.files import write_atomic

Say = Callable[[str], None]


def run(campaign: Campaign, results: Path, say: Say) -> None:
    """Run what is not finished, and note the key of every run.

    Args:
        campaign: What to run.
        results: Folder of runs and records.
        say: Told each command.

    Raises:
        RunFailedError: When a run failed or was interrupted; the same command goes on from there.
    """
    keys: dict[str, list[str]] = {}
    for seed in campaign.seeds:
        for arm, steps in campaign.arms.items():
            key = _chain(campaign, steps, seed, results, say)
            if key not in keys.setdefault(arm, []):
                keys[arm].append(key)
    path = campaign.manifest(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(keys, indent=1) + "\n")


def _chain(campaign: Campaign, steps: list[str], seed: int, results: Path, say: Say) -> str:
    key = ""
    for step in steps:
        stage, *words = step.split()
        start = [f"from={key}"] if key else []
        # A run that only reads out what was trained has its data from there.
        shared = [] if stage == "eval" and key else [f"experiment={campaign.experiment}"]
        words = [*shared, *start, *words, *([] if stage == "eval" else [f"seed={seed}"])]
        say(f"effbench {stage} {' '.join(words)}")
        job = compose(stage, [*words, "run.progress=false", f"run.results={results}"])
        key = done(job.spec, results, len(steps) == 1, say) or execute(job).key
    return key


def done(spec: Spec, results: Path, alone: bool, say: Say) -> str:
    """Return the key under which a run is there, by an earlier version too; else nothing.

    Args:
        spec: The run.
        results: Folder of runs and records.
        alone: Whether its record is enough, since nothing goes on from it.
        say: Told that an earlier version made it.
    """
    store = Store(results)
    for key in (spec.key, *earlier_keys(spec)):
        record = store.records / f"{key}.json"
        if record.is_file() and (alone or store.run(key).finished):
            if key != spec.key:
                said = json.dumps(read(record).spec["versions"] or "the first ones")
                say(f"  there as {key}, with versions {said}")
            return key
    return ""
