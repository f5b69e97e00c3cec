"""Energy meters on a made-up tree of RAPL counters, and the model where there are none."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from effbench.resources import energy
from effbench.resources.energy import Energy, Meter, total
from effbench.results.fold import energy_name
from effbench.util.files import write_atomic


def zone(root: Path, name: str, kind: str, joules: float, largest: float = 1000.0) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(kind + "\n")
    (folder / "max_energy_range_uj").write_text(f"{int(largest * 1e6)}\n")
    spend(folder, joules)
    return folder


def spend(folder: Path, reading: float) -> None:
    """Set a counter, at once: a meter may read it at any time."""
    write_atomic(folder / "energy_uj", f"{int(reading * 1e6)}\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    return tmp_path


def test_packages_and_their_memory_add_up(tree: Path) -> None:
    first = zone(tree, "intel-rapl:0", "package-0", 10)
    second = zone(tree, "intel-rapl:1", "package-1", 20)
    memory = zone(tree, "intel-rapl:0:0", "dram", 5)
    core = zone(tree, "intel-rapl:0:1", "core", 1)
    whole = zone(tree, "intel-rapl:2", "psys", 1)
    with Meter() as meter:
        for folder, reading in ((first, 13), (second, 24), (memory, 5.5), (core, 99), (whole, 99)):
            spend(folder, reading)
    assert meter.energy.joules == pytest.approx(7.5)
    assert (meter.energy.obtained, meter.energy.source) == ("measured", "RAPL")
    assert energy_name(meter.energy.obtained) == "energy_j"


def test_a_counter_that_wraps_around_goes_on(tree: Path) -> None:
    folder = zone(tree, "intel-rapl:0", "package-0", 998, largest=1000)
    with Meter() as meter:
        spend(folder, 3)
    assert meter.energy.joules == pytest.approx(5)


def test_samples_see_every_wrap_around(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "SAMPLE_SECONDS", 0.005)
    folder = zone(tree, "intel-rapl:0", "package-0", 0, largest=10)
    with Meter() as meter:
        for reading in (6, 2, 8):  # 6, then 6 and 6 more over the end
            spend(folder, reading)
            time.sleep(0.1)
    assert meter.energy.joules == pytest.approx(18)


def test_disjoint_windows_add_up_to_the_whole(tree: Path) -> None:
    folder = zone(tree, "intel-rapl:0", "package-0", 990, largest=1000)
    parts = []
    with Meter() as whole:
        for reading in (995, 4, 11):
            with Meter() as part:
                spend(folder, reading)
            parts.append(part.energy)
    assert all(p.joules >= 0 for p in parts)
    assert total(parts).joules == pytest.approx(whole.energy.joules, rel=0.05)
    assert whole.energy.joules == pytest.approx(21)


@pytest.mark.parametrize("broken", ["energy_uj", "max_energy_range_uj"])
def test_a_counter_that_cannot_be_read_is_not_one(tree: Path, broken: str) -> None:
    folder = zone(tree, "intel-rapl:0", "package-0", 1)
    (folder / broken).unlink()
    with Meter() as meter:
        pass
    assert meter.energy.obtained == "modelled"


def test_a_counter_that_is_lost_on_the_way_makes_the_window_a_modelled_one(tree: Path) -> None:
    folder = zone(tree, "intel-rapl:0", "package-0", 1)
    with Meter() as meter:
        (folder / "energy_uj").unlink()
    assert meter.energy.obtained == "modelled"


def test_the_model_is_processor_time_at_a_share_of_the_power(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy.os, "cpu_count", lambda: 4)
    seconds = iter([10.0, 13.0])
    monkeypatch.setattr(energy, "_processor_seconds", lambda: next(seconds))
    with Meter(tdp_watts=100) as meter:
        pass
    assert meter.energy.joules == pytest.approx(3 * 100 / 4)
    assert meter.energy.obtained == "modelled"
    assert "100 W / 4 cores" in meter.energy.source
    assert energy_name("modelled") != energy_name("measured")


def test_one_modelled_window_makes_the_sum_modelled() -> None:
    parts = [Energy(1, 1, "measured", "RAPL"), Energy(2, 1, "modelled", "model")]
    assert total(parts) == Energy(3, 2, "modelled", "model")


def test_the_result_is_there_only_after_the_end() -> None:
    with pytest.raises(RuntimeError, match="not over"):
        _ = Meter().energy
