from __future__ import annotations

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml

from effbench.api import registry
from effbench.api.schema import PositiveInt, build, plain
from effbench.api.spec import DatasetSpec, HardwareSpec, ModelSpec, Plugin, Spec, TrainSpec
from effbench.cli.listing import entries
from effbench.cli.show import describe
from effbench.config.compose import compose
from effbench.config.composed import settings_of
from effbench.config.files import options
from effbench.data.assets import path_of
from effbench.methods.base import Method
from effbench.util.errors import UserError
from effbench.util.package_data import conf_dir

NEEDS = {
    "model=hub": ["model.id=some/model"],
    "model=folder": ["model.path={folder}"],
    "model=gguf": None,  # needs a real file; tests/models/test_models.py
    "dataset=file": ["dataset.files.all={folder}/rows.jsonl"],
}
NAMED = [f"{g}={n}" for g in ("model", "method", "dataset", "hardware") for n in options(g)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shape = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
    more = {"intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(shape | more))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    return tmp_path


@pytest.mark.parametrize("word", [*NAMED, *(f"evaluator={n}" for n in options("evaluator"))])
def test_every_named_config_composes(word: str, folder: Path) -> None:
    if word == "model=minilm" and not path_of("minilm"):
        pytest.skip("its shape is known once it is fetched")
    needs = NEEDS.get(word, [])
    if needs is None:
        pytest.skip("needs a file that is no text")
    own = [] if word.startswith("model=") else ["model=tiny"]
    if word.startswith("method="):
        wanted = registry.find("methods", word.removeprefix("method=")).needs
        own += [f"method.{k}={json.dumps(v)}" for k, v in wanted.items()]
    long = [] if word.startswith("dataset=") else ["dataset=arithmetic"]
    if word.startswith("dataset="):
        long = ["dataset.max_length=64"]
    if word.startswith("evaluator="):
        name = word.removeprefix("evaluator=")
        trial = registry.find("evaluators", name).trial
        own += [f"evaluator.{name}.{k}={json.dumps(v)}" for k, v in trial.items()]
    job = compose(None, [word, *own, *long, *(n.format(folder=folder) for n in needs)])
    assert len(job.spec.key) == 16


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes(name: str) -> None:
    job = compose(None, [f"experiment={name}"])
    values = yaml.safe_load((conf_dir() / "experiment" / f"{name}.yaml").read_text())
    chosen = {k.split("/")[-1]: v for d in values["defaults"] for k, v in d.items()}
    assert job.spec.method.name == chosen["method"]
    assert job.spec.model.name == chosen["model"]


@pytest.mark.parametrize("name", [n for n in options("method") if options("method")[n]])
def test_the_file_of_a_method_is_its_dataclass_filled_in(name: str) -> None:
    values = yaml.safe_load((conf_dir() / "method" / f"{name}.yaml").read_text())
    assert values.pop("name") == name
    assert values == settings_of(registry.find("methods", name))


@pytest.mark.parametrize("name", options("evaluator"))
def test_the_file_of_an_evaluator_is_its_dataclass_filled_in(name: str) -> None:
    text = (conf_dir() / "evaluator" / f"{name}.yaml").read_text()
    values = yaml.safe_load(re.sub(r"\$\{oc\.select:[\w.]+,(.*?)\}", r"\1", text))  # or the default
    assert values == settings_of(registry.find("evaluators", name))


def test_the_top_config_has_the_defaults_of_the_train_spec() -> None:
    values = yaml.safe_load((conf_dir() / "config.yaml").read_text())
    assert values["train"] == plain(TrainSpec())


# -- keys ------------------------------------------------------------------------------------------

SPEC = Spec(
    stage="train",
    method=Plugin("lora", {"rank": 4, "alpha": 16.0}),
    model=ModelSpec(name="m", source="random"),
    dataset=DatasetSpec(name="d", source="generator", kind="text"),
    evaluators=[Plugin("perplexity", {"split": "test"})],
    train=TrainSpec(max_steps=60, batch_size=8, learning_rate=1e-3),
    hardware=HardwareSpec(device="cpu", dtype="float32"),
)


def test_the_key_of_a_spec_is_what_it_was() -> None:
    assert SPEC.key == "95d8ad5468a00326", "raise SPEC_VERSION when keys change on purpose"


def test_the_key_survives_json() -> None:
    assert build(Spec, json.loads(json.dumps(plain(SPEC))), "spec").key == SPEC.key


OURS = ["model=tiny", "dataset=arithmetic", "hardware=cpu"]


def key(*words: str, stage: Literal["train", "compress", "eval"] = "train") -> str:
    return compose(stage, [*OURS, *words]).spec.key


def test_what_cannot_change_a_result_is_not_in_the_key() -> None:
    words = ["run.results=elsewhere", "run.tracker=wandb", "run.progress=false"]
    machine = ["hardware.memory_gib=3", "hardware.tflops=2", "hardware.name=box"]
    assert key(*words, *machine) == key()
    assert key("launcher=local") == key()
    assert key("evaluator=[perplexity,choices]") == key("evaluator=[choices,perplexity]")
    assert key("method=lora") == key()


@pytest.mark.parametrize(
    "word",
    [
        "seed=1",
        "method.rank=8",
        "method=full",
        "dataset.max_length=32",
        "dataset.limit.train=9",
        "model.weights_seed=1",
        "train.max_steps=3",
        "hardware.threads=1",
        "evaluator=choices",
        "evaluator.perplexity.split=validation",
    ],
)
def test_what_can_change_a_result_is_in_the_key(word: str) -> None:
    assert key(word) != key()


def test_one_and_one_point_zero_are_one_number() -> None:
    assert key("train.weight_decay=1") == key("train.weight_decay=1.0")
    assert key("method.alpha=16") == key("method.alpha=16.0") == key()


def test_no_learning_rate_takes_that_of_the_method() -> None:
    rate = registry.find("methods", "lora").learning_rate
    assert compose("train", ["model=tiny"]).spec.train.learning_rate == rate
    assert key(f"train.learning_rate={rate}") == key("train.learning_rate=null") == key()


def test_epochs_stand_in_the_place_of_steps(tmp_path: Path) -> None:
    train = compose("train", [*OURS, "train.epochs=2"]).spec.train
    assert (train.epochs, train.max_steps) == (2.0, 0)
    assert key("train.epochs=2") != key()
    assert key("train.epochs=0") == key(), "keys of runs with steps stay"
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\ntrain: {max_steps: 30, epochs: 0.0}\n")
    mine = [*OURS, "experiment=mine"]
    typed = compose("train", [*mine, "train.epochs=1"], [tmp_path]).spec.train
    assert (typed.epochs, typed.max_steps) == (1.0, 0), "what is typed wins"
    file.write_text("# @package _global_\ntrain: {max_steps: 30, epochs: 1.5}\n")
    with pytest.raises(UserError, match="are two lengths of one training"):
        compose("train", mine, [tmp_path])
    typed = compose("train", [*mine, "train.max_steps=3"], [tmp_path]).spec.train
    assert (typed.epochs, typed.max_steps) == (0.0, 3)


@pytest.mark.parametrize("stage", ["eval", "compress"])
def test_only_training_depends_on_training_settings(stage) -> None:
    assert key("train.max_steps=7", stage=stage) == key(stage=stage)


def test_the_content_of_a_file_is_in_the_key_and_its_time_is_not(folder: Path) -> None:
    words = ["dataset=file", f"dataset.files.all={folder}/rows.jsonl"]
    before = key(*words)
    text = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(text)
    assert key(*words) == before
    (folder / "rows.jsonl").write_text(text + text.replace("b", "c"))
    assert key(*words) != before


# -- overrides -------------------------------------------------------------------------------------


def test_keys_that_a_file_leaves_out_can_be_set() -> None:
    spec = compose("train", ["model=tiny", "dataset.allow_overlap=true", "dataset.limit.train=7"])
    assert spec.spec.dataset.allow_overlap
    assert spec.spec.dataset.limit == {"validation": 12, "test": 12, "train": 7}


def test_a_limit_can_be_taken_away() -> None:
    assert compose("train", ["model=tiny", "~dataset.limit"]).spec.dataset.limit == {}
    spec = compose("train", ["model=tiny", "~dataset.limit.test"]).spec
    assert spec.dataset.limit == {"validation": 12}


@pytest.mark.parametrize("word", ["evaluator=null", "evaluator=[]", "~evaluator"])
def test_a_run_may_have_no_evaluators(word: str) -> None:
    assert compose("train", ["model=tiny", word]).spec.evaluators == []


def test_the_stage_has_a_method_of_its_own() -> None:
    names = {s: compose(s, ["model=tiny"]).spec.method.name for s in ("train", "compress", "eval")}
    assert names == {"train": "lora", "compress": "rtn", "eval": "none"}


def test_plan_takes_the_stage_of_the_method() -> None:
    assert compose(None, ["model=tiny", "method=rtn"]).spec.stage == "compress"


# -- configs and methods of others -----------------------------------------------------------------


def test_configs_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "conf"
    for name, text in {
        "method/small.yaml": "# Mine\ndefaults: [lora, _self_]\nrank: 2\n",
        "dataset/mine.yaml": "# Rows\nname: mine\nsource: generator\nkind: choices\n"
        'id: arithmetic\nchoices: [" {choice}"]\nchoices_field: options\nlabel: label\n'
        "cut: {train: 0.5, test: 0.5}\n",
    }.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(text)
    spec = compose("train", ["model=tiny", "method=small", "dataset=mine"], [own]).spec
    assert (spec.method.name, spec.method.settings["rank"]) == ("lora", 2)
    assert spec.dataset.name == "mine"
    assert ("small", "Mine") in entries("methods", "s*", [own])
    assert "source: generator" in describe("dataset", "mine", [own])
    with pytest.raises(UserError, match="no method called 'small'"):
        compose("train", ["model=tiny", "method=small"])


@dataclass(frozen=True)
class Foreign(Method):
    """A method of another package."""

    stage: ClassVar[Literal["train", "compress", "eval"]] = "train"

    strength: PositiveInt
    """How much."""
    width: float = 0.5
    """How wide."""


class Entry:
    module = __name__

    @staticmethod
    def load() -> type:
        return Foreign


def test_a_method_of_another_package_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"methods": {"foreign": Entry}, "evaluators": {}}
    monkeypatch.setattr(registry, "plugins", there.__getitem__)
    assert "foreign" in options("method")
    spec = compose("train", ["model=tiny", "method=foreign", "method.strength=3"]).spec
    assert spec.method == Plugin("foreign", {"strength": 3, "width": 0.5})
    with pytest.raises(UserError, match=r"method\.strength has no value"):
        compose("train", ["model=tiny", "method=foreign"])
    with pytest.raises(UserError, match=r"Unknown key .method\.strenght."):
        compose("train", ["model=tiny", "method=foreign", "method.strength=1", "method.strenght=3"])
    page = describe("method", "foreign")
    assert "method.strength = ???" in page
    assert "How wide." in page
    shown = describe("method", "dylora"), describe("method", "dorm")
    assert "method.ranks = []  (list of integer above 0 or powers)" in shown[0]
    assert "method.swapped = 0.1  (number from 0 below 0.5)" in shown[1]


@pytest.mark.parametrize(
    ("word", "right"),
    [
        ("run.parallelism.devices=2", "hardware.devices"),
        ("run.machine.tflops=3", "hardware.tflops"),
    ],
)
def test_what_hardware_sets_is_not_set_elsewhere_in_vain(word: str, right: str) -> None:
    name = word.rpartition(".")[0]
    with pytest.raises(UserError, match=f"Unknown key '{name}'") as caught:
        compose("train", ["model=tiny", word])
    assert right in caught.value.hint


def test_two_names_of_one_class_do_not_rename_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"methods": {"one": Entry, "two": Entry}, "evaluators": {}}
    monkeypatch.setattr(registry, "plugins", there.__getitem__)
    one, two = (registry.find("methods", name) for name in ("one", "two"))
    assert (one.name, two.name) == ("one", "two")
    assert issubclass(two, Foreign) and issubclass(one, Foreign)
    assert two(strength=1).strength == 1


# -- going on from a run ---------------------------------------------------------------------------


@pytest.fixture
def parent(bench):
    """Leave what a finished run leaves, without running it."""

    def make(stage="train", *words: str) -> str:
        job = bench.job(stage, *words)
        run = bench.folder(job)
        run.create(job.spec)
        run.artefact.mkdir()
        run.finish()
        return job.spec.key

    return make


def test_a_run_goes_on_with_the_data_of_its_parent(bench, parent) -> None:
    first = parent("train", "dataset.max_length=48", "dataset.limit.test=20")
    spec = bench.job("eval", f"from={first[:6]}").spec
    assert (spec.parent, spec.method.name) == (first, "lora")
    assert spec.dataset == bench.store.spec_of(first).dataset


def test_single_settings_change_the_data_of_the_parent(bench, parent) -> None:
    first = parent("train", "dataset.max_length=48", "dataset.limit.train=50")
    spec = bench.job("eval", f"from={first}", "dataset.limit.test=9").spec
    assert spec.dataset.name == "arithmetic"
    assert (spec.dataset.limit, spec.dataset.max_length) == ({"train": 50, "test": 9}, 48)


def test_other_data_take_their_own_settings(bench, parent) -> None:
    first = parent("train", "dataset.max_length=48")
    spec = bench.job("eval", f"from={first}", "dataset=piqa").spec
    assert (spec.dataset.name, spec.dataset.max_length) == ("piqa", 160)


def test_data_that_changed_since_give_another_key(bench, parent, folder: Path) -> None:
    words = ["dataset=file", f"dataset.files.all={folder}/rows.jsonl"]
    first = parent("train", *words)
    before = bench.job("eval", f"from={first}").spec.key
    (folder / "rows.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    assert bench.job("eval", f"from={first}").spec.key != before


def test_a_model_that_changed_since_is_refused(bench, parent, folder: Path) -> None:
    first = parent("train", "model=folder", f"model.path={folder}", "dataset=arithmetic")
    (folder / "more.txt").write_text("x")
    with pytest.raises(UserError, match="have changed since run"):
        bench.job("eval", f"from={first}")


def test_a_model_that_was_moved_is_gone_on_from(
    bench, parent, folder: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(folder, tmp_path / "here", ignore=shutil.ignore_patterns("here"))
    first = parent("train", "model=folder", f"model.path={place}", "dataset=arithmetic")
    before = bench.job("eval", f"from={first}").spec.key
    moved = place.rename(tmp_path / "there")
    with pytest.raises(UserError, match="There is no folder"):
        bench.job("eval", f"from={first}")
    assert bench.job("eval", f"from={first}", f"model.path={moved}").spec.key == before
    (moved / "more.txt").write_text("x")
    with pytest.raises(UserError, match="have changed since run"):
        bench.job("eval", f"from={first}", f"model.path={moved}")


def test_job_fields_are_found_by_type() -> None:
    names = {f.name for f in dataclasses.fields(Spec)}
    assert not names & {"results", "tracker", "progress", "machine"}


# -- text that looks like a number -----------------------------------------------------------------


def leave(bench, key: str) -> None:
    run = bench.store.run(key)
    run.create(bench.job("train").spec)
    run.artefact.mkdir()
    run.finish()


@pytest.mark.parametrize(
    "key, ref",
    [
        ("0e09eb55c9e3444b", "0e09"),
        ("80650ab655c9e344", "8065"),
        ("8e884ceb55c9e344", "8e88"),
        ("1_000", "1_000"),
        ("6392874817580539", "6392874817580539"),
    ],
)
def test_the_key_of_a_run_is_text_whatever_it_looks_like(bench, key: str, ref: str) -> None:
    leave(bench, key)
    assert bench.job("eval", f"from={ref}").spec.parent == key
    assert bench.job("eval", f"from='{ref}'").spec.parent == key


@pytest.mark.parametrize("ref", ["0e09", "8065", "8e88", "6392874817580539", "0", "true", "nan"])
def test_a_run_that_is_not_there_is_not_the_base_model(bench, ref: str) -> None:
    with pytest.raises(UserError, match=f"There is no run '{ref}'"):
        bench.job("eval", f"from={ref}")


@pytest.mark.parametrize("word", ["from=", "from=null", "from=''"])
def test_from_nothing_is_refused(bench, word: str) -> None:
    with pytest.raises(UserError, match="from= names no run"):
        bench.job("eval", word)


@pytest.mark.parametrize(
    "word, place, value",
    [
        ("model.revision=1234567", ("model", "revision"), "1234567"),
        ("dataset.name=1e5", ("dataset", "name"), "1e5"),
        ("dataset.subset=2024", ("dataset", "subset"), "2024"),
        ("dataset.text=true", ("dataset", "text"), "true"),
        ("dataset.choices=[1, 2.50]", ("dataset", "choices"), ["1", "2.50"]),
        ("dataset.splits={all: 007}", ("dataset", "splits"), {"all": "007"}),
        ("dataset.splits.all=1e5", ("dataset", "splits"), {"all": "1e5"}),
        ("dataset.prompt='1, 2'", ("dataset", "prompt"), "1, 2"),
        ("dataset.max_length=64", ("dataset", "max_length"), 64),
        ("train.betas=[0,0.5]", ("train", "betas"), [0.0, 0.5]),
    ],
)
def test_what_is_text_stays_as_it_was_typed(word: str, place: tuple[str, str], value) -> None:
    rows = "alpaca" if "splits" in word else "arithmetic"  # which makes no other parts than its own
    spec = plain(compose("train", ["model=tiny", f"dataset={rows}", word]).spec)
    assert spec[place[0]][place[1]] == value


def test_names_of_plugins_and_folders_are_text_too() -> None:
    words = ["model=tiny", "run.results=2024", "method=kd"]
    job = compose("train", [*words, "method.teacher=tiny"])
    assert (job.runtime.results, job.spec.method.settings["teacher"]) == ("2024", "tiny")
    with pytest.raises(UserError, match="no model called '1e5'"):
        compose("train", [*words, "method.teacher=1e5"])
    with pytest.raises(UserError, match="'1e5'"):
        compose("eval", ["model=tiny", "evaluator=choices", "evaluator.choices.tasks=[1e5]"])


def test_a_number_in_a_file_says_that_text_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "# m\nname: mine\nsource: hub\nid: a/b\nrevision: 12\n"
    )
    with pytest.raises(UserError, match=r"model\.revision=12") as caught:
        compose("train", ["model=mine"], [tmp_path])
    assert "in quotes" in caught.value.hint


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("model=mine", "It is a folder: model=folder model.path=mine"),
        ("model=mine.gguf", "For a file: model=gguf model.path=mine.gguf"),
        ("model=Org/Name-1.5B", "For one on the hub: model=hub model.id=Org/Name-1.5B"),
        ("dataset=mine.csv", "It is a file: dataset=file dataset.files.all=mine.csv"),
        ("dataset=other.csv", "are known"),
        ("method=mine", "are known"),
        ("model=tny", "Did you mean 'tiny'?"),
    ],
)
def test_ones_own_model_or_file_in_the_place_of_a_name_has_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.csv").write_text("")
    with pytest.raises(UserError, match="There is no") as caught:
        compose("eval", [word])
    assert hint in caught.value.hint
