"""Timing with a clock that the tests turn themselves."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from effbench.resources.timing import Clock, interleaved, steady


class FakeClock(Clock):
    def __init__(self) -> None:
        super().__init__()
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def work(self, name: str, seconds: float, order: list[str]) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            self.time += seconds * (1 + 0.01 * len(order))  # the machine slows down

        return run


def test_a_drifting_machine_meets_both_alike() -> None:
    clock, order = FakeClock(), list[str]()
    found = interleaved(
        clock.work("a", 1.0, order), clock.work("b", 2.0, order), 20, clock=clock, drop=2
    )
    assert order[:8] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(order) == 2 * (20 + 2)
    assert found.speedup.low <= 2.0 <= found.speedup.high
    assert found.speedup.value == pytest.approx(2.0, rel=0.01)
    assert found.b.value / found.a.value == pytest.approx(2.0, rel=0.02)


def test_warm_up_is_dropped() -> None:
    assert steady([100.0, 1.0, 3.0, 2.0]).value == 2.0
    assert steady([5.0], drop=0).value == 5.0
    with pytest.raises(ValueError, match="leave nothing"):
        steady([1.0], drop=1)


def test_the_clock_measures_wall_time() -> None:
    assert Clock().seconds(lambda: time.sleep(0.02)) >= 0.02
