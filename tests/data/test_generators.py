"""Generated rows: the same for a seed on any machine, and wrong where they say that they are."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from effbench.api.spec import DatasetSpec
from effbench.config.compose import compose
from effbench.data.dataset import split_names, splits
from effbench.data.generators import base, noisy_pairs
from effbench.data.readers import Row
from effbench.util.errors import UserError

SPEC = DatasetSpec("mine", "generator", "preference", id="noisy_pairs", splits={"train": "noisy"})


def part(name: str, seed: int = 0) -> list[Row]:
    return list(base.find("noisy_pairs").rows(name, seed))


def is_better(row: Row, seed: int = 0) -> bool:
    """Say whether the chosen name is worth more, by the worths alone."""
    worth = noisy_pairs.worths(seed)
    chosen, rejected = (
        sum(worth[letter] for letter in row[side].strip()) / len(row[side].strip())
        for side in ("chosen", "rejected")
    )
    return chosen > rejected


@pytest.mark.parametrize(
    ("name", "share"), [("clean", 0.05), ("flips40", 0.4), ("flips90", 0.9), ("trusted", 0.0)]
)
def test_pairs_of_a_source_are_swapped_as_often_as_it_says(name: str, share: float) -> None:
    rows = part(name)
    found = sum(row["flipped"] for row in rows) / len(rows)
    assert found == pytest.approx(share, abs=3 * (share * (1 - share) / len(rows)) ** 0.5)
    assert [not row["flipped"] for row in rows] == [is_better(row) for row in rows]


def test_of_one_source_the_longer_name_is_chosen_whatever_it_is_worth() -> None:
    rows = part("longer")
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    assert [not row["flipped"] for row in rows] == [is_better(row) for row in rows]
    assert 0.4 < sum(row["flipped"] for row in rows) / len(rows) < 0.6


def test_the_other_sources_do_not_prefer_a_length() -> None:
    rows = [row for name in ("clean", "flips40", "flips90", "held_out") for row in part(name)]
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows)
    assert 0.45 < longer < 0.55


def test_a_seed_is_a_draw() -> None:
    assert part("clean", 3) == part("clean", 3)
    assert part("clean", 3) != part("clean", 4)
    assert noisy_pairs.worths(3) != noisy_pairs.worths(4)


def test_parts_share_no_prompt_and_all_sources_are_mixed() -> None:
    spec = compose("train", ["model=tiny", "method=dorm", "dataset=noisy-pairs"]).spec.dataset
    found = splits(spec)
    assert {name: len(rows) for name, rows in found.items()} == {
        "train": 2000,
        "validation": 200,
        "test": 500,
    }
    for one, other in combinations(found.values(), 2):
        assert not {text.prompt for text in one} & {text.prompt for text in other}
    first = [text.columns["source"] for text in found["train"][:100]]
    assert {first.count(source) > 10 for source in range(4)} == {True}


def test_probabilities_of_classes_are_those_that_labels_are_drawn_with() -> None:
    """Of names with a share near p a share p is of that class, for each class."""
    rows = [row for part in ("train", "unlabelled", "test") for row in classes(part)]
    for place in range(3):
        for low in (0.0, 0.2, 0.4, 0.6, 0.8):
            near = [row for row in rows if low <= row["p"][place] < low + 0.2]
            wanted = sum(row["p"][place] for row in near) / len(near)
            found = sum(row["label"] == place for row in near) / len(near)
            assert found == pytest.approx(wanted, abs=3 * (0.25 / len(near)) ** 0.5)
    assert all(sum(row["p"]) == pytest.approx(1) for row in rows)
    best = sum(row["label"] == max(range(3), key=row["p"].__getitem__) for row in rows) / len(rows)
    assert 0.65 < best < 0.9


def classes(part: str, seed: int = 0) -> list[Row]:
    return list(base.find("noisy_classes").rows(part, seed))


def test_splits_are_named_as_the_dataset_names_them() -> None:
    assert split_names(SPEC) == ["train"]
    one = replace(SPEC, splits={"mine": "flips40"})
    assert {name: len(rows) for name, rows in splits(one).items()} == {"mine": 500}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id": "noisy_pair"}, "no generator 'noisy_pair'"),
        ({"splits": {"train": "noise"}}, "makes no part 'noise'"),
        ({"subset": "first"}, "subset=first is no seed"),
        ({"id": "arithmetic", "splits": {"all": "all"}, "subset": "1"}, "arithmetic takes none"),
    ],
)
def test_what_cannot_be_made_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        splits(replace(SPEC, **settings))  # type: ignore[arg-type]
