"""What every method promises; a new method is held to it by its two files alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from conftest import Bench, forget_accelerator
from goldens import PUBLIC, Golden
from helpers import begun

from effbench.api import registry
from effbench.api.batch import Batch, make_batch
from effbench.api.method_types import Context
from effbench.api.plugins import make_method
from effbench.api.spec import Job
from effbench.config.compose import compose, settings_of
from effbench.config.files import options
from effbench.methods.base import Method
from effbench.methods.compresses import Part, compress_whole
from effbench.models import load as models
from effbench.nn.decode.native_step import NativeStep
from effbench.nn.llama.weights import cast_parameters, read_tensors
from effbench.nn.quant.linears import storage_bytes
from effbench.resources.counting import flops, parameters
from effbench.results.events import EventLog, read_events
from effbench.results.records import Record
from effbench.runner.artefact import save_artefact
from effbench.runner.stages import compress, train
from effbench.runner.worker import run_here
from effbench.util.errors import StoppedError, UserError

NAMES = registry.names("methods")
MAKERS = [n for n in NAMES if registry.find("methods", n).stage != "eval"]
TRAINED = [n for n in NAMES if registry.find("methods", n).stage == "train"]
SMALL = [
    "train.max_steps=4",
    "train.batch_size=2",
    "train.checkpoint_every=2",
    "+dataset.limit.train=16",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
]
EVALUATORS = [n for n in registry.names("evaluators") if registry.find("evaluators", n).needs_model]
"""Those that a model can answer differently; simulations have tests of their own."""
ALL_EVALUATORS = [
    f"evaluator=[{','.join(EVALUATORS)}]",
    *(
        f"evaluator.{name}.{key}={json.dumps(value)}"
        for name in EVALUATORS
        for key, value in registry.find("evaluators", name).trial.items()
    ),
]


class HardKill(BaseException):
    """Stands for a process that ends without a chance to save anything."""


@dataclasses.dataclass
class Made:
    """A finished run of a method, and what its model gave just before it was saved."""

    bench: Bench
    job: Job
    record: Record
    logits: dict[str, str]

    @property
    def artefact(self) -> dict[str, bytes]:
        return files(self.bench.folder(self.job).artefact)

    @property
    def losses(self) -> list[float]:
        return losses(self.bench, self.job)


def overrides(name: str, **settings: Any) -> list[str]:
    """Return the overrides of a small run; dropout is on, so that random numbers are drawn."""
    cls = registry.find("methods", name)
    given = {**cls.needs, **settings}
    if "dropout" in {f.name for f in dataclasses.fields(cls)}:
        given.setdefault("dropout", 0.1)
    return [f"method={name}", *SMALL, *(f"method.{k}={v}" for k, v in given.items())]


def stage_of(name: str) -> Any:
    return registry.find("methods", name).stage


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def losses(bench: Bench, job: Job) -> list[float]:
    path = bench.folder(job).path / "events.jsonl"
    return [e["loss"] for e in read_events(path, "step")]


def probe() -> Batch:
    ids = torch.randint(4, 512, (2, 14), generator=torch.Generator().manual_seed(5)).tolist()
    return make_batch([(ids[0], [-100] * 3 + ids[0][3:]), (ids[1][:9], ids[1][:9])], 0)


@torch.no_grad()
def logits(method: Method, model: torch.nn.Module, point: str = "") -> torch.Tensor:
    """Return evaluation logits; frozen, because torch then multiplies in one and the same order."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    out = method.logits(model.eval(), probe(), point)
    for p in trained:
        p.requires_grad_(True)
    return out


def digests(method: Method, model: torch.nn.Module) -> dict[str, str]:
    """Return a hash of the logits at every operating point."""
    training, found = model.training, {}
    for point in method.points():
        with method.at(model, point):
            seen = logits(method, model, point).numpy().tobytes()
            found[point] = hashlib.sha256(seen).hexdigest()
    model.train(training)
    return found


def state_hash(model: torch.nn.Module) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def fresh(name: str, dtype: str = "float32", **settings: Any) -> tuple[Any, Any, Any, Any]:
    """Return method, base as the method wants it, its shape, and a context."""
    cls = registry.find("methods", name)
    job = compose(
        stage_of(name),
        [
            *overrides(name, **settings),
            "model=tiny",
            "dataset=arithmetic",
            f"hardware.dtype={dtype}",
        ],
    )
    method = make_method(job.spec.method)
    held = getattr(torch, dtype)
    loaded = models.load(
        job.spec.model, device="cpu", dtype=held, weights=cls.weights.fget(method), tokenizer=False
    )

    def load_model(other: str) -> torch.nn.Module:
        spec = compose("eval", [f"model={other}"]).spec.model
        return models.load(spec, device="cpu", dtype=held, tokenizer=False).model

    draws = torch.Generator().manual_seed(0)
    ctx = Context(0, torch.device("cpu"), held, draws, load_model, None)
    return method.resolve(loaded.shape), loaded.model, loaded.shape, ctx


def changed(method: Method, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
    """Return the model with the method in it, as its stage would put it there."""
    if method.stage == "compress":
        compress_whole(method, model.requires_grad_(False), [probe()], ctx)
        return model
    return method.finalize(begun(method, model, ctx), ctx)


def left(method: Method, model: torch.nn.Module, shape: Any, folder: Path) -> Any:
    """Return the shape that a changed model has, as its artefact says."""
    if method.stage == "eval":
        return shape
    method.save(model, folder)
    return method.left(shape, folder)


def strengthened(name: str, **settings: Any) -> tuple[Any, Any]:
    """Return a method and its model, what trains in it moved away from where it started."""
    method, model, _, ctx = fresh(name, **settings)
    model = changed(method, model, ctx)
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=draws))
    return method, model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Made]]:
    """Run a method once for all tests, uninterrupted, with every evaluator."""
    torch.set_num_threads(1)

    @cache
    def run(name: str) -> Made:
        found: dict[str, str] = {}

        def save(work: Any, method: Method, model: torch.nn.Module) -> None:
            found.update(digests(method, model))
            save_artefact(work, method, model)

        forget_accelerator()
        bench = Bench(tmp_path_factory.mktemp(name) / "results")
        job = bench.job(stage_of(name), *overrides(name), *ALL_EVALUATORS)
        with pytest.MonkeyPatch.context() as patch:
            for module in (train, compress):
                patch.setattr(module, "save_artefact", save)
            record = bench.run(stage_of(name), *overrides(name), *ALL_EVALUATORS)
        return Made(bench, job, record, found)

    yield run
    forget_accelerator()


# -- 1: the config -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_its_yaml_holds_its_defaults(name: str) -> None:
    cls = registry.find("methods", name)
    needs = [f"method.{k}={v}" for k, v in cls.needs.items()]
    job = compose(stage_of(name), [f"method={name}", "model=tiny", "dataset=arithmetic", *needs])
    assert job.spec.method.settings == {**settings_of(cls), **cls.needs}
    assert options("method")[name] is not None
    assert registry.summary("methods", name)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_key_is_refused_with_the_nearest(name: str) -> None:
    fields = [f.name for f in dataclasses.fields(registry.find("methods", name))]
    key = fields[0] if fields else "nothing"
    with pytest.raises(UserError, match=f"method.{key}x") as error:
        compose(stage_of(name), [f"method={name}", "model=tiny", f"method.{key}x=1"])
    assert not fields or f"{key}'" in error.value.hint


# -- 2: the identity ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_untrained_it_is_the_base(name: str) -> None:
    settings = registry.find("methods", name).identity
    if settings is None:
        pytest.skip("has no setting at which it changes nothing")
    method, model, _, ctx = fresh(name, **settings)
    expected = logits(Method(), model)
    model = begun(method, model, ctx)
    for point in method.points():
        with method.at(model, point):
            assert logits(method, model).equal(expected)


# -- 3: the cost -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_its_cost_is_what_is_counted(name: str, dtype: str, tmp_path: Path) -> None:
    method, model, shape, ctx = fresh(name, dtype)
    model = changed(method, model, ctx)
    shape = left(method, model, shape, tmp_path)
    for point in method.points():
        cost = method.cost(shape, dtype, point)
        with method.at(model, point):
            assert cost.resident_bytes == storage_bytes(model)
            counted = parameters(model)
            if method.stage == "train":
                assert cost.trainable == counted.trainable
            assert cost.params == counted.total


@pytest.mark.parametrize("name", TRAINED)
def test_what_trains_is_what_training_states(name: str) -> None:
    method, model, shape, ctx = fresh(name)
    counted = parameters(begun(method, model, ctx)).trainable
    stated = method.training_cost(shape, "float32").trainable
    changes = type(method).training_cost is not Method.training_cost
    assert 0 < counted <= stated if changes else counted == stated


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_its_cache_grows_as_stated(name: str, dtype: str, tmp_path: Path) -> None:
    method, model, shape, ctx = fresh(name, dtype)
    model = changed(method, model, ctx).requires_grad_(False).eval()
    shape = left(method, model, shape, tmp_path)
    cast_parameters_to_use(method, model, dtype)
    for point in method.points():
        with method.at(model, point):
            session = method.session(model, point)
            session.prefill(torch.arange(8)[None])
            before = session.kv_bytes()
            for token in range(12):  # a multiple of any short cycle
                session.step(torch.tensor([[token]]))
            grown = (session.kv_bytes() - before) / 12
        assert grown == method.cost(shape, dtype, point).kv_bytes_per_token


def cast_parameters_to_use(method: Method, model: torch.nn.Module, dtype: str) -> None:
    """Do what the training stage does with float32 masters before it evaluates."""
    if method.weights == "float32":
        cast_parameters(model, getattr(torch, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_its_flops_are_what_torch_counts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch counts matrix products; on a CPU neither the attention over the context nor the
    # expansion of packed weights is one of them, and the cost states neither. Nor can it look into
    # the C++ step, which makes the same products as the walk through the blocks.
    monkeypatch.setattr(NativeStep, "of", lambda session: None)
    method, model, shape, ctx = fresh(name)
    model = changed(method, model, ctx).requires_grad_(False).eval()
    shape = left(method, model, shape, tmp_path)
    for point in {method.points()[0], method.points()[-1]}:
        with method.at(model, point):
            session = method.session(model, point)
            session.prefill(torch.tensor([[5]]))

            def decode(session: Any = session) -> None:
                for token in range(12):
                    session.step(torch.tensor([[token]]))

            counted = flops(decode) / 12
        assert method.cost(shape, "float32", point).flops_per_token == pytest.approx(counted, 0.01)


# -- 4: the artefact ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_a_loaded_artefact_gives_the_same_logits(
    name: str, made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(name)
    found: dict[str, str] = {}

    def look(work: Any, opened: Any, data: Any) -> None:
        found.update(digests(opened.method, opened.model))
        raise HardKill

    monkeypatch.setattr("effbench.runner.stages.eval.evaluate", look)
    monkeypatch.setattr("effbench.runner.stages.eval.count_model", lambda run, model: None)
    with pytest.raises(HardKill):
        run_here(compose("eval", eval_words(run)))
    assert run.logits == found


def eval_words(run: Made) -> list[str]:
    return [
        f"from={run.record.key}",
        *ALL_EVALUATORS,
        f"run.results={run.bench.root}",
        "run.progress=false",
        "hardware.device=cpu",
        "hardware.dtype=float32",
        "hardware.threads=1",
    ]


@pytest.mark.parametrize("name", ["lora", "qdylora", "rtn", "lora_drop"])
def test_a_fresh_process_gives_the_same_numbers(name: str, made: Callable[[str], Made]) -> None:
    run = made(name)
    words = eval_words(run)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from effbench.cli.main import main; main()", "eval", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = compose("eval", words)
    again = json.loads((run.bench.store.records / f"{job.spec.key}.json").read_text())
    expected = [m for m in run.record.metrics if m.split]
    assert len(expected) > 4
    values = {(m["name"], m["point"]): m["value"] for m in again["metrics"] if m["split"]}
    assert values == {(m.name, m.point): m.value for m in expected}


# -- 5: interruptions --------------------------------------------------------------------------


class Interrupted:
    """Does something as soon as the n-th step or part of this session is on the record."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
        seen = 0
        append = EventLog.append

        def watched(log: EventLog, kind: str, **facts: Any) -> None:
            nonlocal seen
            append(log, kind, **facts)
            seen += kind in ("step", "part")
            if kind in ("step", "part") and seen == at:
                act()

        patch.setattr(EventLog, "append", watched)


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def kill() -> None:
    raise HardKill


def without_evaluation(patch: pytest.MonkeyPatch) -> None:
    for module in (train, compress):
        patch.setattr(module, "evaluate", lambda bench, model, data: None)


@pytest.mark.parametrize("name", MAKERS)
def test_stopped_after_every_step_it_ends_the_same(
    name: str, made: Callable[[str], Made], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(name)
    job = bench.job(stage_of(name), *overrides(name), *ALL_EVALUATORS)
    without_evaluation(monkeypatch)
    stops = 0
    events = run.bench.folder(run.job).path / "events.jsonl"
    parts = max(1, sum(1 for _ in read_events(events, "part")) // 4)
    while True:
        with monkeypatch.context() as patch:
            Interrupted(patch, parts, ask_to_stop)
            try:
                run_here(job)
                break
            except StoppedError:
                stops += 1
    assert stops >= 3
    assert losses(bench, job) == run.losses
    assert files(bench.folder(job).artefact) == run.artefact


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_killed_it_goes_on_from_the_last_checkpoint(
    name: str,
    at: int,
    made: Callable[[str], Made],
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = made(name)
    job = bench.job(stage_of(name), *overrides(name), *ALL_EVALUATORS)
    without_evaluation(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(HardKill):
        Interrupted(patch, at, kill)
        run_here(job)
    assert bench.folder(job).checkpoint.is_file() == (at == 3 and stage_of(name) == "train")
    run_here(job)
    assert losses(bench, job) == run.losses
    assert files(bench.folder(job).artefact) == run.artefact


COMPRESSED = [(n, {}) for n in NAMES if stage_of(n) == "compress"]
COMPRESSED.append(("structured", {"criterion": "wanda"}))


@pytest.mark.parametrize(("name", "settings"), COMPRESSED, ids=lambda v: str(v or ""))
def test_no_part_is_made_twice(
    name: str, settings: dict[str, Any], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before every third part it computes as much, all in all, as one that is not."""
    without_evaluation(monkeypatch)
    cls, words = registry.find("methods", name), overrides(name, **settings)
    compress_, made, passes = cls.compress, [], []

    def watched(*arguments: Any) -> Iterator[Part]:
        for part in compress_(*arguments):

            def make(part: Part = part) -> dict[str, torch.Tensor]:
                if session and len(made) == 3 * session:
                    raise HardKill
                made.append(part.name)
                return part.make()

            yield dataclasses.replace(part, make=make)

    monkeypatch.setattr(cls, "compress", watched)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: passes.append(1))
    try:
        session = 0
        whole = bench.job("compress", *words)
        run_here(whole)
        expected, once = list(made), len(passes)
        assert len(set(expected)) == len(expected) > 3, "parts are few enough to be made at once"
        made.clear()
        job = bench.job("compress", *words, "seed=1")
        session = 1
        while True:
            try:
                run_here(job)
                break
            except HardKill:
                session += 1
    finally:
        hook.remove()
    assert session > 1
    assert made == expected
    assert len(passes) == 2 * once
    kept = files(bench.folder(job).artefact)
    assert kept == files(bench.folder(whole).artefact)


# -- 6: nothing is left behind -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_points_and_sessions_leave_no_trace(name: str) -> None:
    method, model = strengthened(name)
    before, expected = state_hash(model), digests(method, model)
    whole = logits(method, model)
    for point in method.points():
        with pytest.raises(HardKill), method.at(model, point):
            session = method.session(model, point)
            session.prefill(torch.arange(10).view(2, 5))
            for token in range(5):
                session.step(torch.full((2, 1), token))
            session.reorder(torch.tensor([1, 0]))
            session.step(torch.full((2, 1), 7))
            raise HardKill
        assert logits(method, model).equal(whole)
    assert state_hash(model) == before
    assert digests(method, model) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_session_decodes_what_one_pass_gives(name: str) -> None:
    method, model = strengthened(name)
    ids = torch.randint(512, (1, 12), generator=torch.Generator().manual_seed(1))
    batch = make_batch([(ids[0].tolist(), [-100] * 5 + ids[0, 5:].tolist())], 0)
    for point in method.points():
        with method.at(model, point), torch.no_grad():
            session = method.session(model, point)
            steps = [session.prefill(ids[:, :5])]
            steps += [session.step(ids[:, t : t + 1]) for t in range(5, 12)]
            one_pass = method.logits(model, batch, point)[0, 4:]
        torch.testing.assert_close(torch.cat(steps), one_pass, atol=2e-5, rtol=1e-4)


# -- 7: seeds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_another_seed_is_another_run(
    name: str, made: Callable[[str], Made], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(name)
    without_evaluation(monkeypatch)
    jobs = [
        bench.job(stage_of(name), *overrides(name), *ALL_EVALUATORS, f"seed={seed}")
        for seed in (0, 1)
    ]
    assert jobs[0].spec.key == run.record.key
    assert jobs[1].spec.key != run.record.key
    if stage_of(name) == "compress":
        return
    run_here(jobs[1])
    weights = "weights.safetensors"
    assert losses(bench, jobs[1]) != run.losses
    path = bench.folder(jobs[1]).artefact / weights
    other, one = read_tensors(path), read_tensors(run.bench.folder(run.job).artefact / weights)
    assert any(not other[n].equal(one[n]) for n in one)


# -- 8: settings of evaluation ------------------------------------------------------------------

STOPPING = [
    "train.validate_every=1",
    "train.patience=1",
    "train.schedule=constant",
    "+dataset.limit.validation=8",
]


def all_changed(name: str) -> list[str]:
    """Return overrides that give each setting of evaluation alone another value, all at once."""
    cls, words = registry.find("methods", name), []
    for key in sorted(cls.eval_settings):
        literals = [v for v in _literals(get_type_hints(cls)[key]) if isinstance(v, str)]
        values = [*literals, *([v] for v in literals), True, False, 1, 2, 3, [1], [2], [3], [0]]
        tried = (f"method.{key}={json.dumps(value)}" for value in values)
        words.append(next(word for word in tried if _changes(name, key, [*words, word])))
    return words


def _changes(name: str, key: str, words: list[str]) -> bool:
    try:
        job = compose("train", [*overrides(name), "model=tiny", "dataset=arithmetic", *words])
    except UserError:
        return False
    return job.spec.method.settings[key] != settings_of(registry.find("methods", name))[key]


def _literals(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for part in get_args(hint):
            yield from _literals(part)


@pytest.mark.parametrize("name", [n for n in TRAINED if registry.find("methods", n).eval_settings])
def test_settings_of_evaluation_do_not_change_what_is_trained(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_evaluation(monkeypatch)
    jobs = [
        bench.job("train", *overrides(name), *STOPPING, *more) for more in ([], all_changed(name))
    ]
    found = []
    for job in jobs:
        forget_accelerator()
        run_here(job)
        log = bench.folder(job).path / "events.jsonl"
        validations = [e["loss"] for e in read_events(log, "validation")]
        weights = files(bench.folder(job).artefact)
        del weights["method.json"]  # quotes the settings
        found.append((losses(bench, job), validations, weights))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", TRAINED)
def test_settings_of_evaluation_do_not_change_what_training_needs(name: str) -> None:
    needs = []
    for more in ([], all_changed(name)):
        words = ["model=tiny", "dataset=arithmetic", *more]
        spec = compose("train", [*overrides(name), *words]).spec
        shape, method = spec.model.shape, make_method(spec.method)
        assert shape is not None
        whole = method.cost(shape, "float32", method.whole(shape))
        needs.append((whole, method.training_cost(shape, "float32"), method.validated(shape)))
    assert needs[0] == needs[1]


@pytest.mark.parametrize("name", TRAINED)
def test_it_is_validated_where_it_learns(name: str) -> None:
    """What trains must be seen by the validation that decides which of it is kept."""
    method, base, shape, ctx = fresh(name)
    point = method.validated(shape)
    model = begun(method, base, ctx)
    with method.at(model, point):
        before = logits(method, model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    with method.at(model, point):
        assert not logits(method, model).equal(before)


# -- 9: operating points -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_point_runs_in_every_evaluator(name: str, made: Callable[[str], Made]) -> None:
    run = made(name)
    method = make_method(run.job.spec.method)
    shape = compose("eval", ["model=tiny"]).spec.model.shape
    assert shape is not None
    method = method.resolve(shape)
    shape = method.left(shape, run.bench.folder(run.job).artefact)
    found = {(m.name, m.point): m for m in run.record.metrics if m.phase in ("", "decode")}
    for point in method.points():
        for evaluator in EVALUATORS:
            headline = registry.find("evaluators", evaluator).headline
            assert found[headline, point].value >= 0
        stated = method.cost(shape, "float32", point)
        assert found["weight_bytes", point].value == stated.resident_bytes
        assert found["params", point].value == stated.params
    assert len({(m.name, m.point, m.split, m.phase, m.task) for m in run.record.metrics}) == len(
        run.record.metrics
    )


# -- 9: what others rely on --------------------------------------------------------------------


def public_names(run: Made) -> dict[str, Any]:
    """Return the names that a run of a method leaves: points, metrics, files and tensors.

    An energy counts as modelled: whether it is measured is the machine's to say.
    """
    folder = run.bench.folder(run.job)
    points = list(dict.fromkeys(m.point for m in run.record.metrics if m.point))
    files = {p.relative_to(folder.path).as_posix() for p in folder.path.rglob("*") if p.is_file()}
    for point in points:
        files = {re.sub(rf"@{re.escape(point)}(?=\.)", "@POINT", name) for name in files}
    names = {m.name.replace("_modelled", ""): m.unit for m in run.record.metrics}
    tensors = {re.sub(r"\.\d+\.", ".N.", name) for name in artefact_tensors(run)}
    return {"files": sorted(files), "metrics": names, "points": points, "tensors": sorted(tensors)}


def artefact_tensors(run: Made) -> dict[str, torch.Tensor]:
    place = run.bench.folder(run.job).artefact
    return {
        n: t for path in sorted(place.rglob("*.safetensors")) for n, t in read_tensors(path).items()
    }


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_the_names_that_it_leaves_stay(
    name: str, made: Callable[[str], Made], golden: Callable[[str], Golden]
) -> None:
    found, usual = public_names(made(name)), public_names(made("full"))
    if name != "full":
        found["metrics"] = {k: v for k, v in found["metrics"].items() if k not in usual["metrics"]}
        found["files"] = [f for f in found["files"] if f not in usual["files"]]
    golden("methods.json").check(name, found, PUBLIC, grows=3)


@pytest.mark.golden
@pytest.mark.parametrize("name", MAKERS)
def test_the_same_settings_give_the_same_bits(
    name: str, made: Callable[[str], Made], golden: Callable[[str], Golden]
) -> None:
    version = registry.find("methods", name).version
    golden("bits.json").check_bits(f"method {name}", version, artefact_tensors(made(name)))
