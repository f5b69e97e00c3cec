"""The HTML file of a report.

Sentences, environment and the first rows are plain HTML, readable without JavaScript and on paper;
the script puts a table of all rows and charts in their place. Data is gzipped JSON in base64. A
policy lets nothing in but the style and the script of the file itself, by their hashes
(https://www.w3.org/TR/CSP3/), and the data stands where no text of a record can end it.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.report.page.blocks import Block, block_of, compressed
from effbench.report.page.columns import Column, order, rows_of
from effbench.report.table import Value, readable
from effbench.results.records import Record, strict

if TYPE_CHECKING:
    from effbench.report.page.evidence import Evidence

PLAIN_ROWS = 200
"""Rows of the table for readers without JavaScript."""
PLAIN_METRICS = 8
"""Its columns of metrics."""
SHOWN = 20
"""Values of a fact of the environment."""
LONG = 280
"""Characters from which a sentence is folded."""
TOLD = ("key", "started", "stage", "method", "model", "dataset", "seed", "point")
"""Its first columns."""


def page(
    records: Sequence[Record],
    found: Evidence | None = None,
    curves: Sequence[dict[str, Any]] = (),
    maps: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the report of runs, the same bytes for the same input.

    Args:
        records: The runs, in the order of the rows.
        found: What they show against one of them, if there is a reference.
        curves: Loss curves, as `curves.curves` returns them.
        maps: Heat maps of layers, as `layers.layer_maps` returns them.
    """
    return page_of([block_of(records)], records[:PLAIN_ROWS], found, curves, maps)


def page_of(
    blocks: Sequence[Block],
    first: Sequence[Record],
    found: Evidence | None = None,
    curves: Sequence[dict[str, Any]] = (),
    maps: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the report of runs whose rows are packed already; see `page`.

    Args:
        blocks: The rows, in their order.
        first: The runs that they begin with, as many as there are rows for who has no JavaScript.
        found: As for `page`.
        curves: As for `page`.
        maps: As for `page`.
    """
    heads = _heads(blocks)
    places = {name: place for place, name in enumerate(heads)}
    data = {
        "columns": [{k: v for k, v in head.items() if k != "id"} for head in heads.values()],
        "blocks": [[block.rows, [places[h["id"]] for h in block.heads]] for block in blocks],
        "forest": strict(found.forest if found else []),
        "curves": strict(list(curves)),
    }
    runs, rows = (sum(counts) for counts in zip(*(block[:2] for block in blocks), strict=True))
    style, script = _asset("page.css"), _asset("page.js")
    policy = f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; "
    policy += "base-uri 'none'; form-action 'none'"
    body = "\n".join([_head(runs, rows), _words(found), _table(first, rows)])
    packed = "\n".join([compressed(data), *(block.packed for block in blocks)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>effbench report</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{body}\n{CHARTS}\n{_maps(maps)}{_flips(found)}{_environment(blocks, rows)}\n</main>\n"
        '<dialog id="details" aria-label="One run at one operating point"></dialog>\n'
        f'<script type="application/octet-stream" id="data">{packed}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


CHARTS = """<div id="charts" hidden></div>"""


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """Return an inline style or script as a source of a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _heads(blocks: Iterable[Block]) -> dict[str, dict[str, str]]:
    """Return the heads of the columns of all blocks by their `id`, in the order of the page."""
    found: dict[str, dict[str, str]] = {}
    for block in blocks:
        for head in block.heads:
            found.setdefault(head["id"], head)
    return dict(sorted(found.items(), key=lambda item: order(item[1]["name"], item[1]["group"])))


# -- what is readable without JavaScript -------------------------------------------------------


def _head(runs: int, rows: int) -> str:
    count = f"{runs:,} run{'' if runs == 1 else 's'}, {rows:,} row{'' if rows == 1 else 's'}"
    return (
        f"<header><h1>effbench report</h1><p>{count}: one for each operating point.</p></header>"
        '\n<nav id="sections" aria-label="Sections" hidden></nav>\n<main>'
    )


def _words(found: Evidence | None) -> str:
    if found is None:
        text = "<p>No reference: name one with <code>--against RUN</code> to see differences.</p>"
    else:
        lines = "".join(f"<li>{_folded(line)}</li>" for line in found.words)
        notes = "".join(f"<p>{_folded(note)}</p>" for note in found.notes)
        text = f"<ul>{lines}</ul>{notes}"
    return f'<section id="words"><h2>In words</h2>{text}</section>'


def _folded(line: str) -> str:
    """Return a sentence; a long one, which lists many rows, is a heading over its parts."""
    if len(line) <= LONG:
        return escape(line)
    head, mark, rest = min((line.partition(m) for m in (". ", ": ")), key=lambda p: len(p[0]))
    if not mark or len(head) > LONG // 2:
        begin, end = line[: LONG // 2].rpartition(" ")[0], line[-LONG // 4 :].partition(" ")[2]
        head, rest = f"{begin} …{'' if mark else f' {end}'}", line
    listed = "".join(f"<li>{escape(part)}</li>" for part in rest.split("; "))
    return f"<details><summary>{escape(head)}</summary><ul>{listed}</ul></details>"


def _table(first: Sequence[Record], rows: int) -> str:
    """Return the section of rows, with the first of them as a table."""
    columns = rows_of(first).columns
    names = {column.name: column for column in columns if column.group == "run"}
    told = [names[name] for name in TOLD if name in names]
    told += [c for c in columns if c.group == "usual"][:PLAIN_METRICS]
    told += [names["command"]] if "command" in names else []
    head = "".join(f'<th scope="col">{escape(column.name)}</th>' for column in told)
    body = "\n".join(
        f"<tr>{''.join(_cell(column, row) for column in told)}</tr>"
        for row in range(min(rows, PLAIN_ROWS))
    )
    more = f"<p>The first {PLAIN_ROWS} of {rows:,} rows.</p>" if rows > PLAIN_ROWS else ""
    return (
        '<section id="runs"><h2>Runs and points</h2>\n'
        '<div id="plain" tabindex="0" role="region" aria-label="Table of runs">\n'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>{more}\n"
        '</div>\n<div id="grid" hidden></div></section>'
    )


def _cell(column: Column, row: int) -> str:
    value = column.values[row]
    if value is None:
        return "<td></td>"
    if column.group in ("usual", "metrics"):
        shown = str(Value(value, column.unit, *column.bounds.get(row, (None, None))))
        return f'<td class="number">{escape(shown)}</td>'
    text = escape(readable(value) if isinstance(value, float) else str(value))
    return f"<td><code>{text}</code></td>" if column.name == "command" else f"<td>{text}</td>"


def _maps(maps: Sequence[tuple[str, str]]) -> str:
    """Return the section of heat maps; each is markup already."""
    if not maps:
        return ""
    shown = "\n".join(
        f"<details{' open' * (not place)}><summary>{escape(title)}</summary>"
        f'<div class="maps">{drawn}</div></details>'
        for place, (title, drawn) in enumerate(maps)
    )
    return f'<section id="layers"><h2>How alike the layers are</h2>\n{shown}</section>\n'


def _flips(found: Evidence | None) -> str:
    """Return the section of items that change sides."""
    if found is None or not found.flips:
        return ""
    shown = "\n".join(
        f"<details><summary>{escape(line)}</summary><pre>{escape(rest)}</pre></details>"
        for line, rest in found.flips
    )
    return f'<section id="flips"><h2>Items that change sides</h2>\n{shown}</section>\n'


def _environment(blocks: Iterable[Block], rows: int) -> str:
    """Return on what the runs ran: each value, with the number of its rows where it varies."""
    facts: dict[str, Counter[str]] = {}
    for block in blocks:
        for name, counts in block.environment.items():
            facts.setdefault(name, Counter()).update(counts)
    lines = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_counted(found, rows)}</td></tr>'
        for name, found in facts.items()
    )
    return (
        '<section id="environment"><h2>Environment</h2>\n'
        f"<details><summary>{len(facts)} facts</summary><table>{lines}</table></details></section>"
    )


def _counted(found: Counter[str], rows: int) -> str:
    if list(found.values()) == [rows]:
        return escape(next(iter(found)))
    kinds = [f"{escape(value)} ({n:,})" for value, n in found.most_common(SHOWN)]
    return ", ".join([*kinds, *(["…"] if len(found) > SHOWN else [])])
