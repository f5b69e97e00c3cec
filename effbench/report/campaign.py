"""A table of finished runs: arms with their seeds, and the records of each.

`results/campaigns/NAME.json` says which runs they were; from these records alone come the table,
its findings and what would overturn them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from effbench.report.claims import Claim, Verdict
from effbench.report.comparison.compare import compare
from effbench.report.comparison.result import Comparison
from effbench.report.facts import told_of
from effbench.report.scales import SCALES, Cells, Scale
from effbench.report.tuned import Tuned
from effbench.report.tuning import Tuning
from effbench.results.reader import Reader
from effbench.results.records import Record
from effbench.results.store import Store
from effbench.results.tunings import tuned_together
from effbench.util.errors import UserError, did_you_mean

AT = "@"
"""Between the name of a table and the scale of its cells."""


@dataclass(frozen=True)
class Campaign:
    """What is run and compared."""

    name: str
    title: str
    """The question, from the first line of the file."""
    seeds: list[int]
    arms: dict[str, list[str]]
    """Commands of each arm; each goes on from the one before it. The first arm is the one
    compared with."""
    experiment: str
    """Config of conf/experiment that all arms share."""
    metrics: list[str] = field(default_factory=lambda: ["loss"])
    """What is shown and drawn; the first one is tested in the short form."""
    points: Literal["", "same"] = ""
    """`same` for a second table that holds each arm against the first one at the same point."""
    paper: list[Claim] = field(default_factory=list)
    overturn: str = ""
    """What would overturn the finding, beside other seeds and items."""
    start: str = ""
    """Experiment whose run all arms go on from; it is made when it is missing."""
    tune: Tuning | None = None
    """What is tuned for each arm that trains and does not set it itself."""
    ceiling: str = ""
    """The most that the method can give, by arithmetic."""
    verdict: Verdict | None = None
    """What the records say of the paper's claim."""
    scale: Scale = "offline"
    """That of its arms."""
    scales: dict[Scale, Cells] = field(default_factory=dict)
    """Its cells at other scales."""

    def at(self, scale: str) -> Campaign:
        """Return its cells at a scale as a campaign of their own; itself for its own or none.

        Raises:
            UserError: When there is no such scale, or it has no cells there.
        """
        if scale in ("", self.scale):
            return self
        if scale not in SCALES:
            raise UserError(f"There is no scale {scale!r}.", did_you_mean(scale, SCALES))
        if scale not in self.scales:
            has = ", ".join([self.scale, *self.scales])
            raise UserError(f"{self.name} has no cells of scale {scale}.", f"It has: {has}.")
        cells = self.scales[scale]
        own = {
            f.name: value for f in fields(Cells) if (value := getattr(cells, f.name)) is not None
        }
        bare: dict[str, Any] = {"scales": {}, "verdict": None, "points": ""}
        return replace(self, name=f"{self.name}{AT}{scale}", scale=scale, **bare, **own)

    @property
    def command(self) -> str:
        """The command that makes what is missing of it."""
        name, _, scale = self.name.partition(AT)
        return f"effbench table {name}{f' --scale {scale}' if scale else ''} --run"

    def manifest(self, results: Path) -> Path:
        """Return where the keys of its runs are."""
        return results / "campaigns" / f"{self.name}.json"

    def records(
        self, results: Path, arms: Sequence[str] = (), reader: Reader | None = None
    ) -> dict[str, list[Record]]:
        """Return the records of each arm, from the keys that were noted.

        Args:
            results: Folder of runs and records.
            arms: Names of those that are wanted; none for all.
            reader: What has read some of them already.

        Raises:
            UserError: When one is missing, with the command that makes it.
        """
        of = (reader or Reader(results / "records")).of
        return {arm: [of(key) for key in own] for arm, own in self.keys(results, arms).items()}

    def keys(self, results: Path, arms: Sequence[str] = ()) -> dict[str, list[str]]:
        """Return the keys of the runs of each arm, whose records are there.

        Args:
            results: Folder of runs and records.
            arms: Names of those that are wanted; none for all.

        Raises:
            UserError: When one is missing, with the command that makes it.
        """
        path, again = self.manifest(results), f"Make it: {self.command}"
        if not path.is_file():
            raise UserError(f"The runs of {self.name} were not made here.", again)
        keys: dict[str, list[str]] = json.loads(path.read_text())
        folder, wanted = results / "records", arms or list(self.arms)
        for arm in wanted:
            gone = [key for key in keys.get(arm, []) if not (folder / f"{key}.json").is_file()]
            if gone or not keys.get(arm):
                said = f"Record {gone[0]} of {arm}" if gone else f"A run of {arm}"
                raise UserError(f"{said} is not here, for table {self.name}.", again)
        return {arm: keys[arm] for arm in wanted}

    def compared(
        self, results: Path, same_points: bool = False, metrics: Collection[str] = ()
    ) -> Comparison:
        """Return its arms side by side.

        Args:
            results: Folder of runs and records.
            same_points: Whether each arm is held against the first one at the same point.
            metrics: Names of those that are compared, without letters, which take longest; none
                for all of them.

        Raises:
            UserError: When a record is missing.
        """
        arms = self.records(results)
        names = {"+".join(r.key for r in rs): arm for arm, rs in arms.items()}
        runs = [record for records in arms.values() for record in records]
        tunings = tuned_together(results)
        known = told_of(runs, Store(results), tunings)
        return compare(
            runs,
            known,
            names=names,
            same_points=same_points,
            tunings=tunings,
            all_pairs=not metrics,
            metrics=metrics,
        )

    def tuned(self, results: Path) -> list[str]:
        """Return what was chosen by tuning and what that cost, in words; nothing without.

        Raises:
            UserError: When the trials or the record of one are missing.
        """
        return [self._tuned(self.tune, results).sentence()] if self.tune else []

    def tuned_arms(self, results: Path) -> dict[str, list[str]]:
        """Return the commands of each arm with the best words of its tuning.

        Raises:
            UserError: As `tuned`.
        """
        return self._tuned(self.tune, results).commands(self.arms) if self.tune else self.arms

    def _tuned(self, tuning: Tuning, results: Path) -> Tuned:
        return Tuned.read(tuning, results, self.name, f"Make it: {self.command}")
