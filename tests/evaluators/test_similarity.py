"""The similarity evaluator: its texts, its means over texts, what it keeps and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from subjects import by_name, subject_of

from effbench.evaluators.similarity import Similarity, layer_rows, means
from effbench.nn.sharing.ranking import joined
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

WORDS = ["+dataset.limit.train=40"]


def test_texts_have_one_length_and_no_padding() -> None:
    rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
    assert joined(rows, 4, 9) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert joined(rows, 2, 2) == [[1, 2], [4, 5]]
    assert joined([[1]], 2, 1) == []


def sample(value: float) -> dict[str, Any]:
    matrix = [[1.0, value], [value, 1.0]]
    return {
        "attention": matrix,
        "keys": matrix,
        "values": [[1.0, 0.5], [0.5, 1.0]],
        "passed": [value, 1.0],
        "distances": [[0.0, 0.1, 0.2], [0.1, 0.0, 0.3], [0.2, 0.3, 0.0]],
    }


def test_means_are_over_pairs_of_layers_and_do_not_depend_on_the_order_of_texts() -> None:
    found = means([sample(0.2), sample(0.6)])
    assert found["attention_similarity"] == [0.2, 0.6]
    assert found["value_similarity"] == [0.5, 0.5]
    assert found["block_influence"] == pytest.approx([0.4, 0.2])
    samples = [sample(0.01 * i) for i in range(1, 12)]
    rows, other = layer_rows(samples, 0), layer_rows(samples[::-1], 0)
    for one, two in zip(rows, other, strict=True):
        assert one["attention"] == pytest.approx(two["attention"])
        assert one["score"][0] == pytest.approx(two["score"][0])
    value, low, high = rows[0]["score"]
    assert value == pytest.approx(0.06)
    assert low < value < high
    assert rows[0]["distances"] == pytest.approx([0.1, 0.2])
    assert rows[1]["distances"] == pytest.approx([0.3])


def test_it_gives_means_with_outcomes_and_keeps_the_matrices(bench: Bench) -> None:
    subject, kept = subject_of(bench, *WORDS), {}
    subject.keep = lambda name, rows: kept.update({name: json.loads(json.dumps(rows))})
    result = Similarity(samples=3, tokens=16).run(subject)
    found = by_name(result)
    assert set(found) == {
        "attention_similarity",
        "key_similarity",
        "value_similarity",
        "block_influence",
    }
    assert all(m.n == 3 and m.split == "train" for m in found.values())
    assert [len(o.values) for o in result.outcomes] == [3] * 4
    assert len(kept["layers"]) == 4
    matrix = [row["attention"] for row in kept["layers"]]
    mean = sum(matrix[i][j] for i in range(4) for j in range(4) if i != j) / 12
    assert found["attention_similarity"].value == pytest.approx(mean)


def test_rows_that_were_trained_on_may_be_looked_at() -> None:
    assert Similarity().splits() == ()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("evaluator.similarity.tokens=513", "more than the 512 positions"),
        ("evaluator.similarity.split=trian", "has no split 'trian'"),
        ("evaluator.similarity.tokens=1", "tokens"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(bench: Bench, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.job("eval", "evaluator=similarity", word)


def test_too_few_tokens_are_refused(bench: Bench) -> None:
    subject = subject_of(bench, "+dataset.limit.train=1")
    with pytest.raises(UserError, match="fewer than 400 tokens"):
        Similarity(tokens=400).run(subject)
