"""Keys outlive the code: fields may be added, defaults may change, and old runs are still found."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from config.test_config import SPEC

import effbench.api.spec
from effbench.api import keys, registry, schema
from effbench.api.keys import FOUNDING, earlier_keys
from effbench.api.plugins import make_method
from effbench.api.schema import build, digest, plain
from effbench.api.shape import Shape
from effbench.api.spec import DatasetSpec, HardwareSpec, ModelSpec, Plugin, Spec, TrainSpec
from effbench.config.compose import compose
from effbench.report.comparison.compare import compare
from effbench.report.comparison.seeds import grouped
from effbench.report.comparison.versions import different_versions
from effbench.results import migrations, records
from effbench.results.migrations import UNFUSED, present_spec
from effbench.results.records import as_now, read, read_all
from effbench.results.store import MARKER, Store
from effbench.util.errors import UserError

RECORDS = Path(__file__).parents[2] / "results" / "records"
PARTS = (Spec, Plugin, ModelSpec, Shape, DatasetSpec, TrainSpec, HardwareSpec)
PLUGINS = [(kind, name) for kind in ("methods", "evaluators") for name in registry.names(kind)]
TINY = ["model=tiny", "dataset=arithmetic", "hardware=cpu"]


def specs_of_records() -> dict[str, dict[str, Any]]:
    """Return the spec of every committed record as it stands in its file, by key."""
    found = {}
    for path in sorted(RECORDS.glob("*.json")):
        line = path.read_text()
        head = line[: line.rindex(records.OUTCOMES)] + "}"
        found[path.stem] = json.loads(head)["spec"]
    return found


ON_FILE = specs_of_records()


def key_of(values: dict[str, Any]) -> str:
    return build(effbench.api.spec.Spec, present_spec(values), "spec").key


# -- growing fields ----------------------------------------------------------------------------

Grow = Callable[..., type]


@pytest.fixture
def grow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Grow]:
    """Let classes of the package gain a field, as an edit of their file would."""
    plugins: dict[tuple[str, str], type] = {}
    find = registry.find
    monkeypatch.setattr(registry, "find", lambda k, n: plugins.get((k, n)) or find(k, n))

    def with_field(cls: type, **options: Any) -> type:
        added = ("added", int, dataclasses.field(**{"default": 7, **options}))
        inside = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        new = dataclasses.make_dataclass(
            cls.__name__, [added], bases=(cls,), namespace=inside, frozen=True
        )
        monkeypatch.setattr(schema, "_ADAPTERS", {})
        keys._dataclasses_in.cache_clear()
        for module in [m for n, m in sys.modules.items() if n.startswith("effbench")]:
            for name, value in list(vars(module).items()):
                if value is cls:
                    monkeypatch.setattr(module, name, new)
        return new

    def grown(part: type | tuple[str, str], **options: Any) -> type:
        if isinstance(part, type):
            return with_field(part, **options)
        plugins[part] = with_field(plugins.get(part) or find(*part), **options)
        return plugins[part]

    yield grown
    keys._dataclasses_in.cache_clear()


def composed(*words: str, stage: Any = None) -> Spec:
    return compose(stage, [*TINY, *words]).spec


def examples() -> list[Spec]:
    evaluators = ",".join(registry.names("evaluators"))
    return [
        composed("method=rtn"),
        composed("method=qdylora", "seed=3", "train.learning_rate=1e-3", "dataset.limit.test=9"),
        composed("model=smollm2-135m", f"evaluator=[{evaluators}]", "hardware=h200", stage="eval"),
    ]


def test_committed_records_have_the_keys_of_their_specs() -> None:
    assert len(ON_FILE) >= 208
    wrong = [k for k, spec in ON_FILE.items() if "versions" not in spec and key_of(spec) != k]
    assert not wrong
    for key, spec in ON_FILE.items():
        if "versions" in spec:
            assert key_of(spec) == key


@pytest.fixture(scope="module")
def ungrown() -> list[str]:
    return [spec.key for spec in examples()]


@pytest.mark.parametrize("part", PARTS)
def test_a_field_more_in_the_spec_changes_no_key(
    part: type, ungrown: list[str], grow: Grow
) -> None:
    before = ungrown
    grow(part)
    after = examples()
    assert "added" in json.dumps([plain(spec) for spec in after])
    assert [spec.key for spec in after] == before
    assert {key_of(spec) for spec in list(ON_FILE.values())[::4]} == set(list(ON_FILE)[::4])


@cache
def texts() -> dict[str, str]:
    """Return the specs of all committed records as text."""
    return {key: json.dumps(spec) for key, spec in ON_FILE.items()}


@pytest.mark.parametrize("kind, name", PLUGINS)
def test_a_field_more_in_a_plugin_changes_no_key(kind: Any, name: str, grow: Grow) -> None:
    group, stage = ("method", None) if kind == "methods" else ("evaluator", "eval")
    plugin = registry.find(kind, name)
    trial = {f"method.{k}": json.dumps(v) for k, v in getattr(plugin, "needs", {}).items()}
    if kind == "evaluators":
        trial = {f"evaluator.{name}.{k}": v for k, v in plugin.trial.items()}
    words = [f"{group}={name}", "hardware=h200", *(f"{k}={v}" for k, v in trial.items())]
    before = composed(*words, stage=stage).key
    mine = {k: v for k, v in ON_FILE.items() if f'"name": "{name}"' in texts()[k]}
    grow((kind, name))
    after = composed(*words, stage=stage)
    plugins = [after.method, *after.evaluators]
    assert next(p.settings["added"] for p in plugins if p.name == name) == 7
    assert after.key == before
    assert all(key_of(spec) == key for key, spec in mine.items())


def test_a_new_field_that_is_set_is_in_the_key(grow: Grow) -> None:
    grow(TrainSpec)
    grow(("methods", "lora"))
    plain_run = composed("method=lora").key
    assert composed("method=lora", "train.added=7", "method.added=7").key == plain_run
    assert composed("method=lora", "train.added=8").key != plain_run
    assert composed("method=lora", "method.added=8").key != plain_run


def test_a_new_plugin_leaves_all_its_defaults_out(grow: Grow, monkeypatch) -> None:
    before = composed("method=lora").key
    monkeypatch.delitem(FOUNDING, "methods/lora")
    spec = composed("method=lora")
    assert spec.key != before
    assert keys.hashed(spec)["method"] == {"name": "lora", "settings": {}}


def test_fields_that_came_later_are_in_the_order_in_which_they_are_declared() -> None:
    spec = keys.completed(Spec, {"method": {"name": "lorc", "settings": {}}})
    found = list(spec["method"]["settings"])
    declared = dataclasses.fields(registry.find("methods", "lorc"))
    assert found == [f.name for f in declared if f.name in found]
    assert len(found) > 5


def test_a_default_that_changed_is_in_the_key_and_old_runs_keep_the_earlier_one(
    bench, grow: Grow
) -> None:
    first = made(bench, "train", "method=lora")
    changed = {"default": 9, "metadata": {"absent": 7}}
    grow(("methods", "lora"), **changed)
    assert bench.job("train", "method=lora").spec.method.settings["added"] == 9
    assert bench.job("train", "method=lora").spec.key != first
    assert bench.job("train", "method=lora", "method.added=7").spec.key == first
    old = bench.store.spec_of(first)
    assert (old.key, old.method.settings["added"]) == (first, 7)
    assert bench.job("eval", f"from={first}").spec.method.settings["added"] == 7


# -- going on ----------------------------------------------------------------------------------


def made(bench, stage: Any, *words: str) -> str:
    """Leave what a finished run leaves, without running it."""
    job = bench.job(stage, *words)
    return leave(bench.store, job.spec.key, plain(job.spec))


def leave(store: Store, key: str, spec: dict[str, Any]) -> str:
    run = store.run(key)
    run.artefact.mkdir(parents=True)
    (run.path / "spec.json").write_text(json.dumps(spec))
    (run.path / MARKER).write_text("0\n")
    return key


def test_a_run_from_before_a_field_is_gone_on_from(bench, grow: Grow) -> None:
    record = bench.run("train", "method=lora", "train.max_steps=1", "evaluator=[]", "seed=3")
    first = record.key
    assert record.spec["versions"] == bench.store.spec_of(first).versions == {"train": 2}
    for part in PARTS:
        grow(part)
    grow(("methods", "lora"))
    grow(("evaluators", "perplexity"))
    spec = bench.job("eval", f"from={first}", "dataset.limit.test=4").spec
    assert spec.parent == first
    assert (spec.train.added, spec.method.settings["added"]) == (7, 7)
    read_out = bench.run("eval", f"from={first}", "dataset.limit.test=4")
    assert read_out.parent == first
    assert (record.seeds, read_out.seeds) == ([3], [0, 3]), "also that of what is evaluated"


def test_every_committed_record_can_be_gone_on_from(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key, spec in ON_FILE.items():
        leave(store, key, spec)
    for key in ON_FILE:
        spec = store.spec_of(key)
        assert store.resolve(key[:12]) == key
        make_method(spec.method)
        chain = store.ancestors(replace(spec, stage="eval", parent=key))
        assert spec.stage == "eval" or list(chain)[-1] == key
    tried = {(spec["stage"], bool(spec["parent"])): key for key, spec in ON_FILE.items()}
    for key in tried.values():
        words = ["run.progress=false", f"run.results={tmp_path}"]
        assert compose("eval", [f"from={key}", *words]).spec.parent == key


def test_the_key_of_a_parent_is_the_name_of_its_folder(bench) -> None:
    spec = plain(bench.job("train").spec)
    leave(bench.store, "0123456789abcdef", {**spec, "seed": 5})
    job = bench.job("eval", "from=0123")
    assert job.spec.parent == "0123456789abcdef"
    assert list(bench.store.ancestors(job.spec)) == ["0123456789abcdef"]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"later": 1}, "Spec has no 'later' here"),
        ({"train": {"later": 1}}, "TrainSpec has no 'later' here"),
        ({"method": {"name": "lora", "settings": {"later": 1}}}, "LoRA has no 'later' here"),
        ({"version": 99}, "form 99"),
    ],
)
def test_a_run_of_a_newer_effbench_asks_for_an_upgrade(bench, change, named: str) -> None:
    leave(bench.store, "0123456789abcdef", {**plain(bench.job("train").spec), **change})
    with pytest.raises(UserError, match="was made by a newer effbench") as caught:
        bench.job("eval", "from=0123")
    assert named in caught.value.message
    assert "Upgrade" in caught.value.hint


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '{"version": 2, "evaluators": "x"}'])
def test_a_damaged_spec_is_named(bench, text: str) -> None:
    leave(bench.store, "0123456789abcdef", plain(bench.job("train").spec))
    (bench.store.run("0123456789abcdef").path / "spec.json").write_text(text)
    with pytest.raises(UserError, match="The spec of run 0123456789abcdef cannot be read"):
        bench.job("eval", "from=0123")


def test_a_spec_of_an_earlier_form_is_migrated(bench, monkeypatch) -> None:
    monkeypatch.setattr("effbench.api.spec.SPEC_VERSION", 3)
    monkeypatch.setitem(migrations.SPECS, 2, lambda v: {**v, "seed": v["seed"] + 1, "version": 3})
    leave(bench.store, "0123456789abcdef", plain(replace(SPEC, seed=4, version=2)))
    assert bench.store.spec_of("0123456789abcdef").seed == 5
    assert replace(SPEC, version=3).key == SPEC.key, "the form is not in the key"


def test_the_founding_fields_are_never_added_to() -> None:
    assert digest(FOUNDING) == "5a29486069d61c3a", (
        "a new field or plug-in is not founding; see keys.py"
    )


# -- versions ----------------------------------------------------------------------------------


def test_training_is_in_its_second_version_and_evaluation_is_as_it_was() -> None:
    assert composed("method=lora").versions == {"train": 2}
    assert composed(stage="eval").versions == composed("method=rtn").versions == {}
    assert composed(stage="eval").key == replace(composed(stage="eval"), versions={}).key


def test_a_raised_version_changes_the_keys_of_what_uses_it(monkeypatch) -> None:
    lora, dora, choices = composed("method=lora"), composed("method=dora"), "evaluator=choices"
    scored = composed(choices, stage="eval")
    monkeypatch.setattr(registry.find("methods", "lora"), "version", 2)
    monkeypatch.setattr(registry.find("evaluators", "choices"), "version", 4)
    raised = composed("method=lora")
    assert raised.versions == {"train": 2, "method.lora": 2}
    assert raised.key != lora.key
    assert composed("method=none", stage="eval").key == composed(stage="eval").key
    assert composed(choices, stage="eval").versions == {"evaluator.choices": 4}
    assert scored.key in earlier_keys(composed(choices, stage="eval"))
    before = replace(lora, versions={}).key
    only_method = replace(raised, versions={"method.lora": 2}).key
    assert earlier_keys(raised) == [lora.key, only_method, before]
    assert dora.versions == {"train": 2}


def test_what_changed_for_rows_with_weights_alone_is_in_the_keys_of_these() -> None:
    assert composed("method=kd", "method.teacher=tiny").versions == {"train": 2}
    weighted = composed("method=kd", "method.teacher=tiny", "+dataset.columns.weight=w")
    assert weighted.versions == {"train": 2, "method.kd.weighted": 2}
    assert composed("method=lora", "+dataset.columns.weight=w").versions == {"train": 2}


def test_what_changed_for_training_in_float16_alone_is_in_the_keys_of_it() -> None:
    float16 = ("hardware.device=cuda", "hardware.dtype=float16")
    changed = composed("method=adalora", *float16).versions
    assert changed == {"train": 2, "method.adalora.float16": 2}
    assert composed("method=adalora").versions == composed("method=lora", *float16).versions


def test_what_changed_for_one_kind_of_rows_is_in_the_keys_of_runs_on_it() -> None:
    words = ("dataset=file", "dataset.files.all=rows.jsonl", "dataset.fingerprint=abc")
    chat = composed(*words, "dataset.kind=chat", stage="eval")
    assert chat.versions == {"dataset": 2}
    text = composed(*words, "dataset.kind=text", stage="eval")
    assert text.versions == {}


def test_old_records_say_which_training_made_them() -> None:
    found = read_all(RECORDS, outcomes=False)
    for record in found:
        fused = record.environment["commit"] not in UNFUSED and record.stage == "train"
        versions = record.spec["versions"]
        assert versions.get("train") == 2 if fused else versions == {}, record.key
    trained = [r for r in found if r.stage == "train"]
    assert sum(not r.spec["versions"] for r in trained) == 147


def test_compare_says_that_rows_come_from_different_versions() -> None:
    found = read_all(RECORDS, outcomes=False)
    old = next(r for r in found if r.stage == "train" and not r.spec["versions"])
    new = next(r for r in found if r.stage == "train" and r.spec["versions"])
    notes = compare([old, new]).notes
    [line] = [n for n in notes if n.startswith("Rows come from different versions of train: 1 (")]
    assert "; 2 (" in line
    assert not [n for n in compare([old, old]).notes if "version" in n]
    read_out = next(r for r in found if r.parent and r.stage == "eval")
    known = [*found, read_out]
    assert different_versions(grouped([read_out, new], known), known)


def test_records_of_before_a_field_make_one_group_with_those_of_after(grow: Grow) -> None:
    found = read_all(RECORDS, outcomes=False)
    record = next(r for r in found if r.stage == "train")
    grow(TrainSpec)
    grow(("methods", record.name_of("method")))
    [now] = as_now([replace(record, key="0" * 16)])
    later = replace(now, spec={**now.spec, "seed": 77})
    assert len(compare([record, later]).labels) == 1


@pytest.mark.parametrize("digested", [False, True])
def test_a_record_with_an_unknown_field_asks_for_an_upgrade(tmp_path: Path, digested: bool) -> None:
    """Where records have a digest, a newer effbench writes that of the field too."""
    known = ((path.name, path.read_text().strip()) for path in sorted(RECORDS.glob("*.json")))
    name, line = next((n, t) for n, t in known if bool(records.DIGEST.search(t)) is digested)
    whole = records.DIGEST.sub("}", line)
    later = whole.replace('{"schema":', '{"later":1,"schema":', 1)
    path = tmp_path / name
    path.write_text(f"{records._sealed(later) if digested else later}\n")
    with pytest.raises(UserError, match=r"newer effbench: record\.later is not known here"):
        read(path)
