"""What a run ran on: versions, code, processor, memory and devices; no host names and no paths."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "effbench",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "datasets",
    "safetensors",
    "tokenizers",
    "triton",
    "numpy",
)
"""Packages whose version can change a result."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
"""Environment variables that say how much of the machine a run may use."""

FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Processor features that choose a kernel, as the kernel names them."""

CODE = ("effbench", "conf", "pyproject.toml")
"""Parts of a checkout that can change a result; a new record in it cannot."""


def fingerprint() -> dict[str, Any]:
    """Return the environment as plain JSON values; what cannot be found out is left out.

    torch is not imported: its version is read from the package's metadata.
    """
    return {
        "packages": {**_versions()},
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        **_code(Path(__file__).resolve().parents[2]),
        "cpu": _processor(),
        "threads": {name: os.environ[name] for name in THREADS if name in os.environ},
        "memory_bytes": _memory(),
        "gpus": _gpus(),
    }


@cache
def _versions() -> dict[str, str]:
    """Return the versions, read once in a process: a package's whole metadata is parsed for it."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _code(root: Path) -> dict[str, Any]:
    """Return the commit of the checkout that the code runs from, if it runs from one."""
    if not (root / ".git").exists():
        return {}
    git = ("git", "-C", str(root), "--no-optional-locks")
    commit = _output(*git, "rev-parse", "HEAD")
    if commit is None:
        return {}
    changes = _output(*git, "status", "--porcelain", "--", *CODE)
    return {"commit": commit.strip(), "dirty": bool(changes)}


def _processor() -> dict[str, Any]:
    facts = _cpuinfo()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    model = facts.get("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {"model": model, "cores": cores, "features": [f for f in FEATURES if f in flags]}


def _cpuinfo() -> dict[str, str]:
    """Return the facts about the first processor, on Linux."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory() -> int:
    """Return the bytes that the process may use: the machine's, or its control group's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _gpus() -> list[dict[str, Any]]:
    fields = "name,driver_version,memory.total"
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    rows = [[part.strip() for part in line.split(",")] for line in (text or "").splitlines()]
    return [{"name": r[0], "driver": r[1], "memory_mib": r[2]} for r in rows if len(r) == 3]


def _output(*command: str) -> str | None:
    """Return what a command prints, or None when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
