"""From the words of `effbench report` to its file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from effbench.report.comparison.reference import reference_of, said_of
from effbench.report.page.blocks import block_of, blocks_of
from effbench.report.page.curves import curves
from effbench.report.page.render import PLAIN_ROWS, page_of
from effbench.results.lookup import find
from effbench.results.records import Record, read
from effbench.results.store import Store
from effbench.util.errors import UserError
from effbench.util.files import write_atomic

if TYPE_CHECKING:
    from effbench.report.page.evidence import Evidence


def write_report(results: Path, runs: Sequence[str], against: str, path: Path) -> int:
    """Write the report of runs and return how many there are.

    Args:
        results: Folder of runs and records.
        runs: Keys, prefixes or `latest`, in the order of the rows; none for all, latest first.
        against: The run that others are held against, with `@POINT` for one of its points; empty
            for the first of several named ones, and for none where none is named.
        path: The file; one that is there is replaced.

    Raises:
        UserError: When there are no records, one cannot be found or read, or the file cannot be
            written; a file that was there is then as it was.
    """
    store = Store(results)
    reference = against or (runs[0] if len(runs) > 1 else "")
    one = reference_of(reference, store.records) if reference else None
    if runs:
        own = reference if one and not against else ""
        others = [find(store.records, run).key for run in runs if run != own]
        keys = list(dict.fromkeys(others))
        keys = [one.key, *keys] if one and one.key not in keys else keys
        blocks = [block_of(_read(store, keys))]
    else:
        keys, blocks = blocks_of(store)
    if not keys:
        raise UserError(f"There are no records in {store.records}.", "Run effbench train first.")
    found = _held(one, said_of(reference, one), keys, store) if one else None
    there = _with_folders(keys, store)
    first = [*_read(store, keys[:PLAIN_ROWS])]
    write_atomic(path, page_of(blocks, first, found, curves(there, store), _maps(there, store)))
    return len(keys)


def _held(one: Record, said: Sequence[str], keys: Sequence[str], store: Store) -> Evidence:
    """Return what runs show against one of them; those without any of its items are not parsed."""
    from effbench.report.facts import told_of  # a page without tests starts without numpy
    from effbench.report.page.evidence import evidence
    from effbench.report.page.flipped import flipped
    from effbench.results.sweeps import tunings
    from effbench.results.tunings import tuned_together

    items = {o.ids.encode() for o in one.outcomes}
    near = [key for key in keys if key != one.key and _holds(store, key, items)]
    records = [one, *_read(store, near, outcomes=True)]
    tuned = [*tunings(store.root), *tuned_together(store.root)]
    found = evidence(records, one, told_of(records, store, tuned), tuned, len(keys))
    return replace(found, words=[*said, *found.words], flips=flipped(records, one, store))


def _holds(store: Store, key: str, texts: Iterable[bytes]) -> bool:
    """Whether one of some texts is in the file of a record."""
    content = (store.records / f"{key}.json").read_bytes()
    return any(text in content for text in texts)


def _read(store: Store, keys: Iterable[str], outcomes: bool = False) -> Iterator[Record]:
    for key in keys:
        yield read(store.records / f"{key}.json", outcomes)


def _maps(keys: Sequence[str], store: Store) -> list[tuple[str, str]]:
    """Return heat maps of layers of the runs whose folders have them."""
    folders = {key: store.run(key).path / "evaluations" for key in keys}
    found = [key for key, path in folders.items() if any(path.glob("similarity*.layers.jsonl"))]
    if not found:
        return []
    from effbench.report.page.layers import layer_maps  # most pages have none

    return layer_maps([*_read(store, found)], store)


def _with_folders(keys: Sequence[str], store: Store) -> list[str]:
    """Return the runs whose folders are here."""
    here = {path.name for path in store.runs.iterdir()} if store.runs.is_dir() else set[str]()
    return [key for key in keys if key in here]
