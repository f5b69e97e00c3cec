"""Words that are varied give what Hydra makes of them in full."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from effbench.config import vary
from effbench.config.compose import job_from
from effbench.config.composed import hydra_compose
from effbench.config.overrides import check_overrides
from effbench.config.vary import Composer
from effbench.util.errors import UserError

TINY = ["model=tiny", "dataset=arithmetic"]
BY_ITSELF = [
    ["seed=3", "method.rank=4", "train.learning_rate=1e-3"],
    ["dataset.limit.test=8", "train.betas=[0.8,0.99]"],
    ["method.targets=[q_proj,'v_proj']", "method.eval_ranks=[]", "train.learning_rate=null"],
    ["'dataset.prompt=x'".strip("'"), 'dataset.answer=" {answer}, \\\\n"'],
    ["method=dora", "method.dropout=0.5", "run.results='a b'"],
    ["evaluator=[perplexity,memory]", "evaluator.perplexity.split=validation"],
    ["train.max_steps=7", "train.max_steps=9", "hardware.threads=1", "run.progress=off"],
    ["experiment=low_bits", "seed=2"],
]
IN_FULL = [
    ["train.warmup=0.1", "train.weight_decay=${train.warmup}"],
    ["run.results=${oc.env:HOME}/x"],
    ["~train.betas", "seed=1"],
    ["+evaluator.perplexity.stride=3"],
    ["dataset.limit={test:4,train:9}"],
    ["model.shape.hidden_size=32", "model.shape={hidden_size:32}"],
    ["dataset.files.all=[a.jsonl,b.jsonl]", "dataset.files={}"],
    ["method.new_key=1", "seed='${train.batch_size}'"],
]


def both(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[object, object, bool]:
    """Return what is made of words each way, and whether the fast way was left."""
    left: list[object] = []
    full = vary.hydra_compose
    monkeypatch.setattr(vary, "hydra_compose", lambda *a: left.append(a) or full(*a))
    words = check_overrides([*TINY, *words]).with_defaults("train")
    return outcome(Composer(), words), outcome(lambda w: hydra_compose(w, []), words), bool(left)


def outcome(compose: object, words: list[str]) -> object:
    try:
        return compose(words)  # type: ignore[operator]
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("words", BY_ITSELF, ids=" ".join)
def test_plain_values_are_put_in_as_hydra_does(words, monkeypatch) -> None:
    varied, full, left = both(words, monkeypatch)
    assert varied == full
    assert not left


@pytest.mark.parametrize("words", IN_FULL, ids=" ".join)
def test_the_rest_is_left_to_hydra(words, monkeypatch) -> None:
    varied, full, left = both(words, monkeypatch)
    assert varied == full
    assert left


def test_what_is_missing_is_asked_for(monkeypatch) -> None:
    words = ["+method.bits=4", "method=lora", "model=folder"]
    varied, full, left = both(words, monkeypatch)
    assert varied == full and left and "has no value" in str(full)


def test_keys_of_varied_runs_are_those_of_runs_composed_in_full() -> None:
    axes = [["method=lora", "method=qlora"], ["method.rank=2", "method.rank=4"]]
    axes += [["seed=0", "seed=1"], ["train.learning_rate=1e-3", "train.learning_rate=0.001"]]
    composer, keys = Composer(), set()
    for point in product(*axes):
        checked = check_overrides([*TINY, *point])
        words = checked.with_defaults("train")
        there = job_from("train", composer(words), checked.chosen)
        assert there == job_from("train", hydra_compose(words, []), checked.chosen)
        keys.add(there.spec.key)
    assert len(keys) == 8, "one rate in two spellings"


def test_one_set_of_words_leaves_nothing_in_the_next() -> None:
    composer = Composer()
    words = check_overrides([*TINY, "seed=0"]).with_defaults("train")
    before = composer(words)
    composer([*words, "++train.betas=[0.1,0.2]", "++dataset.limit.test=3", "++method.alpha=2"])
    assert composer(words) == before == hydra_compose(words, [])


def test_own_configs_are_found(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nsource: random\nid: '${seed}'\n")
    words = check_overrides(["model=mine", "seed=4"], [tmp_path]).with_defaults("train")
    config = Composer([tmp_path])(words)
    assert config == hydra_compose(words, [tmp_path])
    assert config["model"]["id"] == 4, "an interpolation of a file follows the word"


def test_a_variable_is_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "name: mine\nsource: random\nid: ${oc.env:OF_MINE}\n"
    )
    words = check_overrides(["model=mine"], [tmp_path]).with_defaults("train")
    for value in ("one", "two"):
        monkeypatch.setenv("OF_MINE", value)
        assert Composer([tmp_path])(words)["model"]["id"] == value


def test_a_key_is_added_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    varied, full, left = both(["+dataset.limit.train=16"], monkeypatch)
    assert varied == full and not left
    varied, full, left = both(["+seed=1"], monkeypatch)
    assert varied == full and left
