"""What a request takes with a method and with the dense cache, measured in turn.

Memory of a request is that of the model's weights, counted, and what the process or the device
holds beyond what it held before the session was made, at its largest: while the prompt is read and
while tokens are decoded. Free memory is given back before each request and each phase, so that none
finds what another one left; the clock does not run meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from effbench.evaluators.requests import Times
from effbench.resources.memory import Peak, PeakMemory, memory_in_use, release
from effbench.resources.timing import interleaved
from effbench.stats import Interval, ratio_interval

Around = Callable[[str], AbstractContextManager[Any]]
Request = Callable[[Around], Times]
"""Makes a session, decodes with it, and enters a context around each of its two phases."""


class Took(NamedTuple):
    """What one request took."""

    times: Times
    prefill_bytes: int
    decode_bytes: int

    def values(self) -> dict[str, float]:
        """Return what is compared, by the name of its gain."""
        return {
            "memory_gain@": max(self.prefill_bytes, self.decode_bytes),
            "memory_gain@decode": self.decode_bytes,
            "ttft_speedup@prefill": self.times.first,
            "decode_speedup@decode": sum(self.times.gaps),
            "speedup@": self.times.first + sum(self.times.gaps),
        }


@dataclass(frozen=True)
class Beside:
    """Requests of a method and of the dense cache, pair by pair."""

    own: Sequence[Took]
    dense: Sequence[Took]

    def gains(self, seed: int) -> dict[str, Interval]:
        """Return the median gain of each quantity, `name@phase`, with its interval."""
        own, dense = ([took.values() for took in side] for side in (self.own, self.dense))
        return {
            name: ratio_interval([v[name] for v in dense], [v[name] for v in own], seed=seed)
            for name in own[0]
        }

    def values(self) -> dict[str, list[float]]:
        """Return memory of the method, and times and memory of the dense cache, `name@phase`."""
        return {
            "held_bytes@prefill": [took.prefill_bytes for took in self.own],
            "held_bytes@decode": [took.decode_bytes for took in self.own],
            "dense_ttft_ms@prefill": [1e3 * took.times.first for took in self.dense],
            "dense_tpot_ms@decode": [1e3 * median(took.times.gaps) for took in self.dense],
            "dense_held_bytes@prefill": [took.prefill_bytes for took in self.dense],
            "dense_held_bytes@decode": [took.decode_bytes for took in self.dense],
        }


def measured(
    own: tuple[Request, int],
    dense: tuple[Request, int],
    repeats: int,
    device: Any,
    progress: Callable[[int], None],
) -> Beside:
    """Return what requests took that were made in turn; the first pair warms up.

    Args:
        own: A request of the method, and the bytes of its weights.
        dense: The same of the dense cache.
        repeats: Pairs that count.
        device: Where they run.
        progress: Called with how many requests were made.
    """
    sides: tuple[list[Took], list[Took]] = [], []

    def work(side: list[Took], request: Request, weights: int) -> Callable[[], None]:
        def run() -> None:
            side.append(_took(request, weights, device))
            progress(sum(map(len, sides)))

        return run

    interleaved(work(sides[0], *own), work(sides[1], *dense), repeats)
    return Beside(*(side[-repeats:] for side in sides))


def _took(request: Request, weights: int, device: Any) -> Took:
    """Make a request and return what it took."""
    release()
    before, peaks = memory_in_use(device), dict[str, PeakMemory]()

    def around(phase: str) -> PeakMemory:
        release()
        peaks[phase] = PeakMemory(device, phase)
        return peaks[phase]

    times = request(around)
    return Took(times, *(weights + beyond(peaks[p].peak, before) for p in ("prefill", "decode")))


def beyond(peak: Peak, before: int) -> int:
    """Return the bytes of a peak beyond what was in use before."""
    return max(0, peak.peak_bytes - before)
