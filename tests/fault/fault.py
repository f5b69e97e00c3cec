"""All fault checks in their long form: `make fault`. Prints a table; fails when anything is wrong.

Kills before every file operation of trainings, compressions and evaluations, kills at random
moments, full disks, damaged files, hostile folders and configs, mistyped commands and extreme
values. Everything runs in this process and its forks, on a tiny model, in a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from commands import try_commands, try_extremes
from crashes import End, Tally, random_kills, try_crash_points, try_full_disks
from damages import build_site, try_damages
from hostile import try_hostile
from scenes import RUNS, SHORT

from effbench.testing.bench import Bench

FAMILIES = ("kills", "full", "damage", "hostile", "commands", "extremes")
SHORT_FORM = {"kills": 151, "full": 331, "damage": 97, "hostile": 31, "extremes": 43}
"""Every how many points each family is tried in the form that takes seconds."""
SHORT_RUNS = ("train", "compress", "eval")


def main() -> int:
    """Run what is asked for and print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="kills in all, at least")
    parser.add_argument("--commands", type=int, default=2000, help="mistyped commands")
    parser.add_argument("--every", type=int, default=1, help="take only every n-th point or file")
    parser.add_argument("--short", action="store_true", help="the form that takes seconds")
    parser.add_argument("families", nargs="*", default=FAMILIES, metavar="FAMILY")
    chosen, wrong = parser.parse_args(), 0
    print(f"{'what':44} {'points':>7} {'tried':>7} {'wrong':>6} {'s':>6}", flush=True)
    with TemporaryDirectory() as scratch:
        os.environ["EFFBENCH_CACHE"] = f"{scratch}/cache"
        begun = time.perf_counter()
        for tally in tallies(Path(scratch), chosen):
            took, begun = time.perf_counter() - begun, time.perf_counter()
            counts = f"{tally.points:7} {tally.tried:7} {len(tally.wrong):6} {took:6.0f}"
            print(f"{tally.name:44} {counts}", *tally.wrong, sep="\n  ", flush=True)
            wrong += len(tally.wrong)
    return int(wrong > 0)


def tallies(scratch: Path, chosen: argparse.Namespace) -> Iterator[Tally]:
    """Yield the rows of the table."""

    def some(family: str) -> Callable[[int], bool]:
        every = SHORT_FORM[family] if chosen.short else chosen.every
        return lambda number: number % every == every // 2

    if "kills" in chosen.families:
        yield from _kills(scratch, chosen, some)
    if "damage" in chosen.families:
        yield try_damages(build_site(scratch / "results", chosen.short), some("damage"))
    if "hostile" in chosen.families:
        yield try_hostile(scratch / "hostile", some("hostile"))
    if "commands" in chosen.families:
        count, every = (200, 7) if chosen.short else (chosen.commands, 1)
        yield from try_commands(scratch / "commands", count, every)
    if "extremes" in chosen.families:
        every = 19 if chosen.short else 1
        yield try_extremes(scratch / "extremes", some("extremes"), every)


def _kills(
    scratch: Path, chosen: argparse.Namespace, some: Callable[[str], Callable[[int], bool]]
) -> Iterator[Tally]:
    killed, kept = 0, []
    for name in SHORT_RUNS if chosen.short else RUNS:
        place, (stage, *words) = scratch / name.replace(", ", "_"), RUNS[name]
        bench = Bench(place / "results")
        job = bench.job(stage, *SHORT, *words)  # type: ignore[arg-type]
        tally = try_crash_points(f"killed, {name}", bench, job, place / "copies", some("kills"))
        yield tally
        killed += tally.tried
        whole, start = End.of(bench, job), _fresh(place)
        kept.append((name, whole, job, start))
        if "full" in chosen.families:
            full = f"full disk, {name}"
            yield try_full_disks(full, whole, job, start, tally.points, some("full"))
    each = 0 if chosen.short else max(0, chosen.kills - killed) // len(kept)
    for seed, (name, whole, job, start) in enumerate(kept if each else []):
        yield random_kills(f"killed at random, {name}", whole, job, start, each, seed)


def _fresh(folder: Path) -> Callable[[], Bench]:
    count = 0

    def start() -> Bench:
        nonlocal count
        count += 1
        bench = Bench(folder / f"run{count}")
        bench.root.mkdir(parents=True)
        return bench

    return start


if __name__ == "__main__":
    sys.exit(main())
