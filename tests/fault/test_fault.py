"""The short form of `make fault`: a few of each: kills, damaged files, hostile and wrong words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(sys, "addaudithook") or sys.platform != "linux", reason="forks")
def test_kills_damage_hostile_files_and_mistyped_commands_in_short() -> None:
    """In a process of its own: forks of one in which threads were at work may hang."""
    command = [sys.executable, str(Path(__file__).with_name("fault.py")), "--short"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 18, done.stdout
