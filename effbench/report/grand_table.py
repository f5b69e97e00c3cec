"""The grand table on one page: for a terminal, as Markdown, LaTeX or CSV, and its short form."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from effbench.report.campaign_table import Form, paper_lines, with_lines
from effbench.report.claims import State
from effbench.report.fitting import GUTTER
from effbench.report.grand import MISSING, Grand, Ground, Group, Row, System
from effbench.report.plots.canvas import Size
from effbench.report.plots.pareto import Place, pareto_plot
from effbench.report.table import Cell, Table, Value
from effbench.util.errors import UserError
from effbench.util.files import write_atomic

WIDTH = 80
LEAST = 12
"""Characters that a row's name has on one line of a terminal, if no more."""
INDENT = "  "
DENSE = "× dense"
"""Head of speeds over that of the dense model."""
BESIDE = (
    f"{DENSE}: speed of decoding over that of the dense model, timed in turn; their records say "
    "on which machine."
)
TRAINED = ("training tokens", "layer forwards")
MARK, END = "<!-- grand -->", "<!-- /grand -->"
"""Between which the README has the short form."""
STATES: tuple[State, ...] = (
    *("reproduced", "direction", "not reproduced", "cannot be tested here", "not run yet"),
)


def rendered(grand: Grand, form: Form = "terminal", full: bool = False) -> str:
    """Return the grand table.

    Args:
        grand: What was gathered.
        form: Of the text.
        full: Whether a terminal shows the claims, and why each verdict is what it is.
    """
    if form == "csv":
        return flat(grand).csv()
    lines = sentences(grand)
    if form == "terminal":
        title = textwrap.fill(grand.title, WIDTH)
        parts = [title, *map(_narrow, grand.groups), _systems(grand.systems, form).text()]
        claims = [line for s in grand.systems for line in claims_of(s)] if full else []
        said = [textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in (*claims, *lines)]
        return "\n\n".join([*parts, "\n".join(said)]) + "\n"
    tables = [*map(_wide, grand.groups), _systems(grand.systems, form)]
    if form == "latex":
        lines = [*(line for s in grand.systems for line in claims_of(s)), *lines]
    return with_lines(tables, lines, form)


def write_grand(grand: Grand, results: Path) -> list[Path]:
    """Write the grand table as Markdown, CSV and LaTeX, and a Pareto plot; return the files."""
    stem = results / "tables" / grand.name
    head = f"# {grand.name}\n\n{grand.title}\n\nMade by `make tables`.\n\n"
    texts = {
        ".md": head + rendered(grand, "markdown"),
        ".csv": rendered(grand, "csv"),
        ".tex": rendered(grand, "latex"),
    }
    for suffix, text in texts.items():
        write_atomic(stem.with_suffix(suffix), text)
    plot = pareto(grand, stem.with_name(f"{grand.name}_pareto.png"))
    return [*(stem.with_suffix(suffix) for suffix in texts), plot]


def pareto(grand: Grand, path: Path, size: Size = "screen") -> Path:
    """Draw the rows of the largest group over the bytes of their weights.

    Args:
        grand: What was gathered.
        path: File to write: PNG, PDF or SVG.
        size: Of the picture.

    Raises:
        UserError: When there is nothing to draw, or the file is no picture.
    """
    if not grand.groups:
        raise UserError("No rows of its tables are here.", "Make some: effbench table NAME --run")
    group = grand.groups[0]
    places = [
        Place(row.name, row.table, row.weight_bytes, row.difference)
        if row.difference
        else Place(row.name, row.name, row.weight_bytes, Value(0.0))  # what others are held against
        for row in group.rows
        if row.weight_bytes
    ]
    title = f"Against {group.rows[0].name} ({group.rows[0].value.unit}); dashed: the Pareto front"
    return pareto_plot(places, title, str(group.ground), path, size)


def in_readme(text: str, grand: Grand) -> str:
    """Return a page with the short form of the table between its marks.

    Raises:
        UserError: When the marks are not there.
    """
    head, mark, rest = text.partition(MARK)
    _, end, tail = rest.partition(END)
    if not end:
        raise UserError("The page has no place for the table.", f"Write {MARK} and {END} into it.")
    return f"{head}{mark}\n{short(grand).markdown()}{end}{tail}"


def short(grand: Grand) -> Table:
    """Return one row for each system: its first pair of rows, at which scale, and its verdict."""
    rows: list[tuple[Cell, ...]] = [
        (s.campaign.name, *_pair(s), s.ours, s.state) for s in grand.systems
    ]
    columns = ("system", "what was held against what", "difference", "scale", "verdict")
    return Table("", columns, rows)


def _pair(system: System) -> tuple[str, str]:
    verdict = system.campaign.verdict
    assert verdict
    if not system.found:
        return f"`{verdict.bench}`" if verdict.bench else "", ""
    first = system.found[0]
    unit = "" if first.difference.unit.startswith("bytes") else first.difference.unit
    said = f"{first.difference} {unit}".rstrip()
    return f"{first.pair.row} against {first.pair.against}", said


# -- rows --------------------------------------------------------------------------------------


def _wide(group: Group) -> Table:
    """Return a group with all its columns."""
    rows: list[tuple[Cell, ...]] = [
        (
            *(row.table, row.name, row.seeds),
            *(row.value._replace(unit=""), row.difference, row.letters),
            *(_bytes(row), row.flops_per_token, row.tokens_per_second, row.speedup),
            *(row.train_tokens, row.train_layer_forwards),
        )
        for row in group.rows
    ]
    unit = group.rows[0].value.unit
    head = f"{group.ground.metric} ({unit})" if unit else group.ground.metric
    columns = ("table", "row", "seeds", head, "difference", "letters")
    cost = ("weight bytes", "FLOPs/token", "tokens/s", f"tokens/s, {DENSE}", *TRAINED)
    return Table(str(group.ground), (*columns, *cost), rows, _notes(group))


def _narrow(group: Group) -> str:
    """Return a group in the columns of a terminal: names go on below, and empty columns go."""
    columns = {"": [row.letters for row in group.rows], **_costs(group)}
    heads = ("difference", *columns)
    cells = [
        (row.difference, *own)
        for row, own in zip(group.rows, zip(*columns.values(), strict=True), strict=True)
    ]
    taken = max(map(len, Table("", heads, cells).text().splitlines()))
    room = max(LEAST, WIDTH - taken - len(GUTTER) - len(INDENT))
    names = [textwrap.wrap(row.name, room, break_on_hyphens=False) for row in group.rows]
    rows = [(f"{INDENT}{name[0]}", *own) for name, own in zip(names, cells, strict=True)]
    head, rule, *lines = Table("", ("row", *heads), rows).text().splitlines()
    told, table = [], ""
    for line, name, row in zip(lines, names, group.rows, strict=True):
        told += [row.table] if row.table != table else []
        told += [line, *(f"{INDENT}{INDENT}{more}" for more in name[1:])]
        table = row.table
    notes = [textwrap.fill(note, WIDTH) for note in _notes(group)]
    return "\n".join([textwrap.fill(str(group.ground), WIDTH), "", head, rule, *told, *notes])


def _costs(group: Group) -> dict[str, list[Cell]]:
    """Return the columns of costs that any row has, speeds without intervals."""
    rows = group.rows
    found: dict[str, list[Cell]] = {
        "bytes": [_bytes(row) for row in rows],
        "tok/s": [row.tokens_per_second for row in rows],
        DENSE: [f"{row.speedup.value:.2f}" if row.speedup else None for row in rows],
        "trained": [row.train_tokens for row in rows],
    }
    return {head: column for head, column in found.items() if any(column)}


def _notes(group: Group) -> tuple[str, ...]:
    first = group.rows[0]
    unit = f"{first.value.unit} " if first.value.unit else ""
    return (
        f"Difference: {unit}against {first.name}, 95 % intervals; a shared letter: not told apart.",
        *([BESIDE] if any(row.speedup for row in group.rows) else []),
        *group.versions,
    )


def _not_timed(grand: Grand) -> list[str]:
    """Return how rows without a decoding speed get one; nothing where all have it."""
    rows = [row for group in grand.groups for row in group.rows]
    lacking = sum(not (row.tokens_per_second or row.speedup) for row in rows)
    if not lacking:
        return []
    said = "No row has" if lacking == len(rows) else f"{lacking} of {len(rows)} rows have no"
    return [
        f"{said} tokens/s, as no record times their decoding at one batch size and length; an idle "
        "machine measures it: "
        "effbench eval from=KEY evaluator=speed, a shared one what it is over the dense model's: "
        "evaluator.speed.baseline=dense"
    ]


def _bytes(row: Row) -> Value | None:
    return None if row.weight_bytes is None else Value(row.weight_bytes, "bytes")


# -- systems -----------------------------------------------------------------------------------


def _systems(systems: Sequence[System], form: Form) -> Table:
    """Return what became of the claims; Markdown adds what was claimed, the ceiling and why.

    In a terminal the paper's scale has the room that is left of a line.
    """
    own = [(s.campaign.name, s.state, s.ours) for s in systems]
    if form == "markdown":
        columns = ("system", "verdict", "ours", "the paper's claim", "ceiling", "why")
        rows = [(*cells, _claims(s), *_why(s)) for cells, s in zip(own, systems, strict=True)]
        return Table("Claims", columns, [*rows])
    scales = [_scale(s) for s in systems]
    if form == "terminal":
        taken = sum(max(map(len, column)) + 2 for column in zip(*own, strict=True))
        scales = [textwrap.shorten(scale, WIDTH - taken, placeholder=" …") for scale in scales]
    narrow = [(*cells, scale) for cells, scale in zip(own, scales, strict=True)]
    return Table("", ("system", "verdict", "ours", "paper"), [*narrow])


def _scale(system: System) -> str:
    """Return the scale of the paper's first claim."""
    return system.campaign.paper[0].scale if system.campaign.paper else ""


def _claims(system: System) -> str:
    return " ".join(line.removeprefix("Paper: ") + "." for line in paper_lines(system.campaign))


def _why(system: System) -> tuple[str, str]:
    verdict = system.campaign.verdict
    assert verdict
    return system.campaign.ceiling, verdict.reason


def claims_of(system: System) -> list[str]:
    """Return claim, ceiling and verdict of a system in sentences."""
    name, (ceiling, reason) = system.campaign.name, _why(system)
    said = [f"{name}. {line}" for line in paper_lines(system.campaign)]
    said += [f"{name}. Ceiling: {ceiling}"] if ceiling else []
    return [*said, f"{name}. Verdict: {system.state}. {reason}"]


def sentences(grand: Grand) -> list[str]:
    """Return what was asked, what was found and what would overturn it, and what has not run."""
    states = {s: [x.campaign.name for x in grand.systems if x.state == s] for s in STATES}
    gone = [x.campaign.name for x in grand.systems if x.state == MISSING]
    stale = [x.campaign.name for x in grand.systems if x.state not in (MISSING, *states)]
    found = "; ".join(f"{state}: {', '.join(own)}" for state, own in states.items() if own)
    rows = [row for group in grand.groups for row in group.rows]
    seeds = max((row.seeds for row in rows), default=0)
    items = max((group.ground.items for group in grand.groups), default=0)
    ours = f"other seeds (at most {seeds} of a row), other rows (at most {items} items), or "
    ours = ours if rows else ""
    waiting = [x.campaign.command for x in grand.systems if x.state == "not run yet"]
    return [
        *([f"Stale: {', '.join(stale)}."] if stale else []),
        *([f"Not run yet: {'; '.join(waiting)}"] if waiting else []),
        *(
            [f"No records here: {', '.join(gone)}. Make them: effbench table NAME --run"]
            * bool(gone)
        ),
        *_not_timed(grand),
        "Compared: rows of one group alone, which have metric, items, length and dtype in common, "
        "by all pairs after Holm; training differs from table to table, as its tokens say.",
        f"Asked: {grand.title}",
        f"Found: {found[:1].upper()}{found[1:]}.",
        f"Would overturn it: {ours}the papers' scales: effbench table NAME --scale paper.",
    ]


CLAIM = ("claim", "source", "sure", "scale")
"""Of a claim, what a CSV has."""


def flat(grand: Grand) -> Table:
    """Return all rows of all groups with the claim and verdict of their table, for CSV."""
    systems = {s.campaign.name: s for s in grand.systems}
    rows: list[tuple[Cell, ...]] = [
        (*group.ground, *_cells(row), *_judged(systems[row.table]))
        for group in grand.groups
        for row in group.rows
    ]
    shown = {row.table for group in grand.groups for row in group.rows}
    rows += [
        (*[None] * len(Ground._fields), name, *[None] * (len(fields(Row)) - 1), *_judged(system))
        for name, system in systems.items()
        if name not in shown
    ]
    own = [{"name": "row"}.get(f.name, f.name) for f in fields(Row)]
    judged = ("verdict", "scale", "claim", "source", "sure", "paper_scale", "ceiling", "reason")
    return Table("", (*Ground._fields, *own, *judged), rows)


def _cells(row: Row) -> tuple[Cell, ...]:
    cells = {f.name: getattr(row, f.name) for f in fields(Row)}
    speed = row.tokens_per_second
    return tuple({**cells, "tokens_per_second": speed and speed.value}.values())


def _judged(system: System) -> tuple[Cell, ...]:
    claims = system.campaign.paper
    told = [" | ".join(getattr(c, name) for c in claims) for name in CLAIM]
    return (system.state, system.ours, *told, *_why(system))
