"""One store of results merged into another: what is new there is copied, nothing is overwritten.

Both stores are read before anything is written. A record of the same key with other content is a
conflict, which both keep. Runs are copied with all their files, held against their manifest, and
get their name, or in a bucket their marker, last. What was done is found done the next time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory, gettempdir

from effbench.results.manifest import damaged
from effbench.results.places import Local, Place, place_of
from effbench.results.records import Record, parse
from effbench.results.store import ARTEFACT, MARKER, RunFolder, Store
from effbench.util.errors import UserError
from effbench.util.files import mendable, replace_folder, scratch_folder


@dataclass
class Merge:
    """What a sync does, or would do; each part by key."""

    new: dict[str, bytes] = field(default_factory=dict)
    """Records that are copied."""
    same: list[str] = field(default_factory=list)
    """Records that are there already."""
    conflicts: dict[str, str] = field(default_factory=dict)
    """What is different in the two stores, which keep theirs."""
    runs: dict[str, list[str]] = field(default_factory=dict)
    """Files of the runs that are copied."""
    unfinished: list[str] = field(default_factory=list)
    """Runs that are left out, as they are not finished in the source."""


def sync(source: str, target: str, runs: bool = False, dry_run: bool = False) -> Merge:
    """Copy the records that a store lacks from another one.

    Args:
        source: Folder of results, or its address (`s3://bucket/path`).
        target: Where they go.
        runs: Copy the folders of finished runs, too.
        dry_run: Only say what would be copied.

    Raises:
        UserError: When a store cannot be read or reached, or a newer effbench wrote into it.
    """
    there, here = place_of(source), place_of(target)
    merge = Merge()
    _compare_records(there, here, merge)
    if runs:
        _compare_runs(there, here, merge)
    if not (merge.new or merge.same or merge.conflicts or merge.runs or merge.unfinished):
        raise UserError(f"There are no results in {source}.", "Name a folder with records/ in it.")
    if not dry_run:
        for key, content in merge.new.items():
            with suppress(FileExistsError):  # somebody else was quicker; seen the next time
                here.put(_record(key), content)
        for key, files in merge.runs.items():
            _copy_run(there, here, key, files)
    return merge


# -- records -----------------------------------------------------------------------------------


def _record(key: str) -> str:
    return f"records/{key}.json"


def _compare_records(there: Place, here: Place, merge: Merge) -> None:
    ours, theirs = _records(there), _records(here)
    for key, content in ours.items():
        if key not in theirs:
            merge.new[key] = content
        elif content == theirs[key] or _parsed(there, key, content) == (
            other := _parsed(here, key, theirs[key])
        ):
            merge.same.append(key)
        else:
            merge.conflicts[key] = _difference(_parsed(there, key, content), other)


def _records(place: Place) -> dict[str, bytes]:
    """Return the files of the records of a store by key.

    Raises:
        UserError: That names one which is damaged, or which a newer effbench wrote.
    """
    names = [name for name in place.names("records") if name.endswith(".json")]
    found = {PurePosixPath(name).stem: content for name, content in place.read(names).items()}
    for key, content in found.items():
        _parsed(place, key, content, outcomes=False)
    return found


def _parsed(place: Place, key: str, content: bytes, outcomes: bool = True) -> Record:
    return parse(content.decode(errors="replace"), key, place.called(_record(key)), outcomes)


def _difference(one: Record, other: Record) -> str:
    """Say how two records of one key differ."""
    if one.started != other.started:
        return f"record: run on {one.started[:16]}, there on {other.started[:16]}"
    parts = [name for name in vars(one) if getattr(one, name) != getattr(other, name)]
    return f"record: other {', '.join(parts)}"


# -- runs --------------------------------------------------------------------------------------


def _compare_runs(there: Place, here: Place, merge: Merge) -> None:
    ours, theirs = _folders(there), _folders(here)
    mine, other = _marks(there, ours), _marks(here, theirs)
    for key, files in ours.items():
        begun = key in theirs and (key in other or isinstance(here, Local))
        if key in merge.conflicts or mine.get(key) == other.get(key, b""):
            continue
        if key not in mine:
            merge.unfinished.append(key)
        elif not begun:
            merge.runs[key] = files
        else:
            state = "finished at another time" if key in other else "not finished there"
            merge.conflicts[key] = f"folder of the run: {state}"


def _folders(place: Place) -> dict[str, list[str]]:
    """Return the files of all runs in a store, by key."""
    found: dict[str, list[str]] = {}
    for name in place.names("runs", deep=True):
        if len(parts := PurePosixPath(name).parts) > 2:
            found.setdefault(parts[1], []).append(name)
    return found


def _marks(place: Place, folders: Mapping[str, list[str]]) -> dict[str, bytes]:
    """Return the markers of finished runs: when they ended, and the hash of their manifest."""
    places = {f"runs/{key}/{MARKER}": key for key in folders}
    wanted = [name for name, key in places.items() if name in folders[key]]
    return {places[name]: content for name, content in place.read(wanted).items()}


def _copy_run(there: Place, here: Place, key: str, files: list[str]) -> None:
    """Copy the folder of a finished run, once it is whole and what its manifest says.

    Raises:
        UserError: When it is damaged.
    """
    if isinstance(here, Local):
        _copy_folder(there, Store(here.root).run(key), files)
        return
    with mendable(Path(gettempdir())), TemporaryDirectory() as scratch:
        new = _fetched(there, files, key, Path(scratch))
        for name in sorted(files, key=lambda name: name.endswith(f"/{MARKER}")):
            with suppress(FileExistsError):  # from a sync that was interrupted
                here.put(name, new / _within(name))


def _copy_folder(there: Place, folder: RunFolder, files: list[str]) -> None:
    with folder.locked(), scratch_folder(folder.path.parent, folder.key) as scratch:
        new = _fetched(there, files, folder.key, scratch)
        if not folder.path.exists():
            replace_folder(new, folder.path)


def _fetched(there: Place, files: Iterable[str], key: str, scratch: Path) -> Path:
    """Return a folder with the files of a run, all of them as it wrote them.

    Args:
        there: Where they are.
        files: Their names.
        key: The run's key: sums of its logs hold under that name.
        scratch: An empty folder.

    Raises:
        UserError: When one is damaged or gone.
    """
    folder = RunFolder(scratch / key)
    for name in files:
        path = folder.path / _within(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        there.get(name, path)
    try:
        _ = folder.finished_at
        for name in folder.manifest.names():
            if (folder.path / name).exists() or name.startswith(ARTEFACT):
                folder.manifest.check(name)
    except UserError as error:
        raise damaged(Path(there.called(f"runs/{key}")), error.message) from None
    return folder.path


def _within(name: str) -> Path:
    """Return a file's place in its run folder."""
    return Path(*PurePosixPath(name).parts[2:])
