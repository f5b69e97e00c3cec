"""The self-check of counts and peaks: it passes, and it notices what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from effbench.api.parts import LayerShape
from effbench.api.points import Point
from effbench.api.shape import ModelShape, Phase
from effbench.cli.selfcheck import accounting
from effbench.cli.selfcheck.base import Check
from effbench.methods.adapters.lora import LoRA
from effbench.methods.base import Method
from effbench.methods.depth.exit_heads import ExitHeads
from effbench.methods.depth.sorted_full import SortedFull
from effbench.methods.depth.sorted_lora import SortedLoRA
from effbench.nn.depth import layerskip
from effbench.testing.kinds import evaluation_kind, first_of_each, others_slow

METHODS = accounting._methods()


@pytest.mark.parametrize("name", others_slow(METHODS, first_of_each(METHODS, evaluation_kind)))
def test_counts_of_every_method_at_every_point(name: str) -> None:
    checks = list(accounting._counts(name))
    assert not [c for c in checks if not c.passed]
    kinds = {c.name.split(",")[0] for c in checks}
    assert {"forward FLOPs", "forward FLOPs again", "bytes of cache", "bytes of weights"} <= kinds


@pytest.mark.parametrize(
    "method",
    [
        SortedLoRA(depths=(3,)),
        SortedLoRA(depths=(2, 4), objective="soft"),
        SortedLoRA(depths=(2, 4), objective="soft", layout="skip_middle"),
        SortedFull(depths=(2, 4), objective="sampled"),
        SortedLoRA(depths=(1, 2, 4), objective="layerskip"),
        SortedFull(depths=(3,), objective="layerskip"),
        ExitHeads(depths=(2, 3, 4), trunk="trained"),
    ],
)
def test_a_step_over_several_depths(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerskip, "MOST_DROPPED", 0.0)  # what is drawn has a test of its own
    model, ctx = accounting._model(method)
    assert accounting._step("", method, model, ctx).passed


def test_a_wrong_count_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LoRA.shape

    def wrong(self: LoRA, base: ModelShape, point: Point, phase: Phase, folder: Any) -> ModelShape:
        shape = right(replace(self, rank=self.rank + 8), base, point, phase, folder)
        if phase == "train":
            return right(self, base, point, phase, folder)

        def more(_: int, layer: LayerShape) -> LayerShape:
            assert layer.mixer is not None
            cache = replace(layer.mixer.cache, keys=layer.mixer.cache.keys + 1)
            return replace(layer, mixer=replace(layer.mixer, cache=cache))

        return shape.map(more)

    monkeypatch.setattr(LoRA, "shape", wrong)
    failed = {c.name.split(",")[0] for c in accounting._counts("lora") if not c.passed}
    assert failed == {"forward FLOPs", "bytes of cache", "bytes of weights"}


@pytest.mark.real
@pytest.mark.slow  # tests/test_real.py holds the peaks of a run to the same bound
@pytest.mark.parametrize("name", ["full", "qlora", "structured", "apt"])
def test_peaks_of_runs_on_the_real_model(name: str) -> None:
    checks: list[Check] = list(accounting._peaks(name))
    work = "compress" if name == "structured" else "train"
    assert [c.name.split(",")[0] for c in checks] == [
        "peak of load",
        f"peak of {work}",
        "peak of evaluate",
    ]
    assert not [c for c in checks if not c.passed]
    if name not in accounting.SHORT:  # what was furthest off
        assert max(abs(c.value) for c in checks) <= 0.05
