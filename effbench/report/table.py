"""Tables of records: built once, shown in a terminal, as Markdown or as CSV."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape as as_html
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from effbench.report.fitting import GUTTER, lines_within
from effbench.report.labels import ABSENT, labels

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from effbench.results.records import Metric, Record

HEADLINES = (
    "accuracy",
    "loss",
    "perplexity",
    "bits_per_byte",
    "exact_match",
    "exact_match_strict_match",
    "agreement",
    "decode_tokens_per_second",
    "simulated_requests_per_second",
    "train_loss_last",
    "weight_bytes",
)
"""What a run is about, the first that it has."""

COMPARED = (
    "loss",
    "perplexity",
    "accuracy",
    "accuracy_norm",
    "decode_tokens_per_second",
    "trainable_params",
    "weight_bytes",
    "peak_bytes",
)
"""Columns of a comparison, unless others are asked for."""


class Value(NamedTuple):
    """A number with its unit and, where it has one, its interval."""

    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None or not math.isfinite(self.high - self.low):
            return readable(self.value, self.unit)
        factor, prefix = scale(max(abs(self.low), abs(self.high)), self.unit)
        numbers = [v / factor for v in (self.value, self.low, self.high)]
        digits = _digits(numbers[2] - numbers[1], numbers[0])
        value, low, high = (f"{round(v, digits) + 0.0:,.{digits}f}" for v in numbers)
        text = f"{value} [{low}, {high}]"
        return f"{text} {prefix}".rstrip()


Cell = str | int | float | Value | None


@dataclass(frozen=True)
class Table:
    """Columns, rows and what must be said below them."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    notes: tuple[str, ...] = ()

    def rich(self, fold: bool = False) -> RichTable:
        """Return the table for a terminal.

        Args:
            fold: Whether a word that there is no room for goes on in the next line; else it is cut.
        """
        from rich import box
        from rich.markup import escape
        from rich.table import Table as RichTable

        caption = escape("\n".join(self.notes)) or None
        table = RichTable(
            title=escape(self.title),
            caption=caption,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        for i, (name, numeric) in enumerate(zip(self.columns, self._numeric(), strict=True)):
            head = escape(name.replace("_", " "))  # so that a long one can be wrapped
            cells = [show(row[i]) for row in self.rows]
            one_word = not any(" " in cell for cell in cells)
            if one_word:  # the head has lines of its own, as the column is not to be made narrower
                width = max((len(word) for word in (*head.split(), *cells)), default=1)
                head = textwrap.fill(head, max(1, width), break_long_words=False)
            table.add_column(
                head,
                justify="right" if numeric else "left",
                no_wrap=one_word and not fold,
                overflow="fold" if fold else "ellipsis",
            )
        for row in self.rows:
            table.add_row(*(escape(show(cell)) for cell in row))
        return table

    def fitted(self, width: int, named: int) -> list[Table]:
        """Return tables of this one's columns that a terminal has room for, one below the other.

        Args:
            width: Of the terminal, in characters.
            named: First columns, which say what a row is and are in each of them.
        """
        sizes = [3 + max(map(len, self._words(i)), default=0) for i in range(len(self.columns))]
        room = width - 1 - sum(sizes[:named])
        parts: list[list[int]] = [[]]
        for i in range(named, len(self.columns)):
            if parts[-1] and sum(sizes[j] for j in (*parts[-1], i)) > room:
                parts.append([])
            parts[-1].append(i)
        found = [self._only([*range(named), *part]) for part in parts]
        return [*(replace(part, notes=()) for part in found[:-1]), found[-1]]

    def _words(self, column: int) -> list[str]:
        """Return what a column is as wide as: its cells, and the words of its head."""
        cells = [show(row[column]) for row in self.rows]
        return [*self.columns[column].replace("_", " ").split(), *cells]

    def _only(self, columns: Sequence[int]) -> Table:
        """Return the table with some of its columns."""
        rows = [tuple(row[i] for i in columns) for row in self.rows]
        return Table(self.title, tuple(self.columns[i] for i in columns), rows, self.notes)

    def text(self, width: int = 0) -> str:
        """Return the table as aligned columns, without rich, for commands that start at once.

        Args:
            width: Characters that a line can hold; where there are too few, texts go on below
                themselves, and then intervals stand below their numbers. 0 for any number.
        """
        grid = [self.columns, *(tuple(show(cell) for cell in row) for row in self.rows)]
        numeric = self._numeric()
        lines, head = grid, 1
        if width:
            lines, head = lines_within(grid, [not right for right in numeric], width)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [
            [
                cell.rjust(size) if right else cell.ljust(size)
                for cell, size, right in zip(line, widths, numeric, strict=True)
            ]
            for line in lines
        ]
        text = [GUTTER.join(line).rstrip() for line in padded]
        rule = GUTTER.join("-" * size for size in widths)
        return "\n".join([*text[:head], rule, *text[head:], *self.notes])

    def markdown(self) -> str:
        """Return the table as GitHub Markdown."""
        lines = [f"**{self.title}**", ""] if self.title else []
        lines.append(_line(self.columns))
        lines.append(_line("---:" if numeric else "---" for numeric in self._numeric()))
        lines += [_line(show(cell) for cell in row) for row in self.rows]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return without_html("\n".join(lines) + "\n")

    def html(self) -> str:
        """Return the table as HTML, for notebooks."""
        right = ' style="text-align: right"'
        forms = [right if numeric else "" for numeric in self._numeric()]
        head = "".join(f"<th>{as_html(name)}</th>" for name in self.columns)
        rows = (
            "".join(f"<td{f}>{as_html(show(c))}</td>" for f, c in zip(forms, row, strict=True))
            for row in self.rows
        )
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        title = f"<caption>{as_html(self.title)}</caption>" if self.title else ""
        notes = "".join(f"<p>{as_html(note)}</p>" for note in self.notes)
        return f"<table>{title}<tr>{head}</tr>{body}</table>{notes}"

    def latex(self) -> str:
        """Return the table as LaTeX with the rules of booktabs, texts escaped."""
        columns = "".join("r" if numeric else "l" for numeric in self._numeric())
        head = [f"% {' '.join(self.title.split())}"] if self.title else []
        rows = [_latex_row([show(cell) for cell in row]) for row in self.rows]
        lines = [*head, rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_row(self.columns)]
        lines += [r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
        return "\n".join([*lines, *(f"% {' '.join(note.split())}" for note in self.notes)]) + "\n"

    def csv(self) -> str:
        """Return the table as CSV with plain numbers; an interval takes two more columns."""
        wide = [any(isinstance(row[i], Value) for row in self.rows) for i in self._indices()]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        heads = zip(self.columns, wide, strict=True)
        writer.writerow([_inert(h) for name, w in heads for h in _heads(name, w)])
        for row in self.rows:
            cells = zip(row, wide, strict=True)
            writer.writerow([_inert(part) for cell, w in cells for part in _parts(cell, w)])
        return text.getvalue()

    def _indices(self) -> range:
        return range(len(self.columns))

    def _numeric(self) -> list[bool]:
        """Return which columns hold nothing but numbers."""
        return [
            any(row[i] is not None for row in self.rows)
            and not any(isinstance(row[i], str) for row in self.rows)
            for i in self._indices()
        ]


LATEX: dict[str, str | int | None] = {c: f"\\{c}" for c in "&%$#_{}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}"}
LATEX |= {"—": "---", "–": "--", "×": r"$\times$", "±": r"$\pm$", "≤": r"$\leq$", "…": r"\ldots{}"}
"""What stands in LaTeX for a character that means something else there; a bracket at the start of a
row would be read as the option of the line break before it."""


MINUS = re.compile(r"(?<![\w.])-(?=\d)")
"""Before a number, where LaTeX would print a hyphen."""


def as_latex(text: str) -> str:
    """Return a text whose characters LaTeX prints as they are."""
    escaped = " ".join(text.split()).translate(str.maketrans(LATEX))
    return MINUS.sub("$-$", escaped)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(as_latex, cells)) + r" \\"


RUN_COLUMNS = ("key", "started (UTC)", "stage", "method", "model", "dataset", "seed", "result")


def run_row(record: Record) -> tuple[str, ...]:
    """Return what a run was and the number it is about, by `RUN_COLUMNS`."""
    return (
        record.key[:8],
        record.started[:16].replace("T", " "),
        record.stage,
        record.name_of("method"),
        record.name_of("model"),
        record.name_of("dataset"),
        str(record.spec.get("seed", ABSENT)),
        headline(record),
    )


def headline(record: Record) -> str:
    """Return the metric that a run is about, or its range over the operating points."""
    for name in HEADLINES:
        found = [m for m in record.metrics if m.name == name]
        if not found:
            continue
        # Other splits of the run's dataset are there to choose by.
        found.sort(key=lambda m: not m.task and m.split not in ("", "test"))
        first, unit = found[0], found[0].unit
        values = sorted(m.value for m in found if (m.task, m.split) == (first.task, first.split))
        shown = " to ".join(dict.fromkeys(readable(v, unit) for v in (values[0], values[-1])))
        tail = "" if unit.startswith("bytes") else unit
        over = f"over {len(values)} points" if len(values) > 1 else ""
        of = f"of {first.task}" if first.task else ""
        return " ".join(part for part in (name, of, shown, tail, over) if part)
    return ABSENT


def comparison(records: Sequence[Record], metrics: Sequence[str] = ()) -> Table:
    """Return one row per run and operating point, one column per metric.

    What was measured, counted and modelled has columns of its own each.

    Args:
        records: The runs, in the order of the rows.
        metrics: Names of metrics; empty takes the usual ones among those that are there.
    """
    wanted = metrics or COMPARED
    found = {metric_column(m): m for record in records for m in record.metrics if m.name in wanted}
    columns = sorted(found, key=lambda c: wanted.index(c[0]))
    rows: list[tuple[Cell, ...]] = []
    for record, label in zip(records, labels(records), strict=True):
        cells = {(*metric_column(m), m.point): as_value(m) for m in record.metrics}
        for point in points(record):
            values = (cells.get((*c, point)) or cells.get((*c, "")) for c in columns)
            rows.append((label, point, *values))
    heads = tuple(metric_head(found[c]) for c in columns)
    table = Table("", ("run", "point", *heads), rows)
    return table if any(row[1] for row in rows) else _without(table, 1)


def tasks_table(record: Record) -> Table:
    """Return one row per benchmark task and operating point of a run, one column per metric."""
    found = [m for m in record.metrics if m.task]
    names = list(dict.fromkeys((m.name, m.phase) for m in found))
    several = {name for (name, _), (other, _) in pairwise(sorted(names)) if name == other}
    cells = {(m.task, m.point, m.name, m.phase): as_value(m) for m in found}
    rows: list[tuple[Cell, ...]] = [
        (task, point, *(cells.get((task, point, *name)) for name in names))
        for task, point in dict.fromkeys((m.task, m.point) for m in found)
    ]
    heads = (f"{name}_{phase}" if name in several and phase else name for name, phase in names)
    table = Table("", ("task", "point", *heads), rows)
    return table if any(row[1] for row in rows) else _without(table, 1)


def points(record: Record) -> list[str]:
    """Return the operating points of a run, in its order; one unnamed when it has no others."""
    return [p for p in dict.fromkeys(m.point for m in record.metrics) if p] or [""]


def as_value(metric: Metric) -> Value:
    """Return a metric as a table cell."""
    return Value(metric.value, metric.unit, metric.low, metric.high)


def show(cell: Cell) -> str:
    """Return a cell as a person reads it, in one line."""
    if cell is None or cell == "":
        return ABSENT if cell is None else ""
    if isinstance(cell, str):
        return " ".join(cell.splitlines())
    return str(cell) if isinstance(cell, Value) else readable(cell)


def readable(value: float, unit: str = "") -> str:
    """Return a number with four significant digits; bytes and large counts get a prefix."""
    if not math.isfinite(value):
        return str(value)
    factor, prefix = scale(value, unit)
    scaled = value / factor
    whole = float(scaled).is_integer() and abs(scaled) < 1e6
    text = f"{scaled:,.0f}" if whole else f"{scaled:,.{_digits(0, scaled)}f}"
    if scaled and abs(scaled) < 1e-3:
        text = f"{scaled:.3g}"
    return f"{text} {prefix}".rstrip()


def scale(value: float, unit: str) -> tuple[float, str]:
    """Return what to divide by, and the prefix (with the unit, for bytes) that says so."""
    size = abs(value) if math.isfinite(value) else 0.0
    if unit.startswith("bytes"):
        steps = [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")]
    else:
        steps = [(10**12, "T"), (10**9, "G"), (10**6, "M"), (1, "")]
    factor, prefix = next(((f, p) for f, p in steps if size >= f), steps[-1])
    return factor, prefix + unit.removeprefix("bytes") if unit.startswith("bytes") else prefix


def _digits(width: float, value: float) -> int:
    """Return decimals that show two digits of an interval's width, or four of a value."""
    if width > 0:
        return min(6, max(0, 1 - math.floor(math.log10(width))))
    return min(6, max(0, 3 - math.floor(math.log10(abs(value))))) if value else 0


def metric_column(metric: Metric) -> tuple[str, ...]:
    """Return what two metrics must have in common to share a column."""
    return metric.name, metric.task, metric.split, metric.phase, metric.obtained


def metric_head(metric: Metric) -> str:
    """Return the head of a metric's column."""
    place = " ".join(p for p in (metric.task, metric.split, metric.phase) if p)
    unit = "" if metric.unit.startswith("bytes") else metric.unit
    details = [d for d in (place, unit, modelled(metric.obtained)) if d]
    return f"{metric.name} ({', '.join(details)})" if details else metric.name


def modelled(obtained: str) -> str:
    """Return the warning that belongs to a number that nobody measured."""
    return "modelled, not measured" if obtained == "modelled" else ""


def _without(table: Table, index: int) -> Table:
    rows = [row[:index] + row[index + 1 :] for row in table.rows]
    return Table(table.title, table.columns[:index] + table.columns[index + 1 :], rows, table.notes)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |"


TAG = re.compile(r"<(?=[A-Za-z/!?])")
FORMULA = re.compile(r"\s*[=+@\uff0b\uff0d\uff1d\uff20-].|\t")
"""How a text begins that a spreadsheet would calculate; some of them pass over blanks, or take the
wide forms of a sign for it."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def without_html(markdown: str) -> str:
    """Return Markdown in which what looks like a tag is text."""
    return TAG.sub("&lt;", markdown)


def _inert(cell: Any) -> Any:
    """Return a CSV cell that a spreadsheet takes for the text or number that it is."""
    if not isinstance(cell, str) or NUMBER.fullmatch(cell):
        return cell
    line = " ".join(cell.splitlines())  # the writer leaves a bare \r, which ends a row, as it is
    return f"'{line}" if FORMULA.match(line) else line


def _heads(name: str, wide: bool) -> list[str]:
    return [name, f"{name}_low", f"{name}_high"] if wide else [name]


def _parts(cell: Cell, wide: bool) -> list[str | float | None]:
    if isinstance(cell, Value):
        return [cell.value, cell.low, cell.high]
    return [cell, None, None] if wide else [cell]
