"""Where kernels in Triton can run."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def triton_runs(device: str) -> None:
    """Skip what needs Triton where it cannot run: on a CPU outside its interpreter."""
    pytest.importorskip("triton")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("without a GPU, Triton needs TRITON_INTERPRET=1")
