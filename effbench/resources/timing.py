"""Wall-clock time: synchronised with the device, warm-up dropped, baselines timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from effbench.stats import Interval, median_interval, ratio_interval


class Clock:
    """A monotonic clock that waits for the device before it is read.

    Args:
        device: `cpu`, `cuda` or `cuda:N`, or a torch device.
    """

    def __init__(self, device: Any = "cpu") -> None:
        self.device = str(device)

    def now(self) -> float:
        """Return seconds since some fixed moment, after all queued work is done."""
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the seconds that one call of `work` takes."""
        start = self.now()
        work()
        return self.now() - start


@dataclass(frozen=True)
class Ratio:
    """How two pieces of work that were timed in turn compare."""

    speedup: Interval
    """Median over pairs of seconds of b / seconds of a: above 1 when a is the faster one."""
    a: Interval
    """Median seconds of a."""
    b: Interval
    """Median seconds of b."""


def steady(times: Sequence[float], drop: int = 1) -> Interval:
    """Return the median of repeated times, in seconds, without the first `drop` ones.

    Raises:
        ValueError: When nothing is left.
    """
    if drop >= len(times):
        raise ValueError(f"{len(times)} times leave nothing once {drop} are dropped")
    return median_interval(times[drop:])


def interleaved(
    a: Callable[[], object],
    b: Callable[[], object],
    repeats: int,
    *,
    clock: Clock | None = None,
    drop: int = 1,
    seed: int = 0,
) -> Ratio:
    """Time `a` and `b` in turn, so that drift of the machine meets both alike.

    Each pair runs in the other order than the one before it.

    Args:
        a: The work in question.
        b: What it is compared with.
        repeats: Pairs that count.
        clock: Of the device; the CPU's when None.
        drop: Pairs that run first and do not count.
        seed: Of the bootstrap.
    """
    clock = clock or Clock()
    pairs = []
    for turn in range(drop + repeats):
        if turn % 2:
            of_b = clock.seconds(b)
            pairs.append((clock.seconds(a), of_b))
        else:
            of_a = clock.seconds(a)
            pairs.append((of_a, clock.seconds(b)))
    times_a, times_b = zip(*pairs[drop:], strict=True)
    return Ratio(
        ratio_interval(times_b, times_a, seed=seed),
        median_interval(times_a),
        median_interval(times_b),
    )
