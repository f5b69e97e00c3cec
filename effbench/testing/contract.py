"""What every method promises, as tests: a package runs them on its own methods.

    class TestNeftune(MethodContract):
        methods = ("neftune",)

What a method shares with others of its kind (evaluators, a process of its own, what may come before
it) is tried with the first method of each kind among `methods`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from effbench.api import registry
from effbench.api.batch import make_batch
from effbench.api.cost import cost_of
from effbench.api.plugins import make_method
from effbench.api.points import Point
from effbench.api.shape import ModelShape
from effbench.api.spec import Job
from effbench.config.compose import compose
from effbench.config.composed import settings_of
from effbench.config.files import options
from effbench.methods.base import Method
from effbench.methods.chain import chain_cost, resolved, shape_of
from effbench.methods.trains import Trains
from effbench.nn.adapters import peft_lora
from effbench.nn.decode.native_step import NativeStep
from effbench.nn.decode.policy import EVERYTHING
from effbench.nn.depth.submodel import keep_layers
from effbench.nn.llama.stack import decoder_layers
from effbench.nn.llama.weights import cast_parameters, read_tensors
from effbench.nn.pruning import plain
from effbench.nn.quant.linears import storage_bytes
from effbench.resources.counting import flops, parameters
from effbench.results.events import read_events
from effbench.results.records import Record, read
from effbench.runner.artefact import save_artefact
from effbench.runner.stages import compress, train
from effbench.testing.bench import (
    Bench,
    HardKill,
    act_after,
    ask_to_stop,
    forget_accelerator,
    kill,
    without_evaluation,
)
from effbench.testing.kinds import (
    compresses,
    cycles,
    decoding_kind,
    evaluation_kind,
    first_of_each,
    makes,
    method_class,
    others_slow,
    pairs,
    pairs_in_turn,
    spreads,
    stage_of,
    training_kind,
    trains,
)
from effbench.testing.models import (
    as_inputs,
    begun,
    changed,
    digests,
    fresh,
    logits,
    move,
    probe,
    saved,
    state_hash,
    step_parts,
    strengthened,
    tiny_shape,
)
from effbench.testing.runs import (
    CHEAP,
    STOPPING,
    Made,
    Parts,
    all_changed,
    counted,
    every_evaluator,
    files_of,
    fitted,
    overrides,
)
from effbench.util.errors import StoppedError, UserError

CYCLE = 12
"""Decoded tokens: a multiple of any short cycle, where a method takes tokens by turns."""
LONG = 300
"""Decoded tokens, for which a cache grows more than once."""


def applies(to: Callable[[str], bool]) -> Callable[[Any], Any]:
    """Mark a test that holds for some methods alone."""

    def marked(test: Any) -> Any:
        test.applies = to
        return test

    return marked


def for_each(kind: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Mark a test that the first method of each kind stands for."""

    def marked(test: Any) -> Any:
        test.kind = kind
        return test

    return marked


class MethodContract:
    """The tests; a subclass names its `methods`."""

    methods: ClassVar[Sequence[str]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give each test the methods that it holds for."""
        to = getattr(metafunc.function, "applies", lambda name: True)
        names = [name for name in self.methods if to(name)]
        if kind := getattr(metafunc.function, "kind", None):
            names = first_of_each(names, kind)
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", names)
        if "pair" in metafunc.fixturenames:
            chosen = others_slow(pairs(self.methods), pairs_in_turn(self.methods))
            metafunc.parametrize("pair", chosen, ids="-then-".join)

    @pytest.fixture(autouse=True, scope="class")
    def interruptible(self) -> None:
        """Let an interrupt interrupt, and each product be computed in one order."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)

    @pytest.fixture
    def bench(self, tmp_path: Path) -> Iterator[Bench]:
        """A results folder of the test's own."""
        yield Bench(tmp_path / "results")
        forget_accelerator()

    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Made]]:
        """Run a method once for all tests, uninterrupted."""
        bench = Bench(tmp_path_factory.mktemp("made") / "results")

        @cache
        def run(name: str) -> Made:
            found: dict[str, str] = {}

            def save(work: Any, method: Method, model: torch.nn.Module) -> None:
                found.update(digests(method, model))
                save_artefact(work, method, model)

            words = [*overrides(name), CHEAP]
            with pytest.MonkeyPatch.context() as patch, counted(name) as parts:
                for module in (train, compress):
                    patch.setattr(module, "save_artefact", save)
                record = bench.run(stage_of(name), *words)
            return Made(bench, bench.job(stage_of(name), *words), record, found, parts)

        yield run
        forget_accelerator()

    @pytest.fixture(scope="class")
    def evaluated(self, made: Callable[[str], Made]) -> Callable[[str], Record]:
        """Evaluate what a method made with every evaluator, once for all tests."""

        @cache
        def run(name: str) -> Record:
            words = made(name).reading(*every_evaluator())
            if not makes(name):
                words = [*made(name).reading(*every_evaluator())[1:], *overrides(name)]
            return made(name).bench.run("eval", *words)

        return run

    # -- the config --------------------------------------------------------------------------------

    def test_its_config_holds_its_defaults(self, name: str) -> None:
        """A file of its own says the same as the fields; a plug-in needs none."""
        cls = method_class(name)
        needs = [f"method.{key}={json.dumps(value)}" for key, value in cls.needs.items()]
        job = compose(stage_of(name), [*files_of(name), *needs])
        found = dict(job.spec.method.settings)
        if "fingerprint" in found:  # of the files that it reads; see `Method.sealed`
            found["fingerprint"] = ""
        assert found == {**settings_of(cls), **cls.needs}
        assert options("method")[name] is not None or name in registry.plugins("methods")
        assert registry.summary("methods", name)

    def test_an_unknown_key_is_refused_with_the_nearest(self, name: str) -> None:
        """A misspelt setting is no setting."""
        names = [f.name for f in fields(method_class(name))]
        key = names[0] if names else "nothing"
        with pytest.raises(UserError, match=f"method.{key}x") as error:
            compose(stage_of(name), [*files_of(name), f"method.{key}x=1"])
        assert not names or f"{key}'" in error.value.hint

    # -- the identity ------------------------------------------------------------------------------

    @applies(lambda name: method_class(name).identity is not None)
    def test_untrained_it_is_the_base(self, name: str) -> None:
        """At the settings of `identity` the logits are the base's own, bit for bit."""
        method, model, _, ctx = fresh(name, **method_class(name).identity)
        expected = logits(Method(), model)
        model = begun(method, model, ctx)
        for point in method.points():
            with method.at(model, point):
                assert logits(method, model, point).equal(expected)

    # -- the cost ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_its_cost_is_what_is_counted(
        self, name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Parameters, bytes, bytes of cache and FLOPs, on the model itself.

        torch counts matrix products; on a CPU neither the attention over the context nor the
        expansion of packed weights is one of them, and the cost states neither. Nor can it look
        into the C++ step, which makes the same products as the walk through the blocks.
        """
        monkeypatch.setattr(NativeStep, "of", lambda session: None)
        method, model, shape, _ = changed(name, dtype)
        folders = saved(method, model, tmp_path)
        for point in method.points():
            cost = chain_cost([method], shape, dtype, point, folders)
            with method.at(model, point):
                assert cost.resident_bytes == storage_bytes(model)
                counted = parameters(model)
                if trains(name):
                    assert cost.trainable == counted.trainable
                assert cost.params == counted.total
        model.requires_grad_(False).eval()
        if method.weights == "float32":  # as the training stage does before it evaluates
            cast_parameters(model, getattr(torch, dtype))
        ends = dict.fromkeys((method.points()[0], method.points()[-1]))
        for point in method.points() if dtype == "float32" else ends:
            cost = chain_cost([method], shape, dtype, point, folders)
            with method.at(model, point):
                counts = dtype == "float32" and point in ends
                grown, counted_flops = decoded(method, model, point, counts)
            assert grown == cost.kv_bytes_per_token
            assert not counted_flops or cost.flops_per_token == pytest.approx(counted_flops, 0.01)

    @applies(makes)
    def test_its_cost_was_known_before(self, name: str, made: Callable[[str], Made]) -> None:
        """The shape that is predicted costs what the one that is saved does.

        Where only the run itself finds out what stays, the cache is at most what was predicted,
        and everything else close to it.
        """
        method = resolved(make_method(made(name).job.spec.method), tiny_shape())
        artefact = made(name).bench.folder(made(name).job).artefact
        for point in method.points():
            before, after = (
                chain_cost([method], tiny_shape(), "float32", point, folders)
                for folders in ([], [artefact])
            )
            assert before.params == pytest.approx(after.params, 0.05)
            assert before.resident_bytes == pytest.approx(after.resident_bytes, 0.05)
            assert before.flops_per_token == pytest.approx(after.flops_per_token, 0.05)
            assert before.kv_bytes_per_token >= after.kv_bytes_per_token

    @applies(trains)
    def test_what_trains_is_what_training_states(self, name: str) -> None:
        """Its shape while it trains has what trains, and by how much that may grow."""
        method, model, shape, ctx = fresh(name)
        counted = parameters(begun(method, model, ctx)).trainable
        working = shape_of(method, shape, phase="train")
        assert 0 < counted == cost_of(working, "float32").trainable - working.grown

    @applies(spreads)
    def test_parts_of_a_step_are_the_step(self, name: str) -> None:
        """Gradients and loss of several processes add up to those of one; their draws agree."""
        [(loss, gradients, draws)] = step_parts(name, 1)
        several = step_parts(name, 2)
        assert sum(part[0] for part in several) == pytest.approx(loss, rel=1e-5)
        assert gradients.keys() == {n for part in several for n in part[1]}
        for place, gradient in gradients.items():
            summed = sum(part[1].get(place, torch.zeros(())) for part in several)
            torch.testing.assert_close(summed, gradient, rtol=1e-4, atol=1e-6)
        assert all(part[2].equal(draws) for part in several)

    # -- the artefact ------------------------------------------------------------------------------

    @applies(makes)
    def test_a_loaded_artefact_gives_the_same_logits(
        self, name: str, made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At every operating point, bit for bit."""
        found: dict[str, str] = {}

        def look(work: Any, opened: Any, data: Any) -> None:
            found.update(digests(opened.method, opened.model))
            raise HardKill

        monkeypatch.setattr("effbench.runner.stages.eval.evaluate", look)
        monkeypatch.setattr("effbench.runner.stages.eval.count_model", lambda *_: None)
        with pytest.raises(HardKill):
            made(name).bench.go(compose("eval", made(name).reading(CHEAP)))
        assert made(name).logits == found

    # -- interruptions -----------------------------------------------------------------------------

    @applies(makes)
    def test_interrupted_it_ends_the_same(
        self,
        name: str,
        made: Callable[[str], Made],
        bench: Bench,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Killed before the first checkpoint and after the second, stopped in between and after.

        A compression is killed and stopped once: `test_no_part_is_made_twice` kills it more often.
        """
        run = made(name)
        job = bench.job(stage_of(name), *overrides(name), CHEAP)
        without_evaluation(monkeypatch)
        interrupted = 0
        acts = [(1, kill), (1, ask_to_stop), (2, kill), (1, ask_to_stop), (0, kill)]
        for number, act in acts[:2] + acts[4:] if compresses(name) else acts:
            with monkeypatch.context() as patch:
                act_after(patch, number, act)
                try:
                    bench.go(job)
                    break
                except (HardKill, StoppedError):
                    interrupted += 1
            if trains(name):
                assert bench.folder(job).checkpoint.is_file() == (interrupted > 1)
        assert bench.folder(job).finished
        parts = len(list(read_events(bench.folder(job).path / "events.jsonl", "part")))
        assert interrupted == (min(2, max(parts - 1, 1)) if compresses(name) else 4)
        assert bench.losses(job) == run.losses
        assert bench.artefact(job) == run.artefact

    @applies(compresses)
    def test_no_part_is_made_twice(
        self,
        name: str,
        made: Callable[[str], Made],
        bench: Bench,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Killed again and again it computes as much, all in all, as one that is not."""
        without_evaluation(monkeypatch)
        run = made(name)
        job = bench.job("compress", *overrides(name), CHEAP)
        no_part_is_made_twice(name, bench, job, run.parts)
        assert bench.artefact(job) == run.artefact

    # -- nothing is left behind --------------------------------------------------------------------

    def test_points_and_sessions_leave_no_trace(self, name: str) -> None:
        """Also where something goes wrong inside; and a session decodes what one pass gives."""
        method, model = strengthened(name)
        before, expected = state_hash(model), digests(method, model)
        whole = logits(method, model)
        ids = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(1))
        for point in method.points():
            with pytest.raises(HardKill), method.at(model, point):
                check_decoding(method, model, point, ids)
                raise HardKill
            assert logits(method, model).equal(whole)
        assert state_hash(model) == before
        assert digests(method, model) == expected

    @for_each(decoding_kind)
    def test_it_decodes_on_and_on(self, name: str) -> None:
        """Nobody has to say beforehand how many tokens there will be."""
        method, model = strengthened(name)
        ids = torch.randint(512, (1, LONG), generator=torch.Generator().manual_seed(2))
        batch = make_batch([(ids[0].tolist(), [-100] * 4 + ids[0, 4:].tolist())], 0)
        point = method.default_point()
        with method.at(model, point), torch.no_grad():
            session = method.session(model, point)
            session.prefill(ids[:, :4])
            steps = [session.step(ids[:, t : t + 1]) for t in range(4, LONG)]
            one_pass = method.logits(model, batch, point)[0]
        torch.testing.assert_close(torch.cat(steps[-4:]), one_pass[-4:], atol=5e-5, rtol=1e-3)

    # -- seeds -------------------------------------------------------------------------------------

    @applies(makes)
    def test_another_seed_is_another_run(
        self,
        name: str,
        made: Callable[[str], Made],
        bench: Bench,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The same seed has the same key, another one another key, losses and weights."""
        run = made(name)
        without_evaluation(monkeypatch)
        words = [*overrides(name), CHEAP]
        jobs = [bench.job(stage_of(name), *words, f"seed={seed}") for seed in (0, 1)]
        assert jobs[0].spec.key == run.record.key
        assert jobs[1].spec.key != run.record.key
        if compresses(name):
            return
        bench.go(jobs[1])
        weights = "weights.safetensors"
        assert bench.losses(jobs[1]) != run.losses
        other = read_tensors(bench.folder(jobs[1]).artefact / weights)
        one = read_tensors(run.bench.folder(run.job).artefact / weights)
        assert any(not other[n].equal(one[n]) for n in one)

    # -- settings of evaluation --------------------------------------------------------------------

    @applies(lambda name: trains(name) and bool(method_class(name).eval_settings))
    @for_each(training_kind)
    def test_settings_of_evaluation_do_not_change_what_is_trained(
        self, name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Losses, validations and weights, also where a validation ends the training."""
        without_evaluation(monkeypatch)
        found = []
        for more in ([], all_changed(name)):
            job = bench.job("train", *overrides(name), *STOPPING, *more)
            bench.go(job)
            log = bench.folder(job).path / "events.jsonl"
            validations = [e["loss"] for e in read_events(log, "validation")]
            weights = bench.artefact(job)
            del weights["method.json"]  # quotes the settings
            found.append((bench.losses(job), validations, weights))
        assert found[0] == found[1]

    @applies(trains)
    def test_settings_of_evaluation_do_not_change_what_training_needs(self, name: str) -> None:
        """Nor what is predicted, nor where it is validated."""
        needs = []
        for more in ([], all_changed(name)):
            words = [*files_of(name), *overrides(name), *more]
            method = make_method(compose("train", words).spec.method)
            shape = tiny_shape()
            whole = chain_cost([method], shape, "float32", method.full_point(shape))
            working = shape_of(method, shape, phase="train")
            needs.append((whole, working, method.validation_point(shape)))
        assert needs[0] == needs[1]

    @applies(trains)
    def test_it_is_validated_where_it_learns(self, name: str) -> None:
        """What trains must be seen by the validation that decides which of it is kept."""
        method, base, shape, ctx = fresh(name)
        assert isinstance(method, Trains)
        point = method.validation_point(shape)
        model = begun(method, base, ctx)

        @torch.no_grad()
        def seen() -> list[torch.Tensor]:
            """What it finds texts worth and, where a step runs any block, what it predicts."""
            working = ModelShape.of(shape_of(method, shape, phase="train"))
            with method.at(model, point):
                worth = method.scores(model, probe(), point)
                predicts = any(layer.runs for layer in working.layers)
                return [worth, logits(method, model, point)] if predicts else [worth]

        before = seen()
        move(model)
        assert not any(now.equal(then) for now, then in zip(seen(), before, strict=True))

    # -- other tools -------------------------------------------------------------------------------

    def test_what_leaves_says_the_same_in_transformers(self, name: str, tmp_path: Path) -> None:
        """Each point that a stock model can be gives the same logits there, or says why not."""
        method, model = strengthened(name)
        for number, point in enumerate(method.points()):
            folder = tmp_path / str(number)
            try:
                made = method.as_plain(model, point)
            except UserError as error:
                assert error.hint
                continue
            plain.write(made, folder)
            with method.at(model, point):
                expected = logits(method, model, point)
            theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
            with torch.no_grad():
                found = theirs(**as_inputs(probe())).logits
            real = probe().attention_mask.bool()
            torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=1e-3)

    def test_what_leaves_says_the_same_in_peft(self, name: str, tmp_path: Path) -> None:
        """Each point that is an adapter gives the same logits on the base."""
        method, model = strengthened(name)
        for number, point in enumerate(method.points()):
            adapter = method.as_peft(model, point)
            if adapter is None or method.weights not in ("compute", "float32"):
                continue
            folder = tmp_path / str(number)
            peft_lora.write_adapter(adapter, folder, peft_lora.Base())
            with method.at(model, point):
                expected = logits(method, model, point)
                depth = len(decoder_layers(model))
            base: Any = fresh(name).model
            keep_layers(base, range(depth))
            theirs = PeftModel.from_pretrained(base, folder).eval()
            with torch.no_grad():
                found = theirs(**as_inputs(probe())).logits
            real = probe().attention_mask.bool()
            torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=1e-3)

    # -- operating points --------------------------------------------------------------------------

    def test_every_point_is_evaluated(self, name: str, made: Callable[[str], Made]) -> None:
        """And counted as its cost says."""
        run = made(name)
        method, folders = fitted(run)
        found = {(m.name, m.point): m.value for m in run.record.metrics}
        for point in method.points():
            assert found["perplexity", point.name] >= 0
            stated = chain_cost([method], tiny_shape(), "float32", point, folders)
            assert found["weight_bytes", point.name] == stated.resident_bytes
            assert found["params", point.name] == stated.params

    @for_each(evaluation_kind)
    def test_every_point_runs_in_every_evaluator(
        self, name: str, made: Callable[[str], Made], evaluated: Callable[[str], Record]
    ) -> None:
        """And no metric comes twice."""
        record = evaluated(name)
        found = {(m.name, m.point): m for m in record.metrics if m.phase in ("", "decode")}
        for point in fitted(made(name))[0].points():
            for evaluator in registry.names("evaluators"):
                headline = registry.find("evaluators", evaluator).headline
                assert found[headline, point.name].value >= 0
        names = {(m.name, m.point, m.split, m.phase, m.task) for m in record.metrics}
        assert len(names) == len(record.metrics)

    def test_a_fresh_process_gives_the_same_numbers(
        self, made: Callable[[str], Made], evaluated: Callable[[str], Record]
    ) -> None:
        """One process loads what the first method of each kind made, and evaluates it.

        What the first of all made is evaluated in every way that has items.
        """
        names = first_of_each([n for n in self.methods if makes(n)], evaluation_kind)
        if not names:
            pytest.skip("none of them makes anything")
        itemwise = every_evaluator(lambda cls: cls.itemwise)
        ways = [itemwise, *([CHEAP] for _ in names[1:])]
        commands = [
            made(name).reading(*way, "run.exact_memory=false")
            for name, way in zip(names, ways, strict=True)
        ]
        done = subprocess.run(
            [sys.executable, "-c", EVALUATE],
            input=json.dumps(commands),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        for name, words in zip(names, commands, strict=True):
            records = made(name).bench.store.records
            again = read(records / f"{compose('eval', words).spec.key}.json")
            values = {(m.name, m.point, m.split): m.value for m in again.metrics if m.split}
            before = [*evaluated(name).metrics, *made(name).record.metrics]
            expected = {(m.name, m.point, m.split): m.value for m in before if m.split}
            assert len(values) > 2
            assert values == {place: expected[place] for place in values}

    # -- one after the other -----------------------------------------------------------------------

    def test_it_goes_on_from_another_or_is_refused(
        self, pair: tuple[str, str], made: Callable[[str], Made]
    ) -> None:
        """No pair of methods is found impossible only once weights are loaded."""
        first, then = pair
        run = made(first)
        words = [w for w in overrides(then) if not w.startswith("train.max_steps")]
        start = [f"from={run.record.key}", *words, "train.max_steps=1", CHEAP]
        try:
            job = run.bench.job(stage_of(then), *start)
        except UserError as error:
            assert error.hint
            return
        run.bench.go(job)
        record = read(run.bench.store.records / f"{job.spec.key}.json")
        again = run.bench.run("eval", *Made(run.bench, job, record, {}).reading(CHEAP))
        found, expected = (
            {m.point: m.value for m in r.metrics if m.name == "loss"} for r in (again, record)
        )
        assert found == expected
        assert expected and all(math.isfinite(value) for value in expected.values())


EVALUATE = """
import json, sys
from effbench.config.compose import (compose)
from effbench.runner.worker import (run_here)
for words in json.load(sys.stdin):
    run_here(compose("eval", words))
"""


def decoded(
    method: Method, model: torch.nn.Module, point: Point, counts: bool
) -> tuple[float, float]:
    """Return the bytes of cache and, where they are counted, the FLOPs of a decoded token.

    They are means over tokens after which the cache has grown evenly. What a token costs the more,
    the more there are before it, is taken off its FLOPs: they are those at context 0.
    """
    session = method.session(model, point)
    policy = method.decoder(point).cache
    settled, period = policy.cycle()
    prompt = max(8, settled)
    session.prefill(torch.arange(prompt)[None])
    before, spent = session.kv_bytes(), 0.0
    steps = max(CYCLE if cycles(method) else 2, period)

    def decode() -> None:
        for token in range(steps):
            session.step(torch.tensor([[token]]))

    if counts:
        spent = flops(decode)
    else:
        decode()
    grown = (session.kv_bytes() - before) / steps
    if counts and policy != EVERYTHING:
        each = (flops(decode) - spent) / steps**2  # for each token in the cache
        spent -= each * steps * (prompt + (steps + 1) / 2)
    return grown, spent / steps


@torch.no_grad()
def check_decoding(method: Method, model: torch.nn.Module, point: Point, ids: torch.Tensor) -> None:
    """Decode two rows, swapped on the way, and hold each step against teacher-forced logits."""
    session = method.session(model, point)
    steps = [session.prefill(ids[:, :5])]
    steps += [session.step(ids[:, t : t + 1]) for t in range(5, 9)]
    session.reorder(torch.tensor([1, 0]))
    swapped = ids.flip(0)
    steps += [session.step(swapped[:, t : t + 1]).flip(0) for t in range(9, 12)]
    rows = [(row.tolist(), [-100] * 5 + row[5:].tolist()) for row in ids]
    one_pass = method.logits(model, make_batch(rows, 0), point)[:, 4:]
    torch.testing.assert_close(torch.stack(steps, 1), one_pass, atol=2e-5, rtol=1e-4)


def no_part_is_made_twice(name: str, bench: Bench, job: Job, whole: Parts) -> None:
    """Kill a compression before every third or fourth of its parts, and count what is computed.

    Args:
        name: The method.
        bench: Where it runs.
        job: The compression.
        whole: What one computes that nobody kills.

    Raises:
        AssertionError: When it is more.
    """
    if len(whole.made) == 1:
        bench.go(job)
        return  # it is whole, and kept, or not there
    assert len(set(whole.made)) == len(whole.made) > 3, "parts are few enough to be made at once"
    kills = 0
    with counted(name, max(1, len(whole.made) // 4)) as parts:
        for _ in whole.made:  # one that forgets its parts would never end
            try:
                bench.go(job)
                break
            except HardKill:
                kills += 1
    assert bench.folder(job).finished
    assert kills >= 3
    assert parts.made == whole.made
    assert parts.passes == whole.passes
