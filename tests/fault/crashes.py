"""Every moment at which a kill could hit a run: the disk as it was before each file operation.

A run is watched once. Before each operation on a file below its results folder (open for writing,
rename, remove, make a folder, truncate, sync, a line for a log) the folder is copied: this is what
a kill at that moment leaves. Each copy that differs from the one before is then gone on from, in a
forked process, and has to end in what the undisturbed run ended in.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from effbench.api.spec import Job
from effbench.results.events import EventLog, read_events
from effbench.results.journal import Journal
from effbench.results.records import Metric, read
from effbench.testing.bench import Bench, contents
from effbench.util.errors import UserError
from effbench.util.files import scratch_in

CHANGING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
"""Audit events of operations that change a folder; their first argument is a path."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
TAKEN = {"time", "seconds", "joules", "peak_bytes", "energy", "source", "base_bytes", "phases"}
"""Facts of events that differ between two runs of anything."""
TIMED = {"s", "J", "tokens/s"}
"""Units of metrics that do."""
TAKEN_METRICS = {"peak_bytes", "base_bytes", "plan_error"}

_watch: Callable[[str, Path], None] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = any(c in mode for c in "wxa+") if mode else (flags or 0) & WRITING
        if not writes or not isinstance(path, str | os.PathLike):
            return
    elif event not in CHANGING or not isinstance(arguments[0], str | os.PathLike):
        return
    _watch(event, Path(arguments[0]))


_installed = False


@contextmanager
def watched(act: Callable[[str, Path], None]) -> Iterator[None]:
    """Call `act` with the name and path of each operation that changes a file, before it happens.

    What `act` does itself is not watched; what it raises, the operation raises.
    """
    global _installed, _watch
    if not _installed:
        sys.addaudithook(_audit)
        _installed = True

    def outer(event: str, path: Path) -> None:
        global _watch
        _watch = None
        try:
            act(event, path)
        finally:
            _watch = outer

    def before(name: str, call: Any, path: Callable[[Any], Path | None]) -> Any:
        def seen(first: Any, *rest: Any, **named: Any) -> Any:
            if _watch is not None and (place := path(first)) is not None:
                outer(name, place)
            return call(first, *rest, **named)

        return seen

    patched = (
        (os, "fsync", "fsync", lambda d: Path(f"/proc/self/fd/{d}").readlink()),
        (EventLog, "append", "line", lambda log: log._path),
        (Journal, "add", "line", lambda journal: journal._path),
    )
    usual = [(owner, name, getattr(owner, name)) for owner, name, _, _ in patched]
    try:
        for owner, name, kind, path in patched:
            setattr(owner, name, before(kind, getattr(owner, name), path))
        _watch = outer
        yield
    finally:
        _watch = None
        for owner, name, call in usual:
            setattr(owner, name, call)


# -- what a run ends in ----------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """All of a finished run that no clock enters."""

    metrics: list[Any]
    outcomes: list[Any]
    rest: list[Any]
    events: list[Any]
    artefact: dict[str, bytes]
    files: list[str]

    @classmethod
    def of(cls, bench: Bench, job: Job) -> End:
        """Return what a job ended in."""
        record, folder = read(bench.store.records / f"{job.spec.key}.json"), bench.folder(job)
        events = _once(read_events(folder.path / "events.jsonl"))
        return cls(
            [_number(m) for m in record.metrics],
            list(record.outcomes),
            [record.notes, record.data, record.spec, record.parent, folder.finished],
            events,
            contents(folder.artefact),
            sorted(str(p.relative_to(folder.path)) for p in folder.path.rglob("*"))
            + [str(p) for p in scratch_in(bench.root)],
        )

    def differs(self, other: End) -> str:
        """Return in what another end differs; empty when in nothing."""
        for name in vars(self):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine == theirs:
                continue
            if isinstance(mine, list):
                odd = [(a, b) for a, b in zip(mine, theirs, strict=False) if a != b][:1]
                return f"{name}: {len(mine)} and {len(theirs)}, first {odd}"[:300]
            return name
        return ""


def _once(events: Iterable[dict[str, Any]]) -> list[Any]:
    """Return events without what each session has of its own: how it loaded, how it was stopped.

    The parts of a compression stand first: what is on disk is not made again.
    """
    kept = [e for e in events if e["event"] != "interrupted" and e.get("name") != "load"]
    kept.sort(key=lambda e: e["event"] != "part")
    return [_settled(event) for event in kept]


def _number(metric: Metric) -> Any:
    timed = metric.unit in TIMED or metric.name in TAKEN_METRICS
    where = (metric.name, metric.point, metric.split, metric.task, metric.phase, metric.n)
    return where if timed else (*where, metric.value, metric.low, metric.high)


def _settled(event: dict[str, Any]) -> Any:
    if event["event"] == "metric":
        return _number(Metric(**{k: v for k, v in event.items() if k not in ("time", "event")}))
    return {k: v for k, v in event.items() if k not in TAKEN}


# -- kills -----------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the kills of one run."""

    name: str
    points: int = 0
    tried: int = 0
    wrong: list[str] = field(default_factory=list)


def in_a_fork(act: Callable[[], None], silent: bool = True) -> int:
    """Start a process that does something and ends; return its number."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        if silent:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 2)
        act()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(number: int) -> int:
    """Return the exit status of a forked process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def crash_points(bench: Bench, job: Job, copies: Path) -> tuple[list[tuple[str, Path]], int]:
    """Run a job; return what it was about to do and a copy of its results, for each operation.

    A copy that is as an earlier one is left out; how many operations there are comes second.
    """
    bench.root.mkdir(parents=True, exist_ok=True)
    found, states, count = list[tuple[str, Path]](), set[str](), 0

    def keep(event: str, path: Path) -> None:
        nonlocal count
        if not path.is_relative_to(bench.root):
            return
        count += 1
        what = f"{count}: {event} {path.relative_to(bench.root)}"
        for torn in (False, True) if event == "line" else (False,):
            copy = copies / f"{count}{'t' * torn}"
            shutil.copytree(bench.root, copy)
            if torn:
                with (copy / path.relative_to(bench.root)).open("a") as file:
                    file.write('{"time": 1')
            state = _state(copy)
            if state in states:
                shutil.rmtree(copy)
            else:
                states.add(state)
                found.append((what + " (torn)" * torn, copy))

    with watched(keep):
        bench.go(job)
    return found, count


def _state(folder: Path) -> str:
    found = blake2b()
    for place in sorted(folder.rglob("*")):
        found.update(str(place.relative_to(folder)).encode() + b"\0")
        if place.is_file():
            found.update(place.read_bytes())
    return found.hexdigest()


def try_crash_points(
    name: str, bench: Bench, job: Job, copies: Path, chosen: Callable[[int], bool] = lambda n: True
) -> Tally:
    """Go on from each moment at which a run could be killed; say which end in something else."""
    points, operations = crash_points(bench, job, copies)
    whole, tally = End.of(bench, job), Tally(name, operations)
    for number, (what, copy) in enumerate(points):
        if chosen(number):
            tally.tried += 1
            other = Bench(copy)
            if ended(in_a_fork(lambda b=other: b.go(job_in(job, b)))):  # type: ignore[misc]
                tally.wrong.append(f"{what}: it does not go on")
            elif odd := whole.differs(End.of(other, job)):
                tally.wrong.append(f"{what}: {odd}")
        shutil.rmtree(copy)
    return tally


def job_in(job: Job, bench: Bench) -> Job:
    """Return a job that works in another results folder."""
    from dataclasses import replace

    return replace(job, runtime=replace(job.runtime, results=str(bench.root)))


def random_kills(
    name: str, whole: End, job: Job, start: Callable[[], Bench], kills: int, seed: int
) -> Tally:
    """Kill runs of a job at random moments, again and again until each comes to its end.

    Args:
        name: For the table.
        whole: What the undisturbed run ended in.
        job: The run.
        start: Gives a results folder in which it has not begun.
        kills: How many at least.
        seed: Of the moments.
    """
    draw, tally, usual = random.Random(seed), Tally(name), 0.0
    while tally.tried < kills:
        bench = start()
        while True:
            begun = time.perf_counter()
            number = in_a_fork(lambda b=bench: b.go(job_in(job, b)))  # type: ignore[misc]
            if usual:
                time.sleep(draw.random() * usual)
                os.kill(number, signal.SIGKILL)
            status = ended(number)
            if status == -signal.SIGKILL:
                tally.tried += 1
                continue
            usual = usual or time.perf_counter() - begun
            break
        if status:
            tally.wrong.append("it does not go on")
        elif odd := whole.differs(End.of(bench, job)):
            tally.wrong.append(odd)
        shutil.rmtree(bench.root)
    tally.points = tally.tried
    return tally


# -- full disks ------------------------------------------------------------------------------------


def try_full_disks(
    name: str,
    whole: End,
    job: Job,
    start: Callable[[], Bench],
    operations: int,
    chosen: Callable[[int], bool],
) -> Tally:
    """Let the disk be full from the n-th operation on; then free it, and go on."""
    import errno

    tally = Tally(name, operations)

    def fill(bench: Bench, first: int) -> None:
        count = 0

        def full(event: str, path: Path) -> None:
            nonlocal count
            if path.is_relative_to(bench.root) and event != "line":  # whose file is open already
                count += 1
                if count >= first and event not in ("os.remove", "os.rmdir"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        try:
            with watched(full):
                bench.go(job_in(job, bench))
        except UserError as error:
            if "cannot be written" not in error.message:
                raise

    for first in filter(chosen, range(1, operations + 1)):
        bench = start()
        tally.tried += 1
        if ended(in_a_fork(lambda b=bench, n=first: fill(b, n), silent=False)):  # type: ignore
            tally.wrong.append(f"{first}: not a word of the user's")
        elif ended(in_a_fork(lambda b=bench: b.go(job_in(job, b)))):  # type: ignore[misc]
            tally.wrong.append(f"{first}: it does not go on")
        elif odd := whole.differs(End.of(bench, job)):
            tally.wrong.append(f"{first}: {odd}")
        shutil.rmtree(bench.root)
    return tally
