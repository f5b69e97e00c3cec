"""Energy of a part of a run: counters of the hardware where they can be read, else a model.

Counters are RAPL's, per processor package with its memory, and NVML's of the CUDA device. Where
there are none, the energy is the processor time used times a core's share of the thermal design
power; that is a model and always says so.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from effbench.results.records import Obtained
from effbench.util.hardware import cores

POWERCAP = Path("/sys/class/powercap")
COUNTED_ZONES = ("package", "dram")
"""RAPL zones whose energies add up: `core` and `uncore` are parts of a package, `psys` is all."""
WATTS_PER_CORE = 7.0
"""Thermal design power per core where none is stated: servers of 2021 to 2024 have 4 to 8 W."""
LEAST_NVML_SECONDS = 2.0
"""Shortest window for which NVML's counter, which moves every 20 to 100 ms, is taken."""
SAMPLE_SECONDS = 30.0
"""Time between two readings of a counter, far below the minutes in which one wraps around."""


@dataclass(frozen=True)
class Energy:
    """Energy of a window."""

    joules: float
    seconds: float
    obtained: Obtained
    source: str
    """Which counters, or the model and its figures."""
    shared: float = 0.0
    """Joules of counters that other processes of the machine see too."""


def total(parts: Sequence[Energy]) -> Energy:
    """Return the energy of disjoint windows together; a modelled one makes all of it modelled."""
    modelled = [p for p in parts if p.obtained == "modelled"]
    joules, seconds = sum(p.joules for p in parts), sum(p.seconds for p in parts)
    how: Obtained = "modelled" if modelled else "measured"
    return Energy(joules, seconds, how, (modelled or parts)[-1].source)


class Meter:
    """A context that measures the energy of the work inside it; `energy` holds it afterwards.

    Args:
        device: `cpu`, `cuda` or `cuda:N`, or a torch device.
        tdp_watts: Thermal design power of the device, for the model; 0 takes 7 W per core.
        least_seconds: Shortest window for which NVML's counter is taken; 0 where many windows are
            added up.
    """

    def __init__(
        self,
        device: Any = "cpu",
        tdp_watts: float = 0,
        least_seconds: float = LEAST_NVML_SECONDS,
    ) -> None:
        self.device = str(device)
        self.least_seconds = least_seconds
        self.tdp_watts = tdp_watts
        self._energy: Energy | None = None
        self._done = threading.Event()
        self._broken = False

    @property
    def energy(self) -> Energy:
        """The result, once the context is left."""
        if self._energy is None:
            raise RuntimeError("the window is not over yet")
        return self._energy

    def __enter__(self) -> Meter:
        self._rapl = [c for zone in _zones() if (c := _opened(_Rapl, zone))]
        self._nvml = _opened(_Nvml, self.device) if self.device.startswith("cuda") else None
        self._begun, self._busy = time.perf_counter(), _processor_seconds()
        if self._rapl:
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        seconds = time.perf_counter() - self._begun
        self._done.set()
        if self._rapl:
            self._sampler.join()
        self._update()
        self._energy = self._measured(seconds) or self._modelled(seconds)

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._update()

    def _update(self) -> None:
        """Read all counters; one that cannot be read any more makes the window a modelled one."""
        try:
            for counter in self._rapl:
                counter.update()
        except (OSError, ValueError):
            self._broken = True

    def _measured(self, seconds: float) -> Energy | None:
        if self._broken:
            return None
        rapl = sum(c.joules for c in self._rapl)
        if not self.device.startswith("cuda"):
            return Energy(rapl, seconds, "measured", "RAPL", rapl) if self._rapl else None
        if self._nvml is None or seconds < self.least_seconds:
            return None
        source = "NVML and RAPL" if self._rapl else "NVML, the device alone"
        return Energy(self._nvml.joules() + rapl, seconds, "measured", source, rapl)

    def _modelled(self, seconds: float) -> Energy:
        """Multiply processor time by a core's share of the power; a GPU counts as always busy."""
        busy, count = _processor_seconds() - self._busy, os.cpu_count() or cores()
        on_cpu = not self.device.startswith("cuda")
        watts = (self.tdp_watts if on_cpu else 0) or WATTS_PER_CORE * count
        joules = busy * watts / count + (0 if on_cpu else self.tdp_watts * seconds)
        source = f"{busy:.3g} s of processor time at {watts:g} W / {count} cores"
        return Energy(max(0.0, joules), seconds, "modelled", source)


class _Rapl:
    """One zone's counter, added up over its wrap-arounds."""

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._last = int(self._file.read_text())
        self.joules = 0.0

    def update(self) -> None:
        """Add what was used since the last reading."""
        now = int(self._file.read_text())
        step = now - self._last if now >= self._last else now + self._range - self._last
        self._last = now
        self.joules += step / 1e6


class _Nvml:
    """NVML's energy counter of one CUDA device, in mJ since its driver was loaded."""

    def __init__(self, device: str) -> None:
        import torch

        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.device(device)).uuid)
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}".encode())
        self._read: Callable[[], int] = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        self._first = self._read()

    def joules(self) -> float:
        """Return what was used since the beginning."""
        return (self._read() - self._first) / 1e3


def _zones() -> list[Path]:
    """Return RAPL's zones that add up to what the machine's processors and memory use."""
    found = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        with suppress(OSError):
            name = (zone / "name").read_text().strip()
            if name.startswith(COUNTED_ZONES):
                found.append(zone)
    return found


def _opened(counter: Callable[[Any], Any], place: Any) -> Any:
    """Return a counter, or None where it is not there or may not be read."""
    try:
        return counter(place)
    except Exception as error:
        if isinstance(error, OSError | ImportError | ValueError) or "NVML" in type(error).__name__:
            return None
        raise


def _processor_seconds() -> float:
    """Return the processor time of this process and its ended children, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
