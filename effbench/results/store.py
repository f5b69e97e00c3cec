"""Run folders: one per key, locked while in use, finished only when the marker stands.

```
results/runs/<key>/
    spec.json  environment.json  events.jsonl  log.txt
    manifest.jsonl       hashes of the other files: `results/manifest.py`
    data.json            hashes of the rows that were trained on, and of their values
    checkpoint.pt        the last checkpoint of an unfinished run
    parts/               finished parts of an unfinished compression
    evaluations/         what each evaluator found at each point, and finished items meanwhile
    artefact/            what the run made
    FINISHED             written last: when, and the hash of the manifest
results/records/<key>.json
```
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.api.stages import base as stages
from effbench.results.manifest import ANEW, Manifest, damaged
from effbench.util.errors import NewerVersionError, UserError, did_you_mean
from effbench.util.files import (
    atomic_path,
    mendable,
    remove,
    scratch_in,
    sweep_stale,
    tree_bytes,
    write_atomic,
)
from effbench.util.locks import is_held, locked
from effbench.util.seals import seal_of

if TYPE_CHECKING:
    from effbench.api.spec import Spec

MARKER = "FINISHED"
ARTEFACT = "artefact"
IGNORE = ".gitignore"
TRIES = 10
"""How often the folder of a lock is made again that vanishes before the lock is held."""


def results_dir() -> Path:
    """Return the folder of runs and records where no command names one: EFFBENCH_RESULTS, else
    `results` here."""
    return Path(os.environ.get("EFFBENCH_RESULTS") or "results").expanduser()


def evaluation_stem(evaluator: str, point: str) -> str:
    """Return how the files in `evaluations/` begin that an evaluator writes at a point.

    Args:
        evaluator: Its name.
        point: The name of the operating point.
    """
    return f"{evaluator}@{point}" if point else evaluator


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest(path)

    @property
    def key(self) -> str:
        """The run key."""
        return self.path.name

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; a half-written run never does."""
        return (self.path / MARKER).is_file()

    @property
    def finished_at(self) -> float:
        """Seconds since the epoch at which a finished run came to its end.

        Raises:
            UserError: When the marker is damaged.
        """
        path = self.path / MARKER
        try:
            when, *seal = path.read_text().split()
            if seal and seal != [self._seal(when)]:
                raise damaged(
                    path, f"it does not fit {self.manifest.path.name}, or that is damaged"
                )
            return float(when)
        except (ValueError, OSError):
            raise damaged(path, "it does not say when the run ended") from None

    def _seal(self, when: str) -> str:
        """Return what the marker of a run that ended then says beside it."""
        return seal_of(f"{when} {self.manifest.hash()}")

    @property
    def artefact(self) -> Path:
        """Folder of what the run made."""
        return self.path / ARTEFACT

    @property
    def checkpoint(self) -> Path:
        """File of the last checkpoint."""
        return self.path / "checkpoint.pt"

    def create(self, spec: Spec) -> None:
        """Make the folder with its spec."""
        with mendable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        from effbench.api.schema import plain

        self.manifest.begin()
        self.write_json("spec.json", plain(spec))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield where to write a file of the run, which takes its place once it is whole.

        Args:
            name: Its place in the run folder, with slashes.

        Raises:
            UserError: When the place cannot be written.
        """
        announce = partial(self.manifest.announce, name)
        with atomic_path(self.path / name, announce) as part:
            yield part

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the run, whole or not at all."""
        with self.writing(name) as part:
            part.write_text(text, encoding="utf-8")

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run, whole or not at all."""
        self.write_text(name, json.dumps(value, indent=1, sort_keys=True) + "\n")

    def check(self, name: str, whole: bool = True, hint: str = ANEW) -> Path:
        """Return the place of a file of the run, which is what the run wrote.

        Args:
            name: Its place in the run folder, with slashes.
            whole: Whether a large file is hashed too; else its size is compared.
            hint: What to do when it is damaged.

        Raises:
            UserError: When it is damaged or gone.
        """
        self._check_marker()
        self.manifest.check(name, whole, hint)
        return self.path / name

    def check_artefact(self, whole: bool) -> Path:
        """Return the folder of what the run made, after a check of all its files.

        Args:
            whole: As for `check`.

        Raises:
            UserError: When one is damaged or gone.
        """
        self._check_marker()
        for name in self.manifest.names(ARTEFACT):
            self.manifest.check(name, whole)
        return self.artefact

    @property
    def _lock(self) -> Path:
        return self.path.parent / f".{self.key}.lock"

    def _check_marker(self) -> None:
        if self.finished:
            _ = self.finished_at

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file of the run, or None when it never wrote it.

        Raises:
            UserError: When it is damaged or gone.
        """
        path = self.path / name
        self._check_marker()
        if path.exists() or self.manifest.has(name):
            self.check(name)
        if not path.exists():
            return None
        try:
            return json.loads(path.read_bytes())
        except (ValueError, OSError) as error:
            raise damaged(path, str(error)) from None

    def finish(self) -> None:
        """Mark the run as finished and drop what only an unfinished one needs."""
        log = self.path / "events.jsonl"
        if log.is_file():
            self.manifest.announce(log.name, log)
        when = f"{time.time():.3f}"
        write_atomic(self.path / MARKER, f"{when}\n{self._seal(when)}\n")
        self.sweep()

    def leftovers(self) -> list[Path]:
        """Return what nobody needs: half-written files, and the state of a run that is finished."""
        done = (self.checkpoint, self.path / "parts") if self.finished else ()
        return [*scratch_in(self.path), *(place for place in done if place.exists())]

    def sweep(self) -> None:
        """Remove what a killed process left behind; the run must be locked."""
        for place in self.leftovers():
            remove(place)

    def clear(self) -> None:
        """Forget everything about the run; the marker goes first."""
        (self.path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def discard_unless_begun(self) -> None:
        """Drop an unfinished run that has nothing to go on from."""
        if not self.can_go_on():
            self.clear()

    def can_go_on(self) -> bool:
        """Whether there is anything of the run that the same command would not do again."""
        kept = (MARKER, "checkpoint.pt", "artefact", "parts/*", "evaluations/*")
        return any(any(self.path.glob(name)) for name in kept)

    def parent(self) -> str:
        """Return the key of the run that this one started from; empty without, or if damaged."""
        try:
            spec = self.read_json("spec.json")
        except UserError:
            return ""
        return str(spec.get("parent") or "") if isinstance(spec, dict) else ""

    def bytes_on_disk(self) -> int:
        """Return the bytes of all files of the run."""
        return tree_bytes(self.path)

    @property
    def held(self) -> bool:
        """Whether a process is on the run."""
        return is_held(self._lock)

    @contextmanager
    def locked(self, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the run alone; wait for another process that holds it.

        The lock's file goes when nothing of the run is there by then.

        Args:
            on_wait: Called once with the holder's description before waiting.
        """
        with ExitStack() as held:
            with mendable(self._lock):
                held.enter_context(self._acquired(on_wait))
            held.callback(self._drop_lock)
            yield

    def _acquired(
        self, on_wait: Callable[[str], None] | None, tries: int = TRIES
    ) -> ExitStack[bool | None]:
        """Return the lock, held; its folder may go meanwhile, with a run that is refused."""
        with ExitStack() as held:
            try:
                keep_out_of_git(self._lock.parent)
                held.enter_context(locked(self._lock, on_wait))
            except FileNotFoundError:
                if not tries:
                    raise
                return self._acquired(on_wait, tries - 1)
            return held.pop_all()

    def _drop_lock(self) -> None:
        """Remove the file of the lock, which is held, unless there is a run to lock."""
        if not self.path.exists():
            self._lock.unlink(missing_ok=True)


def record_files(folder: Path) -> list[Path]:
    """Return the files of the records in a folder, sorted by key."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as files:
        return [folder / name for name in sorted(f.name for f in files if is_record(f.name))]


def is_record(name: str) -> bool:
    """Whether a file of that name is a record, and not one that is being written."""
    return name.endswith(".json") and not name.startswith(".")


def keep_out_of_git(runs: Path) -> None:
    """Have git pass over the folder of all runs, which are large and can be made again."""
    ignore = runs / IGNORE
    if not (ignore.is_file() and ignore.stat().st_size):
        runs.mkdir(parents=True, exist_ok=True)
        ignore.write_text("*\n")


class Store:
    """All runs and records under one results folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs = root / "runs"
        self.records = root / "records"
        self.index = self.runs / ".records.json"
        """What lists say of the records; can be deleted at any time."""
        self.rows = self.runs / ".rows.json"
        """What the report shows of them; can be deleted at any time."""

    def run(self, key: str) -> RunFolder:
        """Return the folder of a key, whether it exists or not."""
        return RunFolder(self.runs / key)

    def missing(self) -> list[Path]:
        """Return the folders that a first run makes to be kept in, innermost first."""
        return [p for p in (self.runs, *self.runs.parents) if not p.exists()]

    def give_back(self, made: Sequence[Path]) -> None:
        """Remove folders that `missing` named, as far as there is nothing in them.

        Args:
            made: As `missing` gave them before what was refused.
        """
        for folder in made:
            with suppress(OSError):
                if [file.name for file in folder.iterdir()] == [IGNORE]:
                    (folder / IGNORE).unlink()
                folder.rmdir()
        if self.runs.is_dir():  # another run has begun meanwhile
            keep_out_of_git(self.runs)

    def sweep(self, key: str) -> None:
        """Remove what a killed process left of a run; it must be locked."""
        self.run(key).sweep()
        for place in self.records.glob(f".{key}.json.*.part"):
            remove(place)
        for folder in (self.runs, self.records):
            sweep_stale(folder)

    def run_keys(self, start: str = "") -> list[str]:
        """Return the keys of all run folders, newest first.

        Args:
            start: What they start with.
        """
        if not self.runs.is_dir():
            return []
        named = (p for p in self.runs.iterdir() if p.name.startswith(start))
        folders = [p for p in named if (p / "spec.json").is_file()]
        return [p.name for p in sorted(folders, key=lambda p: p.stat().st_mtime, reverse=True)]

    def resolve(self, ref: str) -> str:
        """Return the full key of a finished run.

        Args:
            ref: A key, a unique prefix of one, or `latest`.

        Raises:
            UserError: When no run, several runs or only an unfinished run fits.
        """
        if ref == "latest":
            finished = [k for k in self.run_keys() if self.run(k).finished]
            if not finished:
                raise UserError(
                    f"There is no finished run in {self.root}.", "Run effbench train first."
                )
            return max(finished, key=lambda k: self.run(k).finished_at)
        fits = self.run_keys(ref)
        if not fits:
            raise UserError(
                f"There is no run {ref!r} in {self.root}.",
                did_you_mean(ref, self.run_keys()) + " See: effbench runs",
            )
        if len(fits) > 1:
            raise UserError(f"{ref!r} fits {len(fits)} runs.", f"They are: {', '.join(fits[:6])}.")
        if not self.run(fits[0]).finished:
            raise UserError(
                f"Run {fits[0]} is not finished.",
                "Give its command again: it goes on from where it stopped.",
            )
        return fits[0]

    def spec_of(self, key: str) -> Spec:
        """Return the spec of a run.

        Raises:
            UserError: When the run is gone, or this version cannot read its spec.
        """
        from effbench.api.schema import build
        from effbench.api.spec import Spec
        from effbench.results.migrations import present_spec

        folder = self.run(key)
        try:
            return build(Spec, present_spec(folder.read_json("spec.json")), "spec")
        except NewerVersionError as error:
            raise UserError(
                f"Run {key} was made by a newer effbench: {error.message}.",
                "Upgrade effbench to go on from it.",
            ) from None
        except (UserError, ValueError, OSError) as error:
            raise UserError(
                f"The spec of run {key} cannot be read: {str(error).splitlines()[0]}",
                "Its folder is gone or damaged; give its command again, with --fresh.",
            ) from None

    def ancestors(self, spec: Spec) -> dict[str, Spec]:
        """Return the runs that made what `spec` starts from, by key, first to last.

        Runs that make nothing, evaluations for one, are left out.
        """
        chain: dict[str, Spec] = {}
        key, passed = spec.parent, set[str]()
        while key:
            if key in passed:
                raise damaged(self.run(key).path / "spec.json", "its run goes on from itself")
            passed.add(key)
            parent = self.spec_of(key)
            if stages.find(parent.stage).makes:
                chain = {key: parent, **chain}
            key = parent.parent
        return chain
