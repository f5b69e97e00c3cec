"""What this machine computes on, found out without importing torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
MEMORY_INFO = Path("/proc/meminfo")
DEVICES = Path("/dev")
GPU_FILE = re.compile(r"nvidia\d")
NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")
"""CPU flags of bfloat16 matrix products: x86, then Arm."""
REPACKING_FLAG = "avx512_bf16"
"""CPU flag on which bitsandbytes repacks 4-bit weights; see `effbench doctor`."""
FIRST_BF16_CAPABILITY = 8.0
"""Lowest CUDA compute capability with bfloat16 tensor cores (Ampere)."""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as its driver describes it."""

    name: str
    memory_mib: int
    capability: float
    driver: str


@cache
def cpu_name() -> str:
    """Return the CPU's model name."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


@cache
def cpu_flags() -> frozenset[str]:
    """Return the CPU's feature flags; none where the system does not list them."""
    return frozenset((_cpu_field("flags") or _cpu_field("Features")).split())


def _cpu_field(name: str) -> str:
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == name)
    return next(found, "")


@cache
def has_triton() -> bool:
    """Whether Triton is installed, which makes the kernels of CUDA devices."""
    return find_spec("triton") is not None


def cores() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> tuple[int, int]:
    """Return the main memory in all and what is free for use; zeros where it is not known."""
    try:
        pairs = (line.split(":") for line in MEMORY_INFO.read_text().splitlines())
        kib = {name: int(value.split()[0]) for name, value in pairs}
    except (OSError, ValueError):
        return 0, 0
    return kib["MemTotal"] * 1024, kib.get("MemAvailable", kib["MemFree"]) * 1024


@cache
def gpus() -> tuple[Gpu, ...]:
    """Return the CUDA devices that nvidia-smi lists."""
    if not shutil.which("nvidia-smi"):
        return ()
    fields = "name,memory.total,compute_cap,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        rows = [[part.strip() for part in row.split(",")] for row in answer.stdout.splitlines()]
        return tuple(Gpu(name, int(mib), float(cap), version) for name, mib, cap, version in rows)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


def has_cuda_files() -> bool:
    """Whether there are device files of an NVIDIA GPU that this process may use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    return _lists_gpus(DEVICES)


@cache
def _lists_gpus(devices: Path) -> bool:
    """Whether a folder of device files holds those of an NVIDIA GPU."""
    names = [path.name for path in devices.iterdir()] if devices.is_dir() else []
    return any(map(GPU_FILE.match, names)) or ("dxg" in names and bool(gpus()))


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    folder = Path(spec.origin).parent / "lib"
    return any((folder / name).exists() for name in ("libtorch_cuda.so", "torch_cuda.dll"))


def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices natively."""
    return not cpu_flags().isdisjoint(NATIVE_BF16)


def default_device() -> str:
    """Return what `hardware.device=auto` stands for: `cuda` where it can be used, else `cpu`."""
    return "cuda" if has_cuda_files() and torch_has_cuda() else "cpu"


def default_dtype(device: str) -> str:
    """Return what `hardware.dtype=auto` stands for: bfloat16 where it is native, else float32."""
    if device.startswith("cuda"):
        native = all(gpu.capability >= FIRST_BF16_CAPABILITY for gpu in gpus())
    else:
        native = native_bf16()
    return "bfloat16" if native else "float32"
