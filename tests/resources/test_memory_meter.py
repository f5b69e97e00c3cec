"""Peaks of phases, and what is said where the system cannot tell them apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from effbench.resources import memory
from effbench.resources.memory import Peak, PeakMemory

MIB = 2**20
needs_reset = pytest.mark.skipif(
    not memory._reset_resident_peak(), reason="the system cannot set the resident peak back"
)


@needs_reset
def test_a_later_phase_does_not_inherit_an_earlier_peak() -> None:
    """In a process of its own, where nothing else can be freed inside of a phase."""
    script = (
        "from effbench.resources.memory import PeakMemory\n"
        "for phase, size in (('large', 128), ('small', 32)):\n"
        "    with PeakMemory(phase=phase) as measured:\n"
        "        block = bytearray(b'1') * (size * 2**20)\n"
        "        del block\n"
        "    peak = measured.peak\n"
        "    print(peak.phase, peak.method, peak.added_bytes)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    large, small = (line.split() for line in done.stdout.splitlines())
    assert (large[:2], small[:2]) == (["large", "resident"], ["small", "resident"])
    assert 110 * MIB < int(large[2]) < 150 * MIB
    assert 24 * MIB < int(small[2]) < 60 * MIB


@needs_reset
def test_the_peak_of_a_fresh_process_is_what_it_allocates() -> None:
    script = (
        "import resource\n"
        "from effbench.resources.memory import PeakMemory\n"
        "with PeakMemory() as m:\n"
        "    block = bytearray(b'1') * (200 * 2**20)\n"
        "    del block\n"
        "largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "print(m.peak.added_bytes, m.peak.peak_bytes, largest)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    added, peak, largest = map(int, done.stdout.split())
    assert 200 * MIB - MIB < added < 216 * MIB
    assert peak <= largest + 4 * MIB  # the system's figure may include the parent's from before


def test_without_a_reset_the_method_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "absent" / "clear_refs")
    with PeakMemory(phase="train") as measured:
        pass
    assert measured.peak.method == "since start"
    assert measured.peak.peak_bytes >= measured.peak.start_bytes > 0


def test_a_reset_that_does_nothing_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t  900000 kB\nVmRSS:\t  100000 kB\n")
    monkeypatch.setattr(memory, "STATUS", status)
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "clear_refs")
    assert not memory._reset_resident_peak()
    status.write_text("VmHWM:\t  100004 kB\nVmRSS:\t  100000 kB\n")
    assert memory._reset_resident_peak()


def test_the_peak_is_there_after_an_error_but_not_before_the_end() -> None:
    measured = PeakMemory(phase="load")
    with pytest.raises(RuntimeError, match="not over"):
        _ = measured.peak
    with pytest.raises(KeyError), measured:
        raise KeyError
    assert isinstance(measured.peak, Peak)
