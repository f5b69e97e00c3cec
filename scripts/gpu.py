"""Run everything that matters on a GPU, within a budget of seconds, and print one table.

Each file in scripts/gpu is a stage. It runs in a process of its own, under a time limit of its own
and what is left of the budget; its rows are on disk before the next one starts, a stage that fails
stops no other, and one that is finished is not run again.

    python scripts/gpu.py --budget 540 --out build/gpu            all of them
    python scripts/gpu.py --only decode                           one (may be given several times)
    python scripts/gpu.py --rehearse                              the same on the CPU, tiny

Needs no network. Records go to OUT/results; `--keep` copies them to results/records.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from gpu_stage import ROOT, Row, Stage, environment, load, rows, stages

ENOUGH = 15
"""Seconds of the budget below which no further stage is started."""
REHEARSAL = "Try `make gpu-rehearsal`, which runs the same on the CPU with tiny shapes."


def main(words: Sequence[str] | None = None) -> int:
    """Run the stages; return 1 when one of them failed, and 2 when nothing could be started."""
    options = _options(words)
    out = Path(options.out).resolve()
    if options.stage:
        return _run_here(options.stage, out, options.rehearse)
    known = stages()
    if unknown := [name for name in options.only if name not in known]:
        return _refuse(f"There is no stage {unknown[0]!r}.", f"Stages: {', '.join(known)}.")
    modules = {n: load(p) for n, p in known.items() if not options.only or n in options.only}
    first = next(iter(modules))
    least = 0 if options.rehearse else modules[first].SECONDS
    if options.budget < least:
        return _refuse(
            f"--budget {options.budget} is less than the {least} s of the first stage, {first}.",
            "Give more, or choose a shorter stage with --only.",
        )
    if not options.rehearse and (reason := _unusable()):
        return _refuse(*reason)
    out.mkdir(parents=True, exist_ok=True)
    _run_all(modules, out, options)
    print(_table(modules, out), flush=True)
    (out / "table.md").write_text(_table(modules, out, markdown=True) + "\n")
    if options.keep:
        _keep(out)
    states = [_state(out, name).get("state") for name in modules]
    return 0 if all(state == "done" for state in states) else 1


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=int, default=540, help="seconds in all (540)")
    parser.add_argument("--out", default="build/gpu", help="folder of the results (build/gpu)")
    parser.add_argument("--only", action="append", default=[], help="run this stage alone")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--keep", action="store_true", help="copy records to results/records")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def _refuse(message: str, hint: str) -> int:
    print(f"Error: {message}\n{hint}", file=sys.stderr)
    return 2


def _unusable() -> tuple[str, str] | None:
    """Return why no CUDA device can be used, and what to do; None when one can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed.", f"See docs/offline.md. {REHEARSAL}"
    if torch.cuda.is_available():
        return None
    if not torch.version.cuda:
        return f"torch {torch.__version__} is a build without CUDA.", REHEARSAL
    if not shutil.which("nvidia-smi"):
        return "This machine has no CUDA device.", REHEARSAL
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    driver = found.stdout.strip() or found.stderr.strip() or "no driver answers"
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use this device: {driver}.",
        f"The driver may be older than this torch needs: take an older torch. {REHEARSAL}",
    )


# -- the driver ------------------------------------------------------------------------------------


def _run_all(modules: dict[str, ModuleType], out: Path, options: argparse.Namespace) -> None:
    begun = time.monotonic()
    for number, (name, module) in enumerate(modules.items(), 1):
        left = options.budget - (time.monotonic() - begun)
        place = f"[{number}/{len(modules)}] {name}"
        if _finished(out, name, options.rehearse):
            print(f"{place}: finished before", flush=True)
        elif left < ENOUGH:
            print(f"{place}: not started, {max(0, left):.0f} s are left", flush=True)
        else:
            limit = min(module.SECONDS, left)
            title = (module.__doc__ or "").splitlines()[0]
            print(f"{place}: {title} (at most {limit:.0f} s of {left:.0f})", flush=True)
            state, seconds = _run_one(name, out, options.rehearse, limit)
            print(f"{place}: {state} after {seconds:.0f} s", flush=True)


def _run_one(name: str, out: Path, tiny: bool, limit: float) -> tuple[str, float]:
    """Run a stage in a process group of its own; write and return how it ended, and its seconds."""
    (out / f"{name}.rows.jsonl").unlink(missing_ok=True)
    words = [sys.executable, str(Path(__file__)), "--stage", name, "--out", str(out)]
    start = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [*words, *(["--rehearse"] if tiny else [])],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | environment(),
            start_new_session=True,
        )
        try:
            state = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            _end(process)
    seconds = time.monotonic() - start
    facts = {"state": state, "seconds": round(seconds, 1), "rehearsal": tiny}
    (out / f"{name}.json").write_text(json.dumps(facts) + "\n")
    return state, seconds


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _run_here(name: str, out: Path, tiny: bool) -> int:
    stage = Stage(name, out, tiny)
    os.chdir(out)
    with stage.part(name):
        load(stages()[name]).run(stage)
    return 1 if stage.failures else 0


def _state(out: Path, name: str) -> dict[str, object]:
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _finished(out: Path, name: str, tiny: bool) -> bool:
    state = _state(out, name)
    return state.get("state") == "done" and state.get("rehearsal") == tiny


def _keep(out: Path) -> None:
    for path in (out / "results" / "records").glob("*.json"):
        shutil.copy(path, ROOT / "results" / "records")


# -- the table -------------------------------------------------------------------------------------


def _table(modules: dict[str, ModuleType], out: Path, markdown: bool = False) -> str:
    head = ("stage", "what", "value", "asked", "", "record")
    lines = [head]
    for name in modules:
        state = _state(out, name)
        found = rows(out, name)
        lines += [
            (name, row.what, _value(row), _asked(row), _verdict(row), row.key) for row in found
        ]
        if state.get("state", "not run") != "done":
            lines.append((name, f"({state.get('state', 'not run')})", "", "", "", ""))
    if markdown:
        bars = [" | ".join(line) for line in (head, ["---"] * len(head), *lines[1:])]
        return "\n".join(f"| {bar} |" for bar in bars)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rule = tuple("-" * width for width in widths)
    shown = (head, rule, *lines[1:])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in shown
    )


def _value(row: Row) -> str:
    if row.value is None:
        return row.note
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(row.value) >= 10 * power:
            return f"{row.value / power:,.4g} {prefix}{row.unit}".strip()
    return f"{row.value:.4g} {row.unit}".strip() + (f" ({row.note})" if row.note else "")


def _asked(row: Row) -> str:
    low = "" if row.at_least is None else f">= {row.at_least:g}"
    high = "" if row.at_most is None else f"<= {row.at_most:g}"
    return ", ".join(filter(None, (low, high)))


def _verdict(row: Row) -> str:
    return {True: "reached", False: "missed", None: ""}[row.reached]


if __name__ == "__main__":
    sys.exit(main())
