"""Joules per token, measured and modelled apart, and the factors in the units."""

from __future__ import annotations

from pathlib import Path

import pytest

from effbench.resources import energy
from effbench.testing.bench import Bench

SHORT = ["evaluator=energy", "evaluator.energy.window_seconds=0.01"]
SHORT += ["evaluator.energy.prompt_tokens=6", "evaluator.energy.new_tokens=4"]


def test_without_counters_everything_is_modelled(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    record = bench.run("eval", "method=none", *SHORT)
    found = {(m.name, m.phase): m for m in record.metrics}
    for phase in ("prefill", "decode"):
        metric = found["j_per_token_modelled", phase]
        assert metric.value >= 0
        assert metric.obtained == "modelled"
    assert not any(m.name in ("j_per_token", "energy_j") for m in record.metrics)
    assert found["energy_modelled_j", "evaluate"].obtained == "modelled"


def test_counters_give_another_metric(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for name, text in (("name", "package-0"), ("max_energy_range_uj", "9"), ("energy_uj", "3")):
        (zone / name).write_text(text)
    record = bench.run("eval", "method=none", *SHORT)
    names = {m.name: m.obtained for m in record.metrics}
    assert names["j_per_token"] == names["energy_j"] == "measured"
    assert "j_per_token_modelled" not in names


def test_costs_follow_from_the_factors_and_name_them(bench: Bench) -> None:
    words = ["evaluator.energy.grams_per_kwh=100", "evaluator.energy.pue=1.5"]
    words += ["evaluator.energy.litres_per_kwh=2", "evaluator.energy.usd_per_kwh=0.3"]
    record = bench.run("eval", "method=none", *SHORT, *words)
    found = {m.name: m for m in record.metrics if m.phase == "decode"}
    per_token = next(m.value for n, m in found.items() if n.startswith("j_per_token"))
    kwh = per_token * 1000 / 3.6e6
    assert found["co2_g"].value == pytest.approx(kwh * 1.5 * 100)
    assert found["water_l"].value == pytest.approx(kwh * 2)
    assert found["cost_usd"].value == pytest.approx(kwh * 1.5 * 0.3)
    assert "100 g/kWh, PUE 1.5" in found["co2_g"].unit
    assert {found[n].obtained for n in ("co2_g", "water_l", "cost_usd")} == {"modelled"}
