"""The plan of a table's cells: what somebody with the machines would need to run them."""

from __future__ import annotations

from effbench.config.compose import compose
from effbench.report.campaign import Campaign
from effbench.report.campaign_table import Form, paper_lines, with_lines
from effbench.report.table import Cell, Table, Value
from effbench.resources.planned import predicted

FITS = {True: "yes", False: "NO", None: "not known"}
HOUR = 3600


def planned(campaign: Campaign, form: Form = "terminal") -> str:
    """Return the peak of memory, the work and the least time of each cell, none of which has run.

    A command that goes on from a run before it is named and not planned, as there is no such run.

    Args:
        campaign: The cells.
        form: Of the text.

    Raises:
        UserError: When a command of an arm is none.
    """
    rows = [row for arm, steps in campaign.arms.items() for row in _rows(campaign, arm, *steps)]
    columns = ("cell", "memory", "FLOPs", "least hours", "machine", "fits")
    table = Table(f"{campaign.title} Planned at scale {campaign.scale}, not run.", columns, rows)
    seeds = len(campaign.seeds)
    lines = [
        f"Each cell once for {seeds} seed{'s' * (seeds != 1)}. Memory is the highest peak of a "
        "phase; the least time is that at the machine's peak. Modelled, not measured.",
        *_before(campaign),
        *paper_lines(campaign),
        f"Run it: {campaign.command}",
    ]
    return with_lines([table], lines, form)


def _before(campaign: Campaign) -> list[str]:
    """Return what has to run before the cells and is in none of them."""
    said = []
    if campaign.start:
        said.append(f"Not in it: the run of experiment={campaign.start}, which all go on from.")
    if campaign.tune:
        trials = len(campaign.tune.grid())
        said.append(f"Not in it: tuning, at least {trials} trials of each arm that trains.")
    return said


def _rows(campaign: Campaign, arm: str, first: str, *later: str) -> list[tuple[Cell, ...]]:
    """Return a row for the first command of an arm, and one for each that goes on from it."""
    stage, *words = first.split()
    job = compose(stage, [f"experiment={campaign.experiment}", *words])
    found, machine = predicted(job).prediction, job.runtime.machine
    work = found.flops + found.read_flops
    seconds = [s for s in (found.seconds, found.read_seconds) if s is not None]
    hours = sum(seconds) / HOUR if seconds else None
    flops = f"{work:.3g}" if work else "—"
    whole = (arm, Value(found.peak, "bytes"), flops, hours, machine.name, FITS[found.fits])
    return [whole, *((f"  then {step}", None, "—", None, "", "") for step in later)]
