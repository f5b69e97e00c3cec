"""That no test reaches another machine: the guard itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import network_guard
import pytest


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Note attempts elsewhere, so that this test does not fail by them."""
    monkeypatch.setenv(network_guard.TRIED, str(tmp_path / "tried"))
    return tmp_path / "tried"


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "nowhere.example"])
def test_what_reaches_out_is_refused_and_named(tried: Path, host: str) -> None:
    with pytest.raises(OSError, match=f"{host}:443"):
        socket.create_connection((host, 443), timeout=1)
    assert network_guard.attempts().startswith(f"{host}:443 (process {os.getpid()}")
    assert not network_guard.attempts() and not tried.exists()


def test_so_is_what_a_process_of_a_test_does(tried: Path) -> None:
    code = "import socket; assert socket.socket().connect_ex(('192.0.2.1', 80))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert "this is 192.0.2.1:80" in done.stderr
    assert network_guard.attempts().startswith("192.0.2.1:80")


def test_this_machine_is_reached(tried: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, port), timeout=5).close()
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "s"))
        server.listen()
        client.connect(str(tmp_path / "s"))
    assert not tried.exists()
