"""How many items and seeds it takes to see a difference: estimated from records, as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from effbench.report.comparison.seeds import Group, grouped
from effbench.report.table import Cell, Table, readable
from effbench.results.records import Outcomes, Record
from effbench.stats.base import ALPHA, Floats, binary, mean_of
from effbench.stats.power import MOST, least, mcnemar_power, paired_power, seeds_power, smallest
from effbench.util.errors import UserError, did_you_mean

STATED = "difference"
"""Metric of a case whose spread is stated, as no runs are named."""
POINTS = (0.5, 1.0, 2.0, 5.0)
"""Differences of a table about shares, in points, unless others are asked for."""
SPREADS = (0.02, 0.05, 0.1, 0.2)
"""Differences of other tables, over the standard deviation of the difference."""


@dataclass(frozen=True)
class Wanted:
    """What is asked."""

    differences: tuple[float, ...] = ()
    """In points for shares, else in the unit of the metric; empty takes usual ones."""
    items: int | None = None
    """Items there are."""
    seeds: int | None = None
    """Seeds there are of each method."""
    power: float = 0.8
    alpha: float = ALPHA


@dataclass(frozen=True)
class Case:
    """How much two methods and their seeds vary."""

    metric: str
    unit: str = ""
    discordance: float | None = None
    """Share of items that one run gets right and the other does not; None for other outcomes."""
    sd: float | None = None
    """Standard deviation over items of the difference; None for shares."""
    seed_sd: float | None = None
    """Standard deviation over seeds of a run's mean."""
    items: int | None = None
    """Items of the runs that it was estimated from."""
    grouping: float = 1.0
    """Items that tell as much as one independent item: above 1 where items come in groups."""
    sources: tuple[str, ...] = ()
    """Where the numbers come from, in sentences."""

    @property
    def difference(self) -> str:
        """What is looked for, in words."""
        return STATED if self.metric == STATED else f"{STATED} of {self.metric}"

    @property
    def shares(self) -> bool:
        """Whether outcomes are right or wrong, so that differences are in points."""
        return self.discordance is not None

    def override(self, discordance: float | None, sd: float | None, seed_sd: float | None) -> Case:
        """Return the case with what was stated in the place of what was estimated."""
        return replace(
            self,
            discordance=self.discordance if discordance is None else discordance,
            sd=self.sd if sd is None else sd,
            seed_sd=self.seed_sd if seed_sd is None else seed_sd,
        )

    def over_items(self, n: float, difference: float, alpha: float = ALPHA) -> float:
        """Return the power of one pair of runs on `n` items."""
        independent = max(2, int(n / self.grouping))
        if self.discordance is not None:
            discordance = max(self.discordance, abs(difference))
            return mcnemar_power(independent, discordance, difference, alpha)
        return paired_power(independent, self.sd or 0.0, difference, alpha)

    def over_seeds(self, seeds: int, n: float, difference: float, alpha: float = ALPHA) -> float:
        """Return the power of two groups of `seeds` runs each on `n` items, or on all there are."""
        spread = self.sd or 0.0
        if self.discordance is not None:
            spread = math.sqrt(max(self.discordance, abs(difference)) - difference**2)
        independent = max(2.0, n / self.grouping)
        return seeds_power(
            seeds, self.seed_sd or 0.0, difference, items=independent, sd=spread, alpha=alpha
        )


# -- where the numbers come from ---------------------------------------------------------------


def stated(
    accuracy: float | None, discordance: float | None, sd: float | None, seed_sd: float | None
) -> Case:
    """Return a case from stated numbers.

    Raises:
        UserError: When they do not say how much two runs differ.
    """
    if sd is not None and (discordance is not None or accuracy is not None):
        raise UserError(
            "--sd is for outcomes that are numbers, --accuracy and --discordance for right or "
            "wrong.",
            "Give one of the two.",
        )
    if sd is not None:
        return Case(STATED, sd=sd, seed_sd=seed_sd, sources=("Spread as stated.",))
    if discordance is not None:
        return Case("accuracy", discordance=discordance, seed_sd=seed_sd, sources=("As stated.",))
    if accuracy is not None:
        source = f"Accuracy {accuracy:g}. {_INDEPENDENT}"
        apart = 2 * accuracy * (1 - accuracy)
        return Case("accuracy", discordance=apart, seed_sd=seed_sd, sources=(source,))
    raise UserError(
        "How much two runs differ is not known.",
        "Give --from RUN RUN, --accuracy, --discordance or --sd.",
    )


_INDEPENDENT = (
    "Two runs are taken to answer independently of each other; runs that agree on most items need "
    "far fewer."
)


def estimate(
    records: Sequence[Record], metric: str, task: str = "", known: Sequence[Record] = ()
) -> Case:
    """Return a case from finished runs, each at its last operating point.

    Two runs (or groups of seeds) give the spread of their difference; one gives it as if another
    one answered independently; several seeds of one give that between seeds.

    Args:
        records: One run or more; the first two that differ in more than their seed are paired.
        metric: A metric whose outcomes they kept.
        task: Benchmark task; empty takes the first one.
        known: Runs that these may have gone on from.

    Raises:
        UserError: When they kept no such outcomes, or saw other items.
    """
    groups = grouped(records, known)
    found = [[_outcomes(r, metric, task) for r in g.records] for g in groups]
    first = found[0][0]
    for other in (o for group in found for o in group):
        if other.ids != first.ids or len(other.values) != len(first.values):
            raise UserError("The runs did not see the same items.", "Evaluate them on the same.")
    values = [np.array([o.values for o in group], dtype=np.float64) for group in found]
    change, source = _change(values, groups)
    clusters = first.clusters
    unit = next((m.unit for m in groups[0].records[0].metrics if m.name == metric), "")
    seed_sd, over = _seed_sd(values)
    right = all(binary(v) for v in values)
    items = len(first.values)
    spread = float(change.std(ddof=1)) if items > 1 else 0.0
    case = Case(metric, unit, seed_sd=seed_sd, items=items, sources=(source, *over))
    if clusters and spread:
        grouping = mean_of(change, clusters).variance * items / spread**2
        case = replace(case, grouping=max(1.0, grouping))
    if len(groups) == 1 and len(groups[0].records) == 1:
        spread *= math.sqrt(2)
    if right:
        return replace(case, discordance=_discordance(values))
    return replace(case, sd=spread)


def _discordance(values: Sequence[Floats]) -> float:
    """Return the share of items on which two runs differ; as if independent where one is given."""
    rows = [v[0] for v in values[:2]] if len(values) > 1 else list(values[0][:2])
    if len(rows) == 1:
        share = float(rows[0].mean())
        return 2 * share * (1 - share)
    return float((rows[0] != rows[1]).mean())


def _change(values: Sequence[Floats], groups: Sequence[Group]) -> tuple[Floats, str]:
    """Return the difference of two runs on each item, and which two they are."""
    n = values[0].shape[1]
    if len(values) > 1:
        names = f"{groups[0].label} and {groups[1].label}"
        return values[0][0] - values[1][0], f"From {names} on {n:,} items."
    if len(values[0]) > 1:
        source = f"From two seeds of {groups[0].label} on {n:,} items; two methods may differ more."
        return values[0][0] - values[0][1], source
    return values[0][0], f"From {groups[0].label} alone on {n:,} items. {_INDEPENDENT}"


def _seed_sd(values: Sequence[Floats]) -> tuple[float | None, tuple[str, ...]]:
    """Return the standard deviation over seeds, pooled over the groups that have several."""
    means = [v.mean(axis=1) for v in values if len(v) > 1]
    if not means:
        return None, ()
    df = sum(m.size - 1 for m in means)
    sd = math.sqrt(sum(float(((m - m.mean()) ** 2).sum()) for m in means) / df)
    runs = sum(m.size for m in means)
    few = ", a rough estimate" if df < 10 else ""
    return sd, (f"Spread over seeds from {runs} runs{few}.",)


def _outcomes(record: Record, metric: str, task: str) -> Outcomes:
    named = [o for o in record.outcomes if o.metric == metric]
    fits = [o for o in named if task in ("", o.task)]
    if not fits:
        known = {o.task for o in named} if named else {o.metric for o in record.outcomes}
        what = f"{metric} of {task}" if task else metric
        raise UserError(
            f"Run {record.key[:8]} kept no outcomes of {what}.",
            did_you_mean(task if named else metric, known),
        )
    return [o for o in fits if (o.task, o.split) == (fits[0].task, fits[0].split)][-1]


# -- the table ---------------------------------------------------------------------------------


def render(case: Case, wanted: Wanted, form: str = "text") -> str:
    """Return the answer for people.

    Args:
        case: How much the methods vary.
        wanted: What is asked.
        form: `text`, `md` or `csv`.
    """
    table = needed(case, wanted)
    if form == "csv":
        return table.csv()
    if form == "md":
        return table.markdown()
    return f"{table.title}\n\n{table.text()}"


def needed(case: Case, wanted: Wanted) -> Table:
    """Return what each difference takes, with what the numbers at hand can show below it."""
    items = wanted.items or case.items
    differences = wanted.differences or _usual(case)
    columns = [f"difference, {_unit(case)}" if _unit(case) else "difference", "items"]
    there = f" on {items:,} items" if items else ", all items"
    columns += [f"seeds{there}"] if case.seed_sd is not None else []
    rows: list[tuple[Cell, ...]] = []
    for difference in differences:
        inside = _inside(case, difference)
        count = items_needed(case, wanted, inside)
        row: list[Cell] = [f"{difference:g}", _count(count)]
        if case.seed_sd is not None:
            seeds = seeds_needed(case, wanted, inside, items or math.inf)
            row.append(_count(seeds, "too few items"))
        rows.append(tuple(row))
    title = f"To see a {case.difference} in {wanted.power:.0%} of cases"
    title += f", alpha {wanted.alpha:g}"
    return Table(title, tuple(columns), rows, tuple(_notes(case, wanted, items)))


def _notes(case: Case, wanted: Wanted, items: int | None) -> list[str]:
    notes = list(case.sources)
    if case.discordance is not None:
        notes.append(f"Items that only one run gets right: {case.discordance:.2%}.")
    if case.sd is not None:
        notes.append(f"Standard deviation of the difference over items: {readable(case.sd)}.")
    if case.grouping > 1:
        notes.append(f"Items come in groups: {case.grouping:.2f} tell as much as one alone.")
    if case.seed_sd is None:
        notes.append("Items are for one pair of runs, whose seeds are not in question.")
    else:
        scale = 100 if case.shares else 1
        notes.append(f"Standard deviation over seeds: {case.seed_sd * scale:.3g} {_unit(case)}.")
    if items:
        shown = smallest_difference(case, items, None, wanted)
        notes.append(f"{items:,} items show a difference of {_said(case, shown)}.")
        if case.seed_sd is not None:
            for count in [wanted.seeds] if wanted.seeds else [3, 5, 10]:
                shown = smallest_difference(case, items, count, wanted)
                notes.append(f"{items:,} items and {count} seeds each: {_said(case, shown)}.")
    return notes


def smallest_difference(
    case: Case, items: float, seeds: int | None, wanted: Wanted
) -> float | None:
    """Return the smallest difference that is seen, as a share or in the metric's unit.

    Args:
        case: How much the methods vary.
        items: Items there are.
        seeds: Seeds of each method; None for one pair of runs whose seeds are not in question.
        wanted: Power and alpha.
    """
    most = 1.0 if case.shares else 20 * ((case.sd or 0.0) + (case.seed_sd or 0.0))
    power = (
        partial(case.over_items, items, alpha=wanted.alpha)
        if seeds is None
        else partial(case.over_seeds, seeds, items, alpha=wanted.alpha)
    )
    return smallest(power, wanted.power, most)


def items_needed(case: Case, wanted: Wanted, difference: float) -> int | None:
    """Return the items that one pair of runs takes; None when more than `MOST`.

    Args:
        case: How much the methods vary.
        wanted: Power and alpha.
        difference: To be seen, as a share or in the metric's unit, above zero.
    """
    return least(lambda n: case.over_items(n, difference, wanted.alpha), wanted.power)


def seeds_needed(case: Case, wanted: Wanted, difference: float, items: float) -> int | None:
    """Return the seeds of each method that a difference takes; None when none make up for items.

    Args:
        case: How much the methods and their seeds vary.
        wanted: Power and alpha.
        difference: To be seen, as a share or in the metric's unit, above zero.
        items: Items there are.
    """
    if case.over_seeds(10_000, items, difference, wanted.alpha) < wanted.power:
        return None
    power = partial(case.over_seeds, n=items, difference=difference, alpha=wanted.alpha)
    return least(power, wanted.power)


def _usual(case: Case) -> tuple[float, ...]:
    if case.shares:
        return POINTS
    return tuple(float(f"{share * (case.sd or 1.0):.2g}") for share in SPREADS)


def _inside(case: Case, difference: float) -> float:
    """Return a difference as a share, or in the metric's unit; refuse what cannot be."""
    value = abs(difference) / 100 if case.shares else abs(difference)
    if not value > 0 or (case.shares and value > 1):
        raise UserError(
            f"A difference of {difference:g} cannot be looked for.",
            "Give a number above zero; for shares in points, up to 100.",
        )
    return value


def _unit(case: Case) -> str:
    return "points" if case.shares else case.unit


def _said(case: Case, difference: float | None) -> str:
    if difference is None:
        return "none that there can be"
    scale = 100 if case.shares else 1
    return f"{difference * scale:.3g} {_unit(case)} or more".replace("  ", " ")


def _count(count: int | None, none: str = f"more than {MOST:,}") -> str:
    return none if count is None else f"{count:,}"
