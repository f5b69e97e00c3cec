"""Records by what a person calls them, and those that others went on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effbench.results.index import heads
from effbench.results.reader import Reader
from effbench.results.records import Record, read
from effbench.results.store import Store, record_files
from effbench.util.errors import UserError, did_you_mean


def find(folder: Path, ref: str) -> Record:
    """Return the record that a person means.

    Args:
        folder: Folder of the records.
        ref: A key, at least four digits that begin only one key, or `latest`.

    Raises:
        UserError: When none or several fit, with the keys that come near.
    """
    paths = {path.stem: path for path in record_files(folder)}
    if not paths:
        raise UserError(f"There are no records in {folder}.", "Run effbench train first.")
    if ref == "latest":
        there = heads(folder, Store(folder.parent).index)
        return read(paths[max(there, key=lambda head: head.ended).key])
    if ref in paths:
        return read(paths[ref])
    fits = [key for key in paths if len(ref) >= 4 and key.startswith(ref)]
    if len(fits) == 1:
        return read(paths[fits[0]])
    if fits:
        raise UserError(f"{ref!r} fits {len(fits)} records.", f"They are: {', '.join(fits[:6])}.")
    if any(key.startswith(ref) for key in paths):
        raise UserError(f"{ref!r} is too short to name a record.", "Give at least four digits.")
    raise UserError(
        f"There is no record {ref!r}.", did_you_mean(ref, paths) + " See: effbench runs"
    )


def earlier(records: Sequence[Record], there: Path | Reader) -> list[Record]:
    """Return the runs that others went on from, as far as their records are there.

    Args:
        records: The others.
        there: The folder of the records, or what has read some of them already.
    """
    reader = there if isinstance(there, Reader) else Reader(there)
    found: dict[str, Record] = {}
    parents = [record.parent for record in records]
    while parents:
        key = parents.pop()
        if key not in found and reader.has(key):
            found[key] = reader.of(key, outcomes=False)
            parents.append(found[key].parent)
    return list(found.values())
