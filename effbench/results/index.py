"""What commands ask of all records, kept beside the run folders, so that a file is parsed once.

An entry holds while name, size, time and inode of its file and the code that made it are the same.
The file can be deleted at any time: it is written whole and moved into its place, needs no lock,
and two processes that write it at once leave one of the two; what it lacks is read from records.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from effbench.results import records
from effbench.results.store import Store, is_record, keep_out_of_git
from effbench.util.errors import UserError
from effbench.util.files import write_atomic
from effbench.util.seals import sealed, unsealed

if TYPE_CHECKING:
    from effbench.results.records import Record

READERS = [Path(__file__).with_name(f"{name}.py") for name in ("records", "migrations")]
"""The code that reads records, which is imported when there is one to read."""


class Head(NamedTuple):
    """What is kept of a record whatever is asked of it."""

    started: str
    key: str
    seconds: float
    """Of the run."""
    parent: str

    @property
    def ended(self) -> float:
        """When the run finished, in seconds since the epoch."""
        return records.ended(self.started, self.seconds)


Mark = list[int]
"""Size, time and inode of a file."""
Entry = list[Any]
"""`Mark` of a file; its `Head`; texts."""

SETTLED_SECONDS = 2.0
"""Age from which a file that has changed once more has another time, on any file system."""


def summaries(
    store: Store, summarise: Callable[[Record], Sequence[str]], made_by: Sequence[Path]
) -> list[tuple[str, ...]]:
    """Return what `summarise` makes of each record, oldest first; none is skipped.

    Args:
        store: Where the records are.
        summarise: Makes texts of a record, read without its outcomes.
        made_by: Files of code that the texts depend on, besides those that read records.

    Raises:
        UserError: That names the first file that cannot be read.
    """
    code = code_of(made_by)
    known = _kept(store.index, code)
    found, settled, now = dict[str, Entry](), dict[str, Entry](), time.time()
    for name, mark in sorted(marks(store.records).items()):
        entry = known.get(name)
        if entry is None or entry[0] != mark:
            record = records.read(store.records / name, outcomes=False)
            entry = [mark, [*head_of(record)], list(summarise(record))]
        found[name] = entry
        if is_settled(mark, now):
            settled[name] = entry
    if settled != known:
        keep(store.index, {"code": code, "reader": code_of(()), "entries": settled})
    return [tuple(entry[2]) for entry in sorted(found.values(), key=lambda e: e[1])]


def heads(folder: Path, index: Path) -> list[Head]:
    """Return what is kept of each record whatever is asked of it, oldest first.

    The index is used as far as it holds, and not written.

    Args:
        folder: Of the records.
        index: The file of a `Store`; it need not be there.

    Raises:
        UserError: That names the first file that cannot be read.
    """
    known, found = _kept(index, code_of(()), "reader"), list[Head]()
    for name, mark in sorted(marks(folder).items()):
        entry = known.get(name)
        fits = entry is not None and entry[0] == mark
        found.append(Head(*entry[1]) if entry and fits else _head(folder / name))
    return sorted(found)


def _head(path: Path) -> Head:
    return head_of(records.read(path, outcomes=False))


def head_of(record: Record) -> Head:
    """Return what is kept of a record whatever is asked of it."""
    return Head(record.started, record.key, record.seconds, record.parent)


# -- what others may keep in the same way ------------------------------------------------------


def marks(folder: Path) -> dict[str, Mark]:
    """Return what changes with the file of each record, by its name."""
    if not folder.is_dir():
        return {}
    found = {}
    with os.scandir(folder) as files:
        for file in files:
            if not is_record(file.name):
                continue
            try:
                stat = file.stat()
            except OSError:
                records.read(folder / file.name)  # says what is wrong with it
            else:
                found[file.name] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return found


def is_settled(mark: Mark, now: float) -> bool:
    """Whether a file that changes once more will have another mark; `now` is before it was read."""
    return now - mark[1] / 1e9 > SETTLED_SECONDS


def code_of(made_by: Sequence[Path]) -> str:
    """Return a digest of the code that reads records and of other files of code."""
    return _digest(*(path.read_bytes() for path in (*READERS, *made_by)))


def kept(place: Path) -> dict[str, Any]:
    """Return what a file of `keep` holds; nothing when it is damaged or is not there."""
    try:
        found = json.loads(unsealed(place.read_text(), place.name))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(place: Path, content: dict[str, Any]) -> None:
    """Keep what can be made again, in the folder of all runs; nothing where it has no room."""
    with suppress(UserError, OSError):
        keep_out_of_git(place.parent)
        write_atomic(place, sealed(json.dumps(content, separators=(",", ":")), place.name))


def _kept(place: Path, code: str, made_by: str = "code") -> dict[str, Entry]:
    """Return the entries of an index that the same code made."""
    found = kept(place)
    return found["entries"] if found.get(made_by) == code else {}


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part + b"\0")
    return found.hexdigest()[:16]
