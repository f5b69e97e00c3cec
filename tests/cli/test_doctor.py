"""The doctor and what it knows about the hardware."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from effbench.cli import doctor
from effbench.cli.doctor import Check, report
from effbench.util import hardware, hf


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no hub, and nothing remembered from another test."""
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for cached in (hardware.cpu_name, hardware.cpu_flags, hardware.gpus, hf.hub_reachable):
        cached.cache_clear()


def found(name: str) -> Check:
    return next(c for c in report() if c.name == name)


def cpu_with(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nmodel name\t: Test CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr(hardware, "CPU_INFO", info)


def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    devices = tmp_path / "dev"
    devices.mkdir()
    (devices / "nvidia0").touch()
    monkeypatch.setattr(hardware, "DEVICES", devices)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tools = tmp_path / "bin"
    tools.mkdir()
    smi = tools / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho 'Test GPU, 81920, {capability}, 570.1'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx2", "float32"),
        ("fpu avx512f avx512_bf16", "bfloat16"),
        ("amx_bf16 amx_tile", "bfloat16"),
        ("fp asimd bf16", "bfloat16"),
        ("", "float32"),
    ],
)
def test_dtype_follows_the_processor(
    flags: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_with(flags, tmp_path, monkeypatch)
    assert hardware.default_dtype("cpu") == dtype
    assert hardware.native_bf16() == (dtype == "bfloat16")
    assert dtype in found("bfloat16").found or hardware.default_device() == "cuda"


def test_no_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "none")
    monkeypatch.setattr(hardware, "MEMORY_INFO", tmp_path / "none")
    assert not hardware.native_bf16()
    assert hardware.memory_bytes() == (0, 0)
    assert found("memory").status == "warn"


@pytest.mark.parametrize(("capability", "dtype"), [("9.0", "bfloat16"), ("7.0", "float32")])
def test_gpu_is_taken_and_its_age_counts(
    capability: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(tmp_path, monkeypatch, capability)
    monkeypatch.setattr(hardware, "torch_has_cuda", lambda: True)
    assert hardware.default_device() == "cuda"
    assert hardware.default_dtype("cuda") == dtype
    assert "Test GPU (80 GiB), driver 570.1" in found("device").found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.default_device() == "cpu"


def test_gpu_with_a_cpu_build_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(tmp_path, monkeypatch, "9.0")
    monkeypatch.setattr(hardware, "torch_has_cuda", lambda: False)
    assert hardware.default_device() == "cpu"
    check = found("device")
    assert check.status == "warn"
    assert "CPU build" in check.found
    assert "CUDA build" in check.advice


def test_repacking_trap_is_told_where_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_with("avx512_bf16", tmp_path, monkeypatch)
    check = found("4-bit training")
    assert check.status == "warn"
    assert "autograd" in check.found
    hardware.cpu_flags.cache_clear()
    cpu_with("amx_bf16", tmp_path, monkeypatch)
    assert found("4-bit training").status == "ok"


def test_missing_asset_comes_with_the_command() -> None:
    check = found("asset smollm2-135m")
    assert check.status == "missing"
    assert check.advice.startswith("effbench fetch smollm2-135m")
    assert found("asset minilm").status == "ok"


def test_missing_and_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=99", "no-such-thing>=1", "numpy", "wandb>=99; extra == 'wandb'"]
    monkeypatch.setattr(doctor, "requires", lambda name: needed)
    check = found("packages")
    assert check.status == "missing"
    assert "torch>=99 (found 2" in check.found
    assert check.advice == "Run: pip install 'torch>=99' 'no-such-thing>=1'"


def test_little_space(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert found("cache disk").status == "warn"
    assert "EFFBENCH_CACHE" in found("cache disk").advice
    assert "run.results" in found("results disk").advice


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "switched off" in found("model hub").found
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert found("model hub").status == "warn"


def test_deep_asks_torch() -> None:
    assert "torch" in [c.name for c in report(deep=True)]


def test_every_problem_has_advice_and_torch_stays_out() -> None:
    code = (
        "import sys; from effbench.cli.doctor import report\n"
        "assert all(c.advice for c in report() if c.status != 'ok')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("there", [True, False])
def test_the_compiler_of_the_decoding_step(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from effbench.util import cpp

    monkeypatch.setattr(cpp, "compiler", lambda: "/usr/bin/c++" if there else None)
    check = found("C++ compiler")
    assert check.status == ("ok" if there else "warn")
    assert "C++ step" in check.found if there else "slower" in check.found
