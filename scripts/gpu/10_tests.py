"""Bits and tolerances of every CUDA path: all tests marked `gpu`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gpu_stage import ROOT, FailedError, Row, Stage

SECONDS = 200


def run(stage: Stage) -> None:
    """Run the tests, and note how many passed and which did not."""
    report = stage.out / "tests.txt"
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *_files()]
    words += ["--basetemp", str(stage.out / "pytest")]
    device = "cpu" if stage.tiny else "cuda"
    try:
        said = stage.command("env", f"EFFBENCH_TEST_DEVICE={device}", *words, *_how(stage))
    except FailedError as error:
        said = Path(stage.out / f"{stage.name}.log").read_text()
        stage.failures += 1
        for name in re.findall(r"^FAILED (\S+)", said, re.MULTILINE):
            stage.note(Row(name.partition("::")[2], None, note="failed"))
        if "passed" not in said:
            stage.note(Row("tests", None, note=str(error)))
    report.write_text(said)
    for what in ("passed", "failed", "skipped"):
        found = re.findall(rf"(\d+) {what}", said)
        if found:
            limits = {"at_most": 0.0} if what == "failed" else {}
            stage.note(Row(f"tests {what}", float(found[-1]), **limits))


def _files() -> list[str]:
    """Return the files with tests for a GPU: to collect all tests takes half a minute."""
    mark = "pytest.mark.gpu"
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if mark in path.read_text()]


def _how(stage: Stage) -> list[str]:
    """Return words that use several processes; a rehearsal leaves out what takes long."""
    few = ["-k", "padded or greedy or nf4 or peak"]
    return few if stage.tiny else ["--numprocesses", "14", "--dist", "worksteal", "--durations=8"]
