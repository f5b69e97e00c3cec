"""What is installed and what this machine can do, and what to do about what is missing."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from effbench.data import assets
from effbench.util import hardware
from effbench.util.cache import cache_dir
from effbench.util.hf import hub_reachable, hub_switched_off

GIB = 2**30
LOW_MEMORY_GIB = 4
LOW_SPACE_GIB = 3
EXTRAS = {
    "wandb": ("wandb", "tracking"),
    "slurm": ("submitit", "runs on a SLURM cluster"),
    "joblib": ("hydra-joblib-launcher", "runs in parallel on this machine"),
    "ray": ("ray", "runs on a Ray cluster"),
    "snorkel": ("snorkel", "a label model of prboost"),
}
"""From the name of an extra to the package that it brings and what that is for."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "warn", "missing"]
    found: str
    advice: str = ""


def report(results: Path = Path("results"), deep: bool = False) -> list[Check]:
    """Return all checks.

    Args:
        results: Folder of the results, whose disk is looked at.
        deep: Whether to import torch and ask it too.
    """
    checks = [_python(), _packages(), _device(), _bf16(), _processor(), _memory(), _compiler()]
    if deep:
        checks.append(_torch())
    checks += [_space("cache", cache_dir()), _space("results", results)]
    return [*checks, *_assets(), *_extras(), _bitsandbytes(), _hub()]


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _compiler() -> Check:
    from effbench.util.cpp import compiler

    if program := compiler():
        return Check("C++ compiler", "ok", f"{program}: decoding on the CPU takes its C++ step")
    return Check(
        "C++ compiler",
        "warn",
        "none: decoding on the CPU walks through the blocks, slower",
        "Install g++ or clang, or set CXX.",
    )


def _packages() -> Check:
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(r) for r in requires("effbench") or ()]
    except PackageNotFoundError:
        return Check("packages", "missing", "effbench is not installed", "Run: pip install -e .")
    lacking = []
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        found = _version(requirement.name)
        if not found:
            lacking.append(str(requirement))
        elif not requirement.specifier.contains(found, prereleases=True):
            lacking.append(f"{requirement} (found {found})")
    if lacking:
        quoted = " ".join(f"'{r.split(' (')[0]}'" for r in lacking)
        return Check("packages", "missing", "; ".join(lacking), f"Run: pip install {quoted}")
    main = ", ".join(f"{n} {_version(n)}" for n in ("torch", "transformers", "peft"))
    return Check("packages", "ok", f"all {len(needed)} there: {main}, …")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _device() -> Check:
    found = hardware.gpus()
    names = ", ".join(f"{g.name} ({g.memory_mib / 1024:.0f} GiB)" for g in found)
    if hardware.default_device() == "cuda":
        driver = f", driver {found[0].driver}" if found else ""
        return Check("device", "ok", f"cuda: {names or 'device files, but no nvidia-smi'}{driver}")
    if hardware.has_cuda_files():
        return Check(
            "device",
            "warn",
            f"{names or 'an NVIDIA GPU'}, but torch {_version('torch')} is a CPU build",
            "Install a CUDA build of torch to use it; https://pytorch.org says how.",
        )
    return Check("device", "ok", "cpu only")


def _bf16() -> Check:
    device = hardware.default_device()
    dtype = hardware.default_dtype(device)
    if dtype == "bfloat16":
        return Check("bfloat16", "ok", f"native on {device}: hardware.dtype=auto is bfloat16")
    return Check(
        "bfloat16",
        "ok",
        f"not native on {device}: hardware.dtype=auto is {dtype}",
        "bfloat16 would still halve the memory of the weights, but is usually slower here.",
    )


def _processor() -> Check:
    return Check("processor", "ok", f"{hardware.cpu_name()}, {hardware.cores()} cores usable")


def _memory() -> Check:
    total, free = (b / GIB for b in hardware.memory_bytes())
    if not total:
        return Check("memory", "warn", "not known", "Give hardware.memory_gib for `plan`.")
    found = f"{free:.1f} of {total:.1f} GiB free"
    if free < LOW_MEMORY_GIB:
        return Check("memory", "warn", found, "`effbench plan` says whether a run fits.")
    return Check("memory", "ok", found)


def _torch() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check(
            "torch", "ok", f"sees {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        )
    if hardware.default_device() == "cuda":
        return Check("torch", "missing", "sees no CUDA device", "Check driver and torch build.")
    return Check("torch", "ok", f"computes on the CPU with {torch.get_num_threads()} threads")


def _space(name: str, folder: Path) -> Check:
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free / GIB
    found = f"{free:.1f} GiB free in {folder}"
    if free >= LOW_SPACE_GIB:
        return Check(f"{name} disk", "ok", found)
    move = "set EFFBENCH_CACHE" if name == "cache" else "set run.results"
    return Check(f"{name} disk", "warn", found, f"Free some, or {move} to a larger disk.")


def _assets() -> Iterator[Check]:
    for status in assets.status():
        asset = status.asset
        name = f"asset {asset.name}"
        if status.path:
            yield Check(name, "ok", f"{status.bytes / 1e6:.0f} MB in {status.path}")
            continue
        advice = f"effbench fetch {asset.name} ({asset.megabytes} MB: {asset.summary})"
        if asset.optional:
            yield Check(name, "ok", "not fetched (optional)", advice)
        else:
            yield Check(name, "missing", "not fetched; the first run that needs it does", advice)


def _extras() -> Iterator[Check]:
    for extra, (package, purpose) in EXTRAS.items():
        found = _version(package)
        if found:
            yield Check(f"extra {extra}", "ok", f"{package} {found}")
        else:
            advice = f"pip install 'effbench[{extra}]' ({purpose})"
            yield Check(f"extra {extra}", "ok", "not installed (optional)", advice)


def _bitsandbytes() -> Check:
    if hardware.REPACKING_FLAG not in hardware.cpu_flags():
        return Check("4-bit training", "ok", "no weight repacking on this processor")
    return Check(
        "4-bit training",
        "warn",
        "this processor has AVX512-BF16: one evaluation makes bitsandbytes repack 4-bit weights "
        "for good, and training after it runs without autograd, so that nothing is learnt",
        "effbench switches that off for its own layers; do so for yours "
        "(support_avx512bf16_for_cpu=False on every Linear4bit).",
    )


def _hub() -> Check:
    advice = "Models from packages, folders, GGUF files or random weights work without it."
    if hub_switched_off():
        return Check("model hub", "ok", "switched off by HF_HUB_OFFLINE", advice)
    if hub_reachable():
        return Check("model hub", "ok", "reachable")
    return Check("model hub", "warn", "not reachable", advice)
