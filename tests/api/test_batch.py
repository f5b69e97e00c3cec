"""Examples, columns and batches."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import torch
from helpers import context, example_of, tiny_model

from effbench.api.batch import collate
from effbench.api.examples import Example, Tokens
from effbench.methods.trains import Trains
from effbench.runner.stages.batching import micro_batches, passes_of, rows_of_step, window

CPU = torch.device("cpu")


def unit_of(number: int, sizes: tuple[int, ...], **columns: float) -> Example:
    parts = [Tokens([10 * number + k] * n, 1, n - 1) for k, n in enumerate(sizes)]
    return Example(str(number), tuple(parts), columns=columns)


def test_columns_of_examples_sequences_and_tokens() -> None:
    parts = (
        Tokens([5, 6, 7], 1, 2, columns={"judge": 0.5, "teacher": [0.1, 0.2, 0.3]}),
        Tokens([8, 9], 1, 1, columns={"judge": 1.5, "teacher": [0.4, 0.5]}),
    )
    pair = Example("a", parts, columns={"task": 3, "rules": [1, 0]})
    batch = collate([pair, replace(pair, id="b", columns={"task": 4, "rules": [0, 0]})], 0)
    assert batch.sizes == [2, 2]
    assert batch.rows == [0, 0, 1, 1]
    assert batch.columns["task"].tolist() == [3, 4]
    assert batch.columns["rules"].tolist() == [[1, 0], [0, 0]]
    assert batch.columns["judge"].tolist() == [0.5, 1.5, 0.5, 1.5]
    assert batch.columns["teacher"].shape == batch.input_ids.shape == (4, 3)
    assert batch.columns["teacher"][1].tolist() == pytest.approx([0.4, 0.5, 0.0])
    assert batch.columns["task"].dtype == torch.int64
    moved = batch.to(torch.device("meta"))
    assert {c.device.type for c in moved.columns.values()} == {"meta"}
    assert moved.sizes == batch.sizes


def test_a_column_is_there_for_all_or_for_none() -> None:
    with pytest.raises(ValueError, match="columns task"):
        collate([example_of(0, task=1), example_of(1)], 0)


def test_sequences_of_an_example_are_never_dealt_apart() -> None:
    examples = [unit_of(i, (3 + 7 * (i % 3), 20 - i)) for i in range(9)]
    for most in (1, 2, 5):
        batches = window(examples, range(9), most, 0, CPU)
        assert sorted(i for b in batches for i in b.rows) == sorted([*range(9)] * 2)
        for batch in batches:
            assert batch.rows[::2] == batch.rows[1::2], "side by side"
            assert len(batch.rows) <= 2 * most
            assert batch.window_examples == 9
            firsts = batch.input_ids[:, 0].tolist()
            assert firsts == [10 * r + k for r, k in zip(batch.rows, [0, 1] * 9, strict=False)]


def test_the_same_row_twice_in_a_step_stays_two_examples() -> None:
    batches = window([unit_of(0, (4, 4))], [0, 0], 2, 0, CPU)
    assert [b.sizes for b in batches] == [[2, 2]]


def test_groups_weigh_all_sequences_of_a_row() -> None:
    # Padding one row of eight sequences by 40 tokens costs more than a pass; one sequence does not.
    assert len(micro_batches([100, 60], 2, 128)) == 1
    assert len(micro_batches([100, 60], 2, 128, [1, 8])) == 2
    assert micro_batches([100, 60, 30], 2, 128) == micro_batches([100, 60, 30], 2, 128, [1, 1, 1])


def test_what_is_foreseen_is_what_a_window_has() -> None:
    examples = [unit_of(i, (3 + i, 9)) for i in range(7)]
    found, most = passes_of(examples, steps=4, seed=1, size=5, most=2, device=CPU)
    seen = set()
    for step in range(4):
        batches = window(examples, rows_of_step(7, 1, step, 5), 2, 0, CPU)
        assert len(batches) <= most
        seen |= {(*b.input_ids.shape, b.loss_tokens) for b in batches}
    assert {astuple(p)[1:4] for p in found} == seen


def test_a_weight_counts_a_row_so_often() -> None:
    once, twice = example_of(1, weight=1.0), example_of(2, weight=2.0)
    model, method, ctx = tiny_model().eval(), Trains(), context()

    def loss(rows: list[Example], most: int) -> float:
        batches = window(rows, range(len(rows)), most, 0, CPU)
        return sum(float(method.loss(model, b, ctx).detach()) for b in batches)

    plain = [replace(e, columns={}) for e in (once, twice, twice)]
    for most in (1, 2, 3):
        assert loss([once, twice], most) == pytest.approx(loss(plain, most), rel=1e-6)
    assert loss([once, twice], 2) != pytest.approx(loss(plain[:2], 2), rel=1e-4)


def test_the_weight_of_an_example_is_that_of_all_its_sequences() -> None:
    batch = collate([unit_of(1, (2, 3), weight=0.5), unit_of(2, (4,), weight=3)], 0)
    assert batch.weights is not None
    assert batch.weights.tolist() == [0.5, 0.5, 3.0]
    assert collate([unit_of(1, (2, 3))], 0).weights is None
