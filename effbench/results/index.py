"""What lists say of each record, kept beside the run folders, so that a file is parsed once.

An entry holds while name, size, time and inode of its file and the code that made it are the same;
it can be deleted at any time, and two processes that write it at once leave one of the two.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.results import records
from effbench.results.store import Store, keep_out_of_git, record_files
from effbench.util.errors import UserError
from effbench.util.files import write_atomic
from effbench.util.seals import sealed, unsealed

if TYPE_CHECKING:
    from effbench.results.records import Record

READERS = [Path(__file__).with_name(f"{name}.py") for name in ("records", "migrations")]
"""The code that reads records, which is imported when there is one to read."""

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
    code = _digest(*(path.read_bytes() for path in (*READERS, *made_by)))
    known = _kept(store.index, code)
    found, settled, now = dict[str, list[Any]](), dict[str, list[Any]](), time.time()
    for path in record_files(store.records):
        try:
            stat = path.stat()
        except OSError:
            records.read(path)  # says what is wrong with it
            raise
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        entry = known.get(path.name)
        if entry is None or entry[0] != mark:
            record = records.read(path, outcomes=False)
            entry = [mark, [record.started, record.key], list(summarise(record))]
        found[path.name] = entry
        if now - stat.st_mtime > SETTLED_SECONDS:
            settled[path.name] = entry
    if settled != known:
        with suppress(UserError, OSError):  # an index that cannot be written is none
            keep_out_of_git(store.runs)
            text = json.dumps({"code": code, "entries": settled})
            write_atomic(store.index, sealed(text, store.index.name))
    return [tuple(entry[2]) for entry in sorted(found.values(), key=lambda e: e[1])]


def _kept(place: Path, code: str) -> dict[str, list[Any]]:
    """Return the entries in a cache file that the same code made; none when it is damaged."""
    try:
        kept = json.loads(unsealed(place.read_text(), place.name))
        return kept["entries"] if kept["code"] == code else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part + b"\0")
    return found.hexdigest()[:16]
