"""Run folders: one per key, locked while in use, finished only when the marker stands.

```
results/runs/<key>/
    spec.json  environment.json  events.jsonl  log.txt
    data.json            hashes of the rows that were trained on, and of their values
    checkpoint.pt        the last checkpoint of an unfinished run
    parts/               finished parts of an unfinished compression
    evaluations/         finished evaluations of an unfinished run
    artefact/            what the run made
    FINISHED             written last
results/records/<key>.json
```
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.api.stages import base as stages
from effbench.util.errors import NewerVersionError, UserError, did_you_mean
from effbench.util.files import mendable, remove, scratch_in, write_atomic
from effbench.util.locks import locked

if TYPE_CHECKING:
    from effbench.api.spec import Spec

MARKER = "FINISHED"


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
        """Seconds since the epoch at which a finished run came to its end."""
        return float((self.path / MARKER).read_text())

    @property
    def artefact(self) -> Path:
        """Folder of what the run made."""
        return self.path / "artefact"

    @property
    def checkpoint(self) -> Path:
        """File of the last checkpoint."""
        return self.path / "checkpoint.pt"

    def create(self, spec: Spec) -> None:
        """Make the folder with its spec."""
        with mendable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        from effbench.api.schema import plain

        self.write_json("spec.json", plain(spec))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically."""
        write_atomic(self.path / name, json.dumps(value, indent=1, sort_keys=True) + "\n")

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file, or None when it is not there."""
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else None

    def finish(self) -> None:
        """Mark the run as finished and drop what only an unfinished one needs."""
        write_atomic(self.path / MARKER, f"{time.time():.3f}\n")
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
        kept = (MARKER, "checkpoint.pt", "artefact", "parts/*", "evaluations/*")
        if not any(any(self.path.glob(name)) for name in kept):
            self.clear()

    @contextmanager
    def locked(self, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the run alone; wait for another process that holds it.

        Args:
            on_wait: Called once with the holder's description before waiting.
        """
        lock = self.path.parent / f".{self.key}.lock"
        with ExitStack() as held:
            with mendable(lock):
                lock.parent.mkdir(parents=True, exist_ok=True)
                keep_out_of_git(lock.parent)
                held.enter_context(locked(lock, on_wait))
            yield


def keep_out_of_git(runs: Path) -> None:
    """Have git pass over the folder of all runs, which are large and can be made again."""
    ignore = runs / ".gitignore"
    if not ignore.exists():
        write_atomic(ignore, "*\n")


class Store:
    """All runs and records under one results folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs = root / "runs"
        self.records = root / "records"
        self.index = self.runs / ".records.json"
        """What lists say of the records; can be deleted at any time."""

    def run(self, key: str) -> RunFolder:
        """Return the folder of a key, whether it exists or not."""
        return RunFolder(self.runs / key)

    def sweep(self, key: str) -> None:
        """Remove what a killed process left of a run; it must be locked."""
        self.run(key).sweep()
        for place in self.records.glob(f".{key}.json.*.part"):
            remove(place)

    def run_keys(self) -> list[str]:
        """Return the keys of all run folders, newest first."""
        if not self.runs.is_dir():
            return []
        folders = [p for p in self.runs.iterdir() if (p / "spec.json").is_file()]
        return [p.name for p in sorted(folders, key=lambda p: p.stat().st_mtime, reverse=True)]

    def resolve(self, ref: str) -> str:
        """Return the full key of a finished run.

        Args:
            ref: A key, a unique prefix of one, or `latest`.

        Raises:
            UserError: When no run, several runs or only an unfinished run fits.
        """
        keys = self.run_keys()
        if ref == "latest":
            finished = [k for k in keys if self.run(k).finished]
            if not finished:
                raise UserError(
                    f"There is no finished run in {self.root}.", "Run effbench train first."
                )
            return max(finished, key=lambda k: self.run(k).finished_at)
        fits = [k for k in keys if k.startswith(ref)]
        if not fits:
            raise UserError(
                f"There is no run {ref!r} in {self.root}.",
                did_you_mean(ref, keys) + " See: effbench runs",
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

        path = self.run(key).path / "spec.json"
        try:
            return build(Spec, present_spec(json.loads(path.read_text())), "spec")
        except NewerVersionError as error:
            raise UserError(
                f"Run {key} was made by a newer effbench: {error.message}.",
                "Upgrade effbench to go on from it.",
            ) from None
        except (UserError, ValueError, OSError) as error:
            raise UserError(
                f"The spec of run {key} cannot be read: {str(error).splitlines()[0]}",
                "Its folder is gone or damaged; give its command again.",
            ) from None

    def ancestors(self, spec: Spec) -> dict[str, Spec]:
        """Return the runs that made what `spec` starts from, by key, first to last.

        Runs that make nothing, evaluations for one, are left out.
        """
        chain: dict[str, Spec] = {}
        key = spec.parent
        while key:
            parent = self.spec_of(key)
            if stages.find(parent.stage).makes:
                chain = {key: parent, **chain}
            key = parent.parent
        return chain
