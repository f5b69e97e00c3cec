"""The rows of a report in blocks, packed once and kept beside the index of records.

A block ends where the digest of a key says so and not after so many runs: a record that comes, goes
or changes has its own block made anew, and no other. A page of all records then reads few of them.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from effbench.api.stages import base as stages
from effbench.report import labels, table
from effbench.report.facts import facts
from effbench.report.page import columns
from effbench.report.page.columns import rows_of
from effbench.results.index import Mark, code_of, is_settled, keep, kept, marks
from effbench.results.records import Record, read
from effbench.results.store import Store

FEWEST, MORE = 128, 32
"""Runs of a block at least, and how many more there are on average."""
CODE = [Path(__file__), *(Path(m.__file__ or "") for m in (stages, labels, table, columns))]
"""What the content of a block depends on."""


class Block(NamedTuple):
    """Some of the rows of a page, which follow each other."""

    runs: int
    rows: int
    heads: list[dict[str, str]]
    """Of its columns: what a `Column` is beside its values, with an `id` that tells it from all."""
    environment: dict[str, dict[str, int]]
    """How many rows have each value of a fact of the environment."""
    packed: str
    """The values of its columns, as `compressed` makes them."""


def block_of(records: Iterable[Record]) -> Block:
    """Return the rows of runs as one block."""
    there = list(records)
    rows = rows_of(there)
    found = rows.columns
    environment = {
        c.name: dict(Counter(str(v) for v in c.values if v is not None))
        for c in found
        if c.group == "environment"
    }
    values = compressed(_once([column.packed() for column in found]))
    return Block(len(there), rows.count, [c.head() for c in found], environment, values)


def _once(packed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return columns, those with the values of an earlier one as its place: `like`."""
    places: dict[str, int] = {}
    found = [places.setdefault(json.dumps(values), place) for place, values in enumerate(packed)]
    return [
        packed[like] if like == place or "value" in packed[like] else {"like": like}
        for place, like in enumerate(found)
    ]


def compressed(data: Any) -> str:
    """Return data as JSON, gzipped, in characters that end no element of a page."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def blocks_of(store: Store) -> tuple[list[str], list[Block]]:
    """Return the keys of all records, latest first, and their rows in blocks.

    Those whose files and code are as they were are not read.

    Raises:
        UserError: That names the first file that cannot be read.
    """
    keys, now = [fact.key for fact in facts(store)[::-1]], time.time()
    code, there, before = code_of(CODE), marks(store.records), kept(store.rows)
    known = before.get("blocks", {}) if before.get("code") == code else {}
    found, settled = list[Block](), dict[str, Block]()
    for group in _groups(keys):
        files = [(f"{key}.json", there.get(f"{key}.json", [])) for key in group]
        name = _digest(files)
        block = Block(*known[name]) if name in known else block_of(_read(store, group))
        found.append(block)
        if all(mark and is_settled(mark, now) for _, mark in files):
            settled[name] = block
    if settled.keys() != known.keys():
        keep(store.rows, {"code": code, "blocks": settled})
    return keys, found


def _read(store: Store, keys: Sequence[str]) -> Iterator[Record]:
    for key in keys:
        yield read(store.records / f"{key}.json", outcomes=False)


def _groups(keys: Iterable[str]) -> Iterator[list[str]]:
    """Yield keys in groups, which mostly end where they did when a key comes or goes."""
    group: list[str] = []
    for key in keys:
        group.append(key)
        if len(group) >= FEWEST and crc32(key.encode()) % MORE == 0:
            yield group
            group = []
    if group:
        yield group


def _digest(files: Sequence[tuple[str, Mark]]) -> str:
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
