"""Which command takes what from the run that it goes on from."""

from __future__ import annotations

from typing import Any

import pytest

from effbench.api.spec import Spec
from effbench.config.composed import hydra_compose
from effbench.config.lineage import inherit
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

TAKEN = [
    # stage, words, of the method and of the dataset: whose settings; "own" is what was chosen
    ("train", ["method=lora"], "own", "theirs"),
    ("compress", ["method=rtn"], "own", "theirs"),
    ("eval", [], "theirs", "theirs"),
    ("eval", ["method=depths"], "own", "theirs"),
    ("eval", ["dataset=arithmetic"], "theirs", "own"),
    ("eval", ["dataset.max_length=99"], "theirs", {"max_length": 99}),
    ("train", ["method=lora", "dataset.max_length=99"], "own", {"max_length": 99}),
    ("eval", ["method.windows=[1,2]"], {"windows": [1, 2]}, "theirs"),
]
FIXED = [
    ("train", ["method=lora", "model=tiny"], "the model"),
    ("eval", ["model=tiny"], "the model"),
    ("eval", ["model.weights_seed=1"], "the model"),
    ("eval", ["method=lora"], "the method"),
    ("eval", ["method=none"], "the method"),
    ("eval", ["method.window=3"], "the method"),
]


def taken(bench: Bench, stage: str, words: list[str]) -> tuple[Spec, dict[str, Any], list[Any]]:
    """Return the earlier run, what the words compose to, and what the later run makes of both."""
    earlier = bench.job("train", "method=lora_drop", "dataset.max_length=48").spec
    names = {w.partition("=")[0].partition(".")[0] for w in words if "." not in w.partition("=")[0]}
    defaults = {"model": "tiny", "dataset": "arithmetic", "method": "lora_drop"}
    rest = [f"{k}={v}" for k, v in defaults.items() if k not in names]
    config = hydra_compose([*rest, *words], [])
    chosen = {w.partition("=")[0] for w in words}
    return earlier, config, list(inherit(stage, config, chosen, "key", earlier))


@pytest.mark.parametrize(("stage", "words", "method", "dataset"), TAKEN)
def test_a_later_run_takes_over(
    stage: str, words: list[str], method: Any, dataset: Any, bench: Bench
) -> None:
    earlier, config, (own, model, data) = taken(bench, stage, words)
    assert model == earlier.model
    assert own.name == (config["method"]["name"] if method == "own" else earlier.method.name)
    if method != "own":
        changed = method if isinstance(method, dict) else {}
        assert own.settings == earlier.method.settings | changed
    if dataset == "own":
        assert data.max_length == config["dataset"]["max_length"] != earlier.dataset.max_length
    else:
        changed = dataset if isinstance(dataset, dict) else {}
        assert vars(data) == vars(earlier.dataset) | changed


@pytest.mark.parametrize(("stage", "words", "what"), FIXED)
def test_what_a_run_fixed_is_not_chosen_again(
    stage: str, words: list[str], what: str, bench: Bench
) -> None:
    with pytest.raises(UserError, match=f"from= already fixes {what}"):
        taken(bench, stage, words)


def test_without_a_run_all_is_chosen(bench: Bench) -> None:
    config = hydra_compose(["model=tiny", "dataset=arithmetic", "method=none"], [])
    method, model, data = inherit("eval", config, set(), "", None)
    assert (method.name, model.name, data.name) == ("none", "tiny", "arithmetic")
