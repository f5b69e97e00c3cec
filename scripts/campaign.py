"""Run a campaign: all arms with all seeds, then its table and plot.

A campaign is a file in scripts/campaigns: arms, each one command or a chain of them; the first arm
is the one compared with, at its first operating point, and with `points: same` in a second table at
each point of its own. What is finished is not run again, nor is an arm of one command whose
record came with the repository; a run that an earlier version made counts too, and this is said.
The keys of the runs go to results/campaigns/NAME.json, so that the table can be made again from the
records of a fresh clone.

    python scripts/campaign.py NAME ...           run, then make table and plot
    python scripts/campaign.py --tables           make the tables and plots of all that were run
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from effbench.api.keys import earlier_keys
from effbench.api.spec import Spec
from effbench.config.compose import compose
from effbench.report.comparison.compare import compare
from effbench.report.comparison.result import Comparison
from effbench.report.plots.curves import comparison_plot
from effbench.results.records import Record, read, read_all
from effbench.results.store import Store
from effbench.runner.local import execute
from effbench.util.errors import RunFailedError, UserError

HERE = Path(__file__).parent
RESULTS = Path("results")
TABLES = RESULTS / "tables"


@dataclass(frozen=True)
class Campaign:
    """What is run and compared."""

    name: str
    experiment: str
    seeds: list[int]
    arms: dict[str, list[str]]
    """Commands of each arm; each goes on from the one before it."""
    metrics: list[str]
    """What is drawn and shown first."""
    same_points: bool = False
    """Whether a second table holds each arm against the first one at the same points."""

    @classmethod
    def read(cls, name: str) -> Campaign:
        """Return the campaign of a file.

        Raises:
            UserError: When its `points` are neither left out nor `same`.
        """
        path = HERE / "campaigns" / f"{name}.yaml"
        values: dict[str, Any] = yaml.safe_load(path.read_text())
        words = values.get("words", {})
        if values.get("points", "same") != "same":
            raise UserError(
                f"{path.name} has points: {values['points']}, which is not known.",
                "Write points: same, or leave it out.",
            )
        arms = {
            arm: [step.format(**words) for step in steps] for arm, steps in values["arms"].items()
        }
        return cls(
            name,
            values.get("experiment", name),
            values["seeds"],
            arms,
            values.get("metrics", ["loss"]),
            "points" in values,
        )

    @property
    def manifest(self) -> Path:
        """Where the keys of its runs are."""
        return RESULTS / "campaigns" / f"{self.name}.json"

    def run(self) -> None:
        """Run what is not finished, seed by seed, and note every key at once."""
        keys: dict[str, list[str]] = {}
        for seed in self.seeds:
            for arm, steps in self.arms.items():
                key = self._chain(steps, seed)
                if key not in keys.setdefault(arm, []):
                    keys[arm].append(key)
        self.manifest.parent.mkdir(parents=True, exist_ok=True)
        self.manifest.write_text(json.dumps(keys, indent=1) + "\n")

    def _chain(self, steps: list[str], seed: int) -> str:
        key = ""
        for step in steps:
            stage, *words = step.split()
            start = [f"from={key}"] if key else []
            words = [*self._settings(stage, key), *start, *words]
            words += [] if stage == "eval" else [f"seed={seed}"]
            print(f"effbench {stage} {' '.join(words)}", flush=True)
            job = compose(stage, [*words, "run.progress=false", f"run.results={RESULTS}"])  # type: ignore[arg-type]
            key = self._done(job.spec, alone=len(steps) == 1) or execute(job).key
        return key

    def _done(self, spec: Spec, alone: bool) -> str:
        """Return the key under which a run is there, by an earlier version too; else nothing.

        Args:
            spec: The run.
            alone: Whether its record is enough, since nothing goes on from it.
        """
        store = Store(RESULTS)
        for key in (spec.key, *earlier_keys(spec)):
            record = store.records / f"{key}.json"
            if record.is_file() and (alone or store.run(key).finished):
                if key != spec.key:
                    said = json.dumps(read(record).spec["versions"] or "the first ones")
                    print(f"  there as {key}, with versions {said}", flush=True)
                return key
        return ""

    def _settings(self, stage: str, parent: str) -> list[str]:
        # A run that only reads out what was trained has its data from there.
        return [] if stage == "eval" and parent else [f"experiment={self.experiment}"]

    def records(self) -> dict[str, list[Record]]:
        """Return the records of each arm, from the keys that were noted."""
        keys: dict[str, list[str]] = json.loads(self.manifest.read_text())
        folder = RESULTS / "records"
        return {arm: [read(folder / f"{k}.json") for k in ks] for arm, ks in keys.items()}

    def tables(self) -> None:
        """Write its comparison as Markdown and CSV, and the plots."""
        arms = self.records()
        known = read_all(RESULTS / "records", outcomes=False)
        runs = [r for records in arms.values() for r in records]
        names = {"+".join(r.key for r in rs): arm for arm, rs in arms.items()}
        found = compare(runs, known, names=names)
        self._write(found, self.name, self.title())
        for metric in self.metrics:
            path = comparison_plot(found, metric, TABLES / f"{self.name}_{metric}.png")
            print(f"Plot: {path}")
        if self.same_points:
            found = compare(runs, known, names=names, same_points=True)
            about = f"[{self.name}]({self.name}.md), each arm against {next(iter(arms))} at the "
            self._write(found, f"{self.name}_points", f"{about}same operating point.")

    def _write(self, found: Comparison, name: str, about: str) -> None:
        TABLES.mkdir(parents=True, exist_ok=True)
        head = f"# {name}\n\n{about}\n\nMade by `make campaign-{self.slug}`.\n\n"
        (TABLES / f"{name}.md").write_text(head + found.markdown())
        (TABLES / f"{name}.csv").write_text(found.csv())
        print(f"Table: {TABLES / f'{name}.md'}")

    @property
    def slug(self) -> str:
        """Its name as make has it."""
        return self.name.replace("_", "-")

    def title(self) -> str:
        """Return the first line of its file, as a sentence or question."""
        text = (HERE / "campaigns" / f"{self.name}.yaml").read_text()
        first = text.splitlines()[0].removeprefix("# ")
        return first if first.endswith("?") else f"{first}."


def main() -> int:
    words = sys.argv[1:]
    again = words == ["--tables"]
    names = sorted(p.stem for p in (RESULTS / "campaigns").glob("*.json")) if again else words
    try:
        for campaign in map(Campaign.read, names):
            if not again:
                campaign.run()
            campaign.tables()
    except (UserError, RunFailedError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
