"""Which run of a grid begins when, on machines of paper."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from effbench.api.spec import Parallelism
from effbench.config.compose import compose
from effbench.results.sweeps import Cell
from effbench.runner.grid import room, schedule
from effbench.runner.grid.cells import Cells
from effbench.runner.grid.room import Need, Room
from effbench.runner.grid.schedule import Schedule
from effbench.runner.grid.screen import Screen
from effbench.runner.local import Hands
from effbench.util.errors import UserError

GIB = 2**30


def cells(*keys: str) -> list[Cell]:
    return [Cell(n, ["model=tiny", f"seed={n}"], key) for n, key in enumerate(keys)]


def work(
    runs: list[Cell],
    perform: Callable[[Cell, Hands], None],
    held: Callable[[Cell], bool] = lambda cell: False,
) -> Schedule:
    return Schedule(runs, held, perform, Screen(runs, 1, live=False))


def does(began: list[str], **states: str) -> Callable[[Cell, Hands], None]:
    """Return what takes down which runs began and leaves them in a state, done by default."""

    def perform(cell: Cell, hands: Hands) -> None:
        began.append(cell.key)
        cell.state = states.get(cell.key, "done")  # type: ignore[assignment]
        cell.error = "No room.\nMake some." if cell.state == "failed" else ""

    return perform


def test_a_failure_is_said_at_once_and_the_others_go_on(capsys: pytest.CaptureFixture) -> None:
    began: list[str] = []
    runs = cells("a", "b", "c")

    def perform(cell: Cell, hands: Hands) -> None:
        if cell.key == "b":
            said = capsys.readouterr().err
            assert "failed  a" in said and "seed=0: No room.\nMake some." in said
            assert "model=tiny" not in said, "what all have is not repeated"
        does(began, a="failed")(cell, hands)

    work(runs, perform).in_turn()
    assert began == ["a", "b", "c"]
    assert [cell.state for cell in runs] == ["failed", "done", "done"]


def test_a_run_that_was_interrupted_is_the_last_to_begin() -> None:
    began: list[str] = []
    runs = cells("a", "b", "c")
    stopped = work(runs, does(began, b="interrupted"))
    stopped.in_turn()
    assert stopped.stopped and began == ["a", "b"]
    assert [cell.state for cell in runs] == ["done", "interrupted", "waiting"]


def test_runs_of_one_key_are_run_once() -> None:
    began: list[str] = []
    runs = cells("a", "a", "b", "a")
    work(runs, does(began)).in_turn()
    assert began == ["a", "b"]
    assert {cell.state for cell in runs} == {"done"}
    seen, _ = together(cells("a", "a", "b"), 3, Room(GIB, {}, 1), lambda c: Need(1))
    assert len(seen) == 2


def test_what_another_process_is_on_comes_last(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    began: list[str] = []
    held = {"a"}
    monkeypatch.setattr(schedule.time, "sleep", lambda seconds: held.clear())
    work(cells("a", "b"), does(began), lambda cell: cell.key in held).in_turn()
    assert began == ["b", "a"]
    assert "another process is on" in capsys.readouterr().err


def together(runs: list[Cell], jobs: int, has: Room, need: Callable[[Cell], Need | None]):
    """Run several at once; return those that were at work together, and what each was given."""
    at_work: set[str] = set()
    seen: list[frozenset[str]] = []
    given: dict[str, dict[str, str]] = {}
    lock = threading.Lock()

    def perform(cell: Cell, hands: Hands) -> None:
        with lock:
            at_work.add(cell.key)
            given[cell.key] = dict(hands.environment)
            seen.append(frozenset(at_work))
        time.sleep(0.02)
        with lock:
            at_work.remove(cell.key)
        cell.state = "done"

    work(runs, perform).side_by_side(jobs, has, need)
    assert all(cell.state == "done" for cell in runs)
    return seen, given


def test_a_run_waits_until_its_peak_fits() -> None:
    needs = {"a": 6, "b": 6, "c": 4}
    seen, given = together(
        cells(*needs), 3, Room(10 * GIB, {}, 2), lambda c: Need(needs[c.key] * GIB)
    )
    assert {"a", "c"} in seen, "c overtakes b, for which there is no room"
    assert not any({"a", "b"} <= both for both in seen)
    assert given["a"] == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}


@pytest.mark.parametrize("need", [None, Need(11 * GIB), Need(1, 1)])
def test_what_cannot_be_planned_or_is_too_large_runs_alone(need: Need | None) -> None:
    needs = {"a": Need(GIB), "b": need, "c": Need(GIB)}
    seen, given = together(cells(*needs), 3, Room(10 * GIB, {}, 1), lambda c: needs[c.key])
    assert {"a", "c"} in seen and {"b"} in seen
    assert not any("b" in both and len(both) > 1 for both in seen)
    assert given["b"] == {}
    seen, _ = together(cells("b", "a"), 2, Room(10 * GIB, {}, 1), lambda c: needs[c.key])
    assert max(map(len, seen)) == 1, "nothing begins beside it"


def test_a_gpu_has_one_owner() -> None:
    has = Room(100 * GIB, {"0": 10 * GIB, "3": 20 * GIB}, 1)
    seen, given = together(cells(*"abcd"), 4, has, lambda c: Need(GIB, 8 * GIB))
    assert max(map(len, seen)) == 2
    assert {g["CUDA_VISIBLE_DEVICES"] for g in given.values()} == {"0", "3"}
    large = Room(100 * GIB, {"0": 10 * GIB, "3": 20 * GIB}, 1)
    seen, given = together(cells(*"ab"), 2, large, lambda c: Need(GIB, 15 * GIB))
    assert max(map(len, seen)) == 1
    assert {g["CUDA_VISIBLE_DEVICES"] for g in given.values()} == {"3"}


def test_a_run_on_several_gpus_waits_for_all_of_them() -> None:
    needs = {"a": Need(GIB, GIB), "b": Need(GIB, GIB, 2), "c": Need(GIB, GIB), "d": Need(GIB, 1, 9)}
    has = Room(100 * GIB, {"0": GIB, "1": GIB}, 1)
    seen, given = together(cells(*needs), 4, has, lambda c: needs[c.key])
    assert {"a", "c"} in seen, "c overtakes b"
    assert not any(both & {"b", "d"} and len(both) > 1 for both in seen)
    assert given["b"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert given["d"] == {}, "there are never that many: it runs alone, and says so itself"


def test_only_the_gpus_that_are_visible_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = type("Gpu", (), {"memory_mib": 1024})
    monkeypatch.setattr(room, "gpus", lambda: (gpu, gpu, gpu))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert list(room.devices_here()) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5e")
    assert room.devices_here() == {"2": GIB, "GPU-5e": GIB}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert room.devices_here() == {}


def test_what_a_run_needs_is_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    job = compose("train", ["model=tiny", "dataset=arithmetic", "hardware=cpu"])
    found = room.need_of(job)
    assert found and found.device is None
    assert 0 < found.memory - room.PROCESS_BYTES < GIB
    several = replace(job.runtime, parallelism=Parallelism(devices=3))
    assert room.need_of(replace(job, runtime=several)) == Need(3 * found.memory)
    monkeypatch.setattr("effbench.resources.planned.known_shape", lambda spec: None)
    assert room.need_of(job) is None


class Process:
    """Takes down the signals it is sent."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def send_signal(self, number: int) -> None:
        self.sent.append(number)


def test_ctrl_c_lets_runs_save_and_begins_no_other() -> None:
    runs, process = cells("a", "b", "c"), Process()

    def perform(cell: Cell, hands: Hands) -> None:
        assert hands.began
        hands.began(process)  # type: ignore[arg-type]
        while not process.sent:
            time.sleep(0.005)
        cell.state = "interrupted"

    stopped = work(runs, perform)
    timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
    timer.start()
    stopped.side_by_side(2, Room(GIB, {}, 1), lambda c: Need(1))
    assert [cell.state for cell in runs] == ["interrupted", "interrupted", "waiting"]
    assert set(process.sent) == {signal.SIGTERM}
    stopped._stop(signal.SIGINT, None)
    assert process.sent[-1] == signal.SIGINT, "the second time they end at once"


def test_the_overview_has_the_last_line_of_each_run_at_work(capsys) -> None:
    runs = cells("a" * 16, "b" * 16)
    screen = Screen(runs, 2, live=True)
    with screen:
        runs[0].state = "running"
        hear = screen.listener(runs[0])
        assert hear
        hear("train 3/7 loss 2.1")
        assert "train 3/7 loss 2.1" in screen._drawing().plain
        runs[1].state, runs[1].error = "failed", "exit status 1"
        screen._hear(runs[1], "Traceback: boom")
        screen.ended(runs[1])
    said = capsys.readouterr().err
    assert "failed  bbbb" in said
    assert "Traceback: boom" in said, "what a bug said is not lost"


def test_a_grid_is_composed_before_it_begins() -> None:
    points = [["model=tiny", f"method.rank={r}", "method=lora"] for r in (2, 400)]
    found = Cells("train", points, {"model", "method", "method.rank"}, [])
    assert [cell.state for cell in found.all] == ["waiting", "failed"]
    assert "method.rank=400" in found.all[1].words and "more than q_proj" in found.all[1].error
    found.plan()
    assert found.all[0].work > 0 and found.all[1].work == 0
    with pytest.raises(UserError, match=r"method\.rank=400 is more"):
        Cells("train", points[1:], {"model", "method", "method.rank"}, [])
