"""A key changes with everything that changes a result, and with nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from effbench.api import registry
from effbench.api.schema import plain
from effbench.api.spec import DatasetSpec, HardwareSpec, Job, ModelSpec, Plugin, TrainSpec
from effbench.config.compose import compose
from effbench.config.composed import settings_of
from effbench.results.store import Store
from effbench.runner.open import load_frozen
from effbench.util.errors import UserError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a folder that can be composed with, though not loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(bytes(3 << 20))
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    return path


def key(*words: str) -> str:
    return compose("eval", ["hardware=cpu", "evaluator=perplexity", *words]).spec.key


def of_model(folder: Path) -> str:
    return key("model=folder", f"model.path={folder}", "dataset=arithmetic")


def of_rows(**files: Path) -> str:
    cut = "dataset.cut={}" if "all" not in files else "dataset.cut={test: 1}"
    words = [f"dataset.files.{split}={path}" for split, path in files.items()]
    return key("model=tiny", "dataset=file", cut, *words)


def test_a_default_run_has_the_key_that_it_always_had() -> None:
    """That of its committed record."""
    words = ["hardware.device=cpu", "hardware.dtype=bfloat16", "hardware.threads=0"]
    assert compose("eval", words).spec.key == "8148650c7705b238"


def test_a_copy_of_a_model_elsewhere_has_the_same_key(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "other.name")
    assert of_model(copy) == of_model(model)


def test_a_changed_weight_in_the_middle_of_a_model_is_another_key(model: Path) -> None:
    before = of_model(model)
    weights = bytearray(3 << 20)
    weights[len(weights) // 2] = 1
    (model / "model.safetensors").write_bytes(weights)
    assert of_model(model) != before


def test_the_same_rows_elsewhere_have_the_same_key(rows: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(rows, tmp_path / "other.jsonl"))
    assert of_rows(all=rows) == of_rows(all=copy)
    copy.write_text('{"prompt": "1 + 1 =", "answer": "3"}\n')
    assert of_rows(all=rows) != of_rows(all=copy)


def test_how_rows_are_read_and_which_split_they_are_is_in_the_key(
    rows: Path, tmp_path: Path
) -> None:
    csv = Path(shutil.copy(rows, tmp_path / "rows.csv"))
    assert of_rows(all=rows) != of_rows(all=csv)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "2 + 2 =", "answer": "4"}\n')
    assert of_rows(train=rows, test=other) != of_rows(train=other, test=rows)


# -- the page --------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text()
BASE = ["model=tiny", "dataset=arithmetic", "hardware=cpu"]
RTN = ["method=rtn", *BASE]


def listed(head: str) -> list[str]:
    """Return the first cells of the table on the page whose first column is called so."""
    rows = PAGE.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return [row.split("|")[1].strip() for row in rows]


@dataclass
class Case:
    """Words of a run, and what changes about it: other words, or something on the disk."""

    words: list[str]
    other: list[str] | None = None
    act: Callable[[Path], object] | None = None
    stage: str = "train"


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda place: (place / name).write_text(text)


def noted(repository: str) -> Callable[[Path], object]:
    """Note the commit of a branch as the hub's client does."""

    def act(place: Path) -> None:
        refs = place / "hub" / repository / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text("c" * 40)

    return act


LOCAL = ["model=folder", "model.path=model", *BASE[1:]]
MINE = ["dataset=file", "dataset.files.all=rows.jsonl", "model=tiny", "hardware=cpu"]
SPLIT = [MINE[0], *MINE[2:], "dataset.cut={}"]
TASK = ["evaluator=[choices]", "evaluator.choices.tasks=[copa]"]
TASK += ["evaluator.choices.files.copa.validation=rows.jsonl", *BASE]
MOVES = "tinyllama-1.1b"
"""A config of a model that is a branch on the hub."""
AS_THEIRS = "model.shape.vocab_size=32000"
"""Gives a model as many tokens as that one has."""
LONGER = '{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "1 + 2 =", "answer": "3"}\n'

IN_THE_KEY: dict[str, list[Case]] = {
    "stage": [Case(BASE, ["method=rtn", *BASE])],
    "method": [Case(BASE, [*BASE, "method=dora"]), Case(BASE, [*BASE, "method.rank=3"])],
    "evaluators": [
        Case(BASE, [*BASE, "evaluator=[choices]"]),
        Case(BASE, [*BASE, "evaluator=[]"]),
        Case(BASE, [*BASE, "evaluator.perplexity.window=64"]),
        Case(TASK, act=write("rows.jsonl", LONGER), stage="eval"),
    ],
    "seed": [Case(BASE, [*BASE, "seed=1"])],
    "earlier run": [Case(["from=aaaa"], ["from=bbbb"], stage="eval")],
    "device, dtype, threads": [
        Case(BASE, [*BASE, f"hardware.{word}"])
        for word in ("device=cuda", "dtype=float16", "threads=1")
    ],
    "training": [Case(BASE, [*BASE, f"train.{word}"]) for word in ("max_steps=3", "patience=1")],
    "model": [
        Case(BASE, [*BASE, "model.weights_seed=1"]),
        Case(BASE, [*BASE, "model.shape.num_layers=3"]),
        Case(BASE, [*BASE, "model.revision=v2"]),
        Case(BASE, ["model=llama2-7b", *BASE[1:]]),
    ],
    "files of a local model": [
        Case(LOCAL, act=write("model/tokenizer.json", "{}")),
        Case(LOCAL, act=write("model/config.json", json.dumps({**CONFIG, "rope_theta": 5.0}))),
        Case(LOCAL, act=lambda place: os.truncate(place / "model" / "model.safetensors", 1 << 20)),
    ],
    "commit of a model or dataset of the hub": [
        Case(["model=hub", "model.id=a/b", *BASE[1:]], act=noted("models--a--b")),
        Case([*BASE, "dataset.source=hub", "dataset.id=a/b"], act=noted("datasets--a--b")),
    ],
    "other models that are loaded": [
        Case([*words, *BASE], act=noted("models--TinyLlama--TinyLlama_v1.1"), stage=stage)
        for stage, words in (
            ("train", ["method=kd", f"method.teacher={MOVES}", AS_THEIRS]),
            ("train", ["method=subset", "method.by=lowest_loss", f"method.reference={MOVES}"]),
            ("train", ["evaluator=[trust]", f"evaluator.trust.reference={MOVES}"]),
            ("eval", ["evaluator=[best_of_n]", f"evaluator.best_of_n.policy={MOVES}"]),
        )
    ],
    "dataset": [
        Case(BASE, [*BASE, f"dataset.{word}"])
        for word in (
            "max_length=32",
            "limit.test=5",
            "cut.train=0.7",
            "prompt='Q: {prompt}'",
            "kind=pairs",
            "columns.weight=label",
            "missing=skip",
        )
    ],
    "files of local data": [
        Case(MINE, act=write("rows.jsonl", LONGER)),
        Case(MINE, [*MINE, "dataset.files.all=rows.csv"]),
        Case(
            [*SPLIT, "dataset.files.train=rows.jsonl", "dataset.files.test=other.jsonl"],
            [*SPLIT, "dataset.files.train=other.jsonl", "dataset.files.test=rows.jsonl"],
        ),
    ],
    "how rows are identified": [Case(MINE, [*MINE, "dataset.known_by=text"])],
}
"""What the rows of the page stand for; the last two of them have tests of their own."""
ELSEWHERE = {
    "versions": "test_a_raised_version_changes_the_keys_of_what_uses_it",
    "code of other packages": "test_editing_what_a_method_is_made_of_is_another_key",
    "settings that were added later, at the value of the earlier behaviour": (
        "test_a_field_more_in_the_spec_changes_no_key"
    ),
    "code of methods and evaluators of effbench": "test_an_evaluation_gives_what_it_gave",
}
NOT_IN_THE_KEY: dict[str, list[Case]] = {
    "folder of results, tracker, progress, exact memory": [
        Case(BASE, [*BASE, f"run.{word}"])
        for word in ("results=other", "tracker=wandb", "progress=false", "exact_memory=true")
    ],
    "stated ceilings of a machine": [
        Case(BASE, [*BASE, f"hardware.{word}"])
        for word in ("memory_gib=9", "tflops=2", "bandwidth_gbs=7", "tdp_watts=5", "name=mine")
    ],
    "where local files lie": [
        Case(LOCAL, [*LOCAL, "model.path=copy"]),
        Case(MINE, [*MINE, "dataset.files.all=copy/rows.jsonl"]),
        Case(
            TASK,
            [*TASK, "evaluator.choices.files.copa.validation=copy/rows.jsonl"],
            stage="eval",
        ),
    ],
    "files that loading does not read": [
        Case(LOCAL, act=write(f"model/{name}", "x"))
        for name in ("README.md", ".git", "optimizer.pt", "trainer_state.json")
    ],
    "training of a stage that trains nothing": [
        Case(RTN, [*RTN, "train.max_steps=9"], stage="compress"),
        Case(BASE, [*BASE, "train.learning_rate=1"], stage="eval"),
    ],
    "number of devices of a training, and how they share the model": [
        Case(BASE, [*BASE, "hardware.devices=2"])
    ],
    "order of evaluators and of keys": [
        Case(
            [*BASE, "evaluator=[choices,perplexity]"],
            [*BASE[::-1], "evaluator=[perplexity,choices]"],
        )
    ],
}


def cases(of: dict[str, list[Case]]) -> list[Any]:
    return [
        pytest.param(case, id=f"{item}-{number}")
        for item, found in of.items()
        for number, case in enumerate(found)
    ]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, rows: Path) -> Path:
    """Return the current folder, with local files and two finished runs in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EFFBENCH_RESULTS", raising=False)
    monkeypatch.setattr("effbench.data.lm_eval_tasks.check_hub", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "rows.csv").write_text(rows.read_text())
    (tmp_path / "other.jsonl").write_text(LONGER)
    shutil.copytree(model, tmp_path / "copy")
    shutil.copy(rows, tmp_path / "copy" / "README.md")
    shutil.copy(rows, tmp_path / "copy" / ".rows")
    spec = compose("eval", BASE).spec
    for start in "ab":
        run = Store(tmp_path / "results").run(start * 16)
        run.create(spec)
        run.finish()
    return tmp_path


def keys_of(case: Case, place: Path) -> tuple[str, str]:
    stage = None if case.other and "method=rtn" in case.other else case.stage
    before = compose(case.stage, case.words).spec.key
    if case.act:
        case.act(place)
    return before, compose(stage, case.other or case.words).spec.key


@pytest.mark.parametrize("case", cases(IN_THE_KEY))
def test_what_the_page_lists_changes_the_key(case: Case, place: Path) -> None:
    before, after = keys_of(case, place)
    assert before != after


@pytest.mark.parametrize("case", cases(NOT_IN_THE_KEY))
def test_what_the_page_leaves_out_does_not_change_the_key(case: Case, place: Path) -> None:
    (place / "copy" / "rows.jsonl").write_text((place / "rows.jsonl").read_text())
    if "model.path=copy" in (case.other or ()):
        (place / "copy" / "rows.jsonl").unlink()
    before, after = keys_of(case, place)
    assert before == after


REACH = ("reference", "policy", "teacher")
"""What settings that name another model are called."""


@pytest.mark.parametrize("kind", ["methods", "evaluators"])
def test_no_setting_names_another_model_that_is_not_in_the_key(kind: Any) -> None:
    found = {
        (name, field)
        for name in registry.names(kind)
        for field in settings_of(registry.find(kind, name))
        if field in REACH
    }
    assert found
    for name, field in found:
        plugged = registry.find(kind, name)
        settings = {**getattr(plugged, "needs", {}), field: MOVES}
        settings |= {"by": "lowest_loss"} if name == "subset" else {}
        assert plugged(**settings).others() == (MOVES,), name


def test_the_model_that_the_key_names_is_loaded_and_no_other(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[ModelSpec] = []
    monkeypatch.setattr("effbench.runner.open._load_dense", lambda _, model: loaded.append(model))
    words = ["method=kd", f"method.teacher={MOVES}", AS_THEIRS, *BASE]
    noted("models--TinyLlama--TinyLlama_v1.1")(place)
    run = SimpleNamespace(spec=compose("train", words).spec)
    (place / "hub" / "models--TinyLlama--TinyLlama_v1.1" / "refs" / "main").write_text("d" * 40)
    load_frozen(run, MOVES)  # type: ignore[arg-type]
    assert [model.fingerprint for model in loaded] == ["c" * 40]
    with pytest.raises(UserError, match="the key of the run does not say so"):
        load_frozen(run, "tiny")  # type: ignore[arg-type]


def test_every_item_of_the_page_is_tried() -> None:
    assert set(listed("in the key")) == {*IN_THE_KEY, "versions", "code of other packages"}
    assert set(listed("not in the key")) == {*NOT_IN_THE_KEY, *list(ELSEWHERE)[2:]}
    tests = "".join(p.read_text() for p in Path(__file__).parents[1].rglob("test_*.py"))
    for item, name in ELSEWHERE.items():
        assert f"def {name}(" in tests, item


# -- every field -----------------------------------------------------------------------------------

PARTS = {"model": ModelSpec, "dataset": DatasetSpec, "train": TrainSpec, "hardware": HardwareSpec}


def other_than(value: Any) -> Any:
    """Return another value of the same form."""
    if isinstance(value, dict):
        return {**value, "more": "x"}
    if isinstance(value, list | tuple):
        return [*value, "x"]
    if isinstance(value, bool) or value is None:
        return not value
    return f"{value}x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize(
    "part, name", [(part, f.name) for part, cls in PARTS.items() for f in dataclasses.fields(cls)]
)
def test_every_field_of_a_spec_is_in_the_key(part: str, name: str) -> None:
    spec = compose("train", BASE).spec
    held = getattr(spec, part)
    changed = dataclasses.replace(held, **{name: other_than(plain(getattr(held, name)))})
    assert dataclasses.replace(spec, **{part: changed}).key != spec.key


PLUGINS = [(kind, name) for kind in ("methods", "evaluators") for name in registry.names(kind)]


@pytest.mark.parametrize("kind, name", PLUGINS)
def test_every_setting_of_a_plugin_is_in_the_key(kind: Any, name: str) -> None:
    spec = compose("train", BASE).spec
    needs = registry.find(kind, name).needs if kind == "methods" else {}
    settings = {**settings_of(registry.find(kind, name)), **needs}

    def key_with(values: dict[str, Any]) -> str:
        plugin = Plugin(name, values)
        changed = {"method": plugin} if kind == "methods" else {"evaluators": [plugin]}
        return dataclasses.replace(spec, **changed).key

    changed = {key: {**settings, key: other_than(value)} for key, value in settings.items()}
    keys = {key: key_with(values) for key, values in changed.items()}
    assert len({*keys.values(), key_with(settings)}) == len(settings) + 1


def test_nothing_of_a_job_beside_its_spec_is_in_the_key() -> None:
    fields = {f.name for f in dataclasses.fields(Job)}
    assert fields == {"spec", "runtime", "command", "notes"}
