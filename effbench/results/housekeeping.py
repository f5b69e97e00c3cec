"""Removing runs, and what nobody needs of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from effbench.results.index import heads
from effbench.results.store import RunFolder, Store, record_files
from effbench.util.errors import UserError
from effbench.util.files import remove, tree_bytes


@dataclass(frozen=True)
class Removal:
    """Places that can be removed together."""

    what: str
    """What they are, in words."""
    key: str
    """The run that is locked meanwhile."""
    places: tuple[Path, ...]
    whole: bool = False
    """Whether the run is forgotten, marker first."""

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return sum(map(tree_bytes, self.places))

    def carry_out(self, store: Store) -> None:
        """Remove the places.

        Raises:
            UserError: When a process has taken up the run meanwhile.
        """
        folder = store.run(self.key)
        _refuse_running(folder)
        with folder.locked():
            if self.whole:
                folder.clear()
            for place in self.places:
                remove(place)


def removal_of(store: Store, refs: Sequence[str]) -> list[Removal]:
    """Return the removal of runs, their records included.

    Args:
        store: Runs and records.
        refs: Keys, or at least four digits that begin only one.

    Raises:
        UserError: For a run that is not there, is at work, or is what another one started from
            that would stay.
    """
    keys = list(dict.fromkeys(_key(store, ref) for ref in refs))
    for key in keys:
        _refuse_running(store.run(key))
        if heirs := sorted(_heirs(store, key) - set(keys)):
            raise UserError(
                f"Run {key} is what {_some(heirs)} started from.",
                "Name these runs too, or leave it.",
            )
    return [_whole(store, key) for key in keys]


def leftovers(store: Store, interrupted: bool = False) -> list[Removal]:
    """Return what nobody needs: what killed processes left, and runs with nothing to go on from.

    Runs at work are passed over.

    Args:
        store: Runs and records.
        interrupted: Take unfinished runs with all that they could go on from, too.
    """
    found = []
    for key in reversed(store.run_keys()):
        folder = store.run(key)
        if folder.held:
            continue
        if not folder.finished and (interrupted or not folder.can_go_on()):
            what = "interrupted run" if folder.can_go_on() else "run that had hardly begun"
            found.append(Removal(what, key, (folder.path,), whole=True))
        elif places := folder.leftovers():
            found.append(Removal("left by a process that was killed", key, tuple(places)))
    return found


def _key(store: Store, ref: str) -> str:
    known = {*store.run_keys(), *(path.stem for path in record_files(store.records))}
    fits = [key for key in known if key == ref or (len(ref) >= 4 and key.startswith(ref))]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UserError(f"{ref!r} fits {len(fits)} runs.", f"They are: {_some(sorted(fits))}.")
    raise UserError(
        f"There is no run {ref!r} in {store.root}.",
        "Give its key, or at least four digits of it; see: effbench runs",
    )


def _refuse_running(folder: RunFolder) -> None:
    if folder.held:
        raise UserError(f"Run {folder.key} is at work.", "Stop it first, or wait for its end.")


def _heirs(store: Store, key: str) -> set[str]:
    """Return the runs that started from a run."""
    found = {head.key for head in heads(store.records, store.index) if head.parent == key}
    folders = (store.run(k) for k in store.run_keys())
    return found | {folder.key for folder in folders if folder.parent() == key}


def _whole(store: Store, key: str) -> Removal:
    places = (store.run(key).path, store.records / f"{key}.json")
    return Removal("run", key, tuple(p for p in places if p.exists()), whole=True)


def _some(keys: Collection[str]) -> str:
    shown = ", ".join([*keys][:6])
    return shown if len(keys) <= 6 else f"{shown} and {len(keys) - 6} more"
