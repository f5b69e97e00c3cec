"""A tiny evaluation gives what it gave, or the version of the evaluator is raised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from goldens import BITS, Golden

from effbench.api import registry
from effbench.testing.bench import Bench
from effbench.testing.runs import HARDWARE, every_evaluator

TOLERANCE = {"rel": 1e-5, "abs": 2**-22}
"""Between kernels for different processors; differences of probabilities round as those do."""


def gives_the_same_again(cls: Any) -> bool:
    """Whether an evaluator counts, scores or simulates, and times nothing."""
    return cls.itemwise or not cls.needs_model


NAMES = [
    name
    for name in registry.names("evaluators")
    if gives_the_same_again(registry.find("evaluators", name))
]


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluate a model of rough weights with all of them, and return the folder of the results."""
    bench = Bench(tmp_path_factory.mktemp("golden") / "results")
    rough = ["method=rtn", "method.bits=2", "method.group_size=16", "+dataset.limit.test=8"]
    record = bench.run("compress", *rough, *every_evaluator(gives_the_same_again), *HARDWARE)
    return bench.store.run(record.key).path / "evaluations"


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_gives_what_it_gave(
    name: str, evaluations: Path, golden: Callable[[str], Golden]
) -> None:
    metrics = json.loads((evaluations / f"{name}.json").read_text())["metrics"]
    values = {"@".join(filter(None, (m["name"], m["task"]))): m["value"] for m in metrics}
    assert values
    file, version = golden("evaluations.json"), registry.find("evaluators", name).version
    kept = (file[name] or {}).get("values", {})
    close = {k: kept[k] for k, v in values.items() if kept.get(k) == pytest.approx(v, **TOLERANCE)}
    file.check(name, {"version": version, "values": values | close}, BITS, grows=1)
