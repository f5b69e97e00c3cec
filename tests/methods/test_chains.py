"""Methods one after the other: which pairs there are, and that merging adapters is exact."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from effbench.api import registry
from effbench.methods.chain import chain_shapes, resolved
from effbench.runner.stages.export import export
from effbench.testing.bench import Bench
from effbench.testing.kinds import makes
from effbench.testing.models import given, tiny_shape
from effbench.util.errors import UserError

MAKERS = [name for name in registry.names("methods") if makes(name)]
HARDWARE = ["hardware.device=cpu", "hardware.dtype=float32", "hardware.threads=1"]
TRAINED = [*HARDWARE, "train.max_steps=2", "train.batch_size=2", "+dataset.limit.train=8"]
RATE = "train.learning_rate=0.05"


def why_not(first: str, then: str) -> str:
    """Return why a method cannot follow another on `tiny`; empty where it can."""
    before, after = resolved(given(first), tiny_shape()), given(then)
    try:
        after.check_start([before])
        start = chain_shapes([before], tiny_shape(), then=after)[-1]
        resolved(after, start)
    except UserError as error:
        assert error.hint, (first, then)
        return error.message
    return ""


@pytest.fixture(scope="module")
def matrix() -> dict[tuple[str, str], str]:
    return {pair: why_not(*pair) for pair in product(MAKERS, MAKERS)}


def test_what_follows_adapters_that_merge_is_what_follows_the_base(
    matrix: dict[tuple[str, str], str],
) -> None:
    """Prune, quantise and tune come in any order, unless a method reads what there is beside."""
    for first, then in matrix:
        if given(first).merges_for(given(then)):
            assert not matrix[first, then], (first, then)


def test_what_cannot_be_put_together_is_refused_by_what_is_in_the_way(
    matrix: dict[tuple[str, str], str],
) -> None:
    for first, then in matrix:
        method, after = given(first), given(then)
        beside = method.produces == "adapted" and not method.merges
        if beside and "adapted" not in after.accepts:
            assert "not adapted ones" in matrix[first, then]
        if method.produces == "grouped" and not {"packed", "grouped"} & after.accepts:
            assert "not grouped ones" in matrix[first, then]


def test_the_usual_orders_are_possible(matrix: dict[tuple[str, str], str]) -> None:
    prune, quantise, tune = "structured", "rtn", "lora"
    for pair in ((prune, quantise), (prune, tune), (quantise, tune), (tune, prune)):
        assert not matrix[pair]
    for pair in ((tune, quantise), (tune, tune), ("qlora", quantise), ("lora", "qlora")):
        assert not matrix[pair]
    assert matrix[quantise, prune]


def loss(record: object) -> float:
    return next(m.value for m in record.metrics if m.name == "loss")  # type: ignore[attr-defined]


def test_a_quantised_adapter_is_the_quantised_sum(bench: Bench, tmp_path: Path) -> None:
    """By `from=`, and by way of an exported folder."""
    tuned = bench.run("train", "method=lora", RATE, *TRAINED, "evaluator=[]")
    words = ["method=rtn", "method.group_size=32", *HARDWARE, "evaluator=[perplexity]"]
    chained = bench.run("compress", f"from={tuned.key}", *words)
    export(tuned.key, tmp_path / "out", "", bench.root, "transformers")
    apart = bench.run("compress", "model=folder", f"model.path={tmp_path / 'out'}", *words)
    plain = bench.run("compress", *words)
    assert loss(chained) == loss(apart) != loss(plain)
    again = bench.run("eval", f"from={chained.key}", *HARDWARE, "evaluator=[perplexity]")
    assert loss(again) == loss(chained)


def test_three_commands_in_a_row(bench: Bench) -> None:
    """Quantised, tuned, tuned once more on the dense sum: each starts where the last one ended."""
    first = bench.run("compress", "method=rtn", *HARDWARE, "evaluator=[]")
    tuned = bench.run(
        "train", f"from={first.key}", "method=lora", RATE, *TRAINED, "evaluator=[perplexity]"
    )
    further = bench.run(
        "train",
        f"from={tuned.key}",
        "method=dora",
        "train.learning_rate=1e-30",
        *TRAINED,
        "evaluator=[perplexity]",
    )
    assert loss(further) == pytest.approx(loss(tuned), rel=1e-5)
