"""What each method is said to cost stays as it is, unless it was wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from goldens import Golden

from effbench.api import registry
from effbench.api.cost import Cost
from effbench.api.footprint import training_of
from effbench.api.plugins import make_method
from effbench.api.shape import Shape
from effbench.api.spec import Plugin
from effbench.methods.chain import chain_cost, inference_cost, shape_of

SHAPE = Shape(96, 250, 8, 6, 3, 16, 512)
NAMES = [n for n in registry.names("methods") if n not in registry.plugins("methods")]
ADVICE = (
    "Plans and records hold these numbers. If they were wrong, say so in CHANGELOG.md: make golden."
)

OF_STATES = {"kv_bytes_per_sequence", "chunking", "stepping", "recurrent_gradient"}
"""What is left out where no layer keeps a state."""


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_what_it_costs_stays(name: str, golden: Callable[[str], Golden]) -> None:
    settings = registry.find("methods", name).needs
    method = make_method(Plugin(name, settings)).resolve(SHAPE)
    found: dict[str, Any] = {
        point.name: _plain(chain_cost([method], SHAPE, "bfloat16", point))
        for point in method.points()
    }
    whole = method.full_point(shape_of(method, SHAPE))
    found["in use"] = _plain(inference_cost([method], SHAPE, "bfloat16", whole))
    if method.stage == "train":
        training = training_of(shape_of(method, SHAPE, phase="train"), "bfloat16")
        found["training"] = _plain(training)
    golden("costs.json").check(name, found, ADVICE, grows=1)


def _plain(counts: Any) -> dict[str, Any]:
    told = counts.told() if isinstance(counts, Cost) else asdict(counts)
    return {k: v for k, v in told.items() if v or k not in OF_STATES}
