"""The training loop: what it computes, how it stops, and how it goes on."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from effbench.api.schema import plain
from effbench.api.spec import Job, TrainSpec
from effbench.methods.adapters.lora import LoRA
from effbench.methods.base import Method
from effbench.nn.llama.weights import read_tensors
from effbench.nn.losses.token import token_nll
from effbench.results.events import EventLog, read_events
from effbench.runner.open import open_data, open_model
from effbench.runner.run import open_run
from effbench.runner.stages import train
from effbench.runner.stages import trainer as trainers
from effbench.runner.stages.batching import micro_batches, rows_of_step
from effbench.runner.stages.trainer import Trainer, build_trainer, rate_at
from effbench.runner.worker import run_here
from effbench.testing.bench import Bench
from effbench.util.errors import StoppedError, UserError

ALL_IN_ONE_STEP = ("train.batch_size=8", "+dataset.limit.train=8")
"""Every step has the same rows, so that the loss must fall."""
SMALL = [
    "train.batch_size=2",
    "train.max_steps=5",
    "+dataset.limit.train=24",
    "+dataset.limit.validation=8",
    "method.rank=4",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
]


def job(bench: Bench, method: str, *overrides: str) -> Job:
    given = {o.partition("=")[0] for o in overrides}
    small = [o for o in SMALL if o.partition("=")[0] not in given]
    if method == "full":
        small.remove("method.rank=4")
    return bench.job("train", f"method={method}", *small, *overrides)


def trainer(bench: Bench, method: str, *overrides: str) -> Trainer:
    made = job(bench, method, *overrides)
    folder = bench.folder(made)
    folder.create(made.spec)
    work = open_run(made, folder, bench.store)
    return build_trainer(work, open_model(work), open_data(work))


def events(bench: Bench, made: Job, kind: str = "step") -> list[dict[str, Any]]:
    return list(read_events(bench.folder(made).path / "events.jsonl", kind))


def losses(bench: Bench, made: Job) -> list[float]:
    return [e["loss"] for e in events(bench, made)]


def weights(bench: Bench, made: Job) -> dict[str, torch.Tensor]:
    return read_tensors(bench.folder(made).artefact / "weights.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[n].equal(other[n]) for n in one)


def on_event(patch: pytest.MonkeyPatch, kind: str, at: int, act: Callable[[], None]) -> None:
    """Do something as soon as the n-th event of a kind is written."""
    seen, append = itertools.count(1), EventLog.append

    def watched(log: EventLog, what: str, **facts: Any) -> None:
        append(log, what, **facts)
        if what == kind and next(seen) == at:
            act()

    patch.setattr(EventLog, "append", watched)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def without_evaluation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(train, "evaluate", lambda bench, model, data: None)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# -- learning rate, rows, windows ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5, 1, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(8))]),
    ],
)
def test_learning_rate(schedule: Any, expected: list[float]) -> None:
    settings = TrainSpec(max_steps=10, warmup=0.2, schedule=schedule)
    assert [rate_at(settings, s) for s in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"),
    [(1.0, 10, 3), (2.0, 10, 5), (0.5, 8, 1), (0.01, 8, 1), (0.1, 30, 1), (3.0, 4, 3)],
)
def test_epochs_are_the_steps_that_reach_every_row(epochs: float, rows: int, steps: int) -> None:
    settings = TrainSpec(max_steps=0, epochs=epochs, batch_size=2, accumulation=2)
    assert settings.over(rows).max_steps == steps
    assert TrainSpec(max_steps=7).over(rows).max_steps == 7
    assert f"{steps} steps of 4 rows" in settings.told(rows)


def test_a_run_of_epochs_goes_once_over_its_rows(bench: Bench) -> None:
    words = [o for o in SMALL if "max_steps" not in o]
    record = bench.run("train", "method=lora", *words, "train.epochs=0.5", "evaluator=[]")
    [steps] = [m.value for m in record.metrics if m.name == "train_steps"]
    assert steps == 6, "half of 24 rows, two in a step"


@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_learning_rate_is_never_zero_or_above_the_peak(warmup: float, steps: int) -> None:
    settings = TrainSpec(max_steps=steps, warmup=warmup)
    assert all(0 < rate_at(settings, s) <= 1 for s in range(steps))


def test_the_rate_on_the_record_is_the_rate_that_is_used(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(bench, "lora", "train.learning_rate=0.01", "train.warmup=0.4")
    used, update = [], LoRA.update

    def watched(self: Any, model: Any, optimizer: Any, window: Any, ctx: Any) -> Any:
        used.append(optimizer.param_groups[0]["lr"])
        return update(self, model, optimizer, window, ctx)

    monkeypatch.setattr(LoRA, "update", watched)
    without_evaluation(monkeypatch)
    run_here(made)
    assert [e["learning_rate"] for e in events(bench, made)] == used
    assert used == pytest.approx([0.01 * rate_at(made.spec.train, s) for s in range(5)])


@pytest.mark.parametrize(("count", "size"), [(64, 8), (50, 8), (5, 8), (1, 3), (127, 2)])
def test_every_row_comes_once_in_an_epoch(count: int, size: int) -> None:
    steps = range(4 * count // size + 4)
    flat = [row for s in steps for row in rows_of_step(count, 3, s, size)]
    assert len(flat) == len(steps) * size
    epochs = [flat[e * count : (e + 1) * count] for e in range(len(flat) // count)]
    assert len(epochs) >= 4
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count == 1 or len({tuple(e) for e in epochs}) > 1


def test_rows_depend_on_seed_and_step_alone() -> None:
    forward = [rows_of_step(40, 7, s, 6) for s in range(12)]
    torch.manual_seed(5)
    assert [rows_of_step(40, 7, s, 6) for s in reversed(range(12))] == forward[::-1]
    assert [rows_of_step(40, 8, s, 6) for s in range(12)] != forward


@pytest.mark.parametrize("pass_tokens", [0, 10, 1000])
@pytest.mark.parametrize("most", [1, 2, 6])
def test_micro_batches_take_the_least_time(most: int, pass_tokens: int) -> None:
    lengths = [9, 3, 30, 4, 9, 12]

    def time_of(groups: list[list[int]]) -> int:
        return sum(len(g) * max(lengths[i] for i in g) + pass_tokens for g in groups)

    found = micro_batches(lengths, most, pass_tokens)
    assert sorted(i for g in found for i in g) == list(range(6))
    assert max(map(len, found)) <= most
    order = sorted(range(6), key=lambda i: -lengths[i])
    best = math.inf
    for cuts in itertools.product([False, True], repeat=5):
        groups = [[order[0]]]
        for i, cut in zip(order[1:], cuts, strict=True):
            if cut:
                groups.append([])
            groups[-1].append(i)
        if max(map(len, groups)) <= most:
            best = min(best, time_of(groups))
    assert time_of(found) == best


def test_a_window_is_the_mean_over_all_its_tokens(bench: Bench) -> None:
    made = trainer(bench, "lora", "train.accumulation=3")
    window = train.window_of(made, 0)
    assert len({b.window_tokens for b in window}) == 1
    assert window[0].window_tokens == sum(b.loss_tokens for b in window)
    with torch.no_grad():
        each = [
            token_nll(Method().logits(made.model, b), b.labels)[b.labels[:, 1:] != -100]
            for b in window
        ]
        parts = [made.method.loss(made.model, b, made.ctx) for b in window]
    assert float(sum(parts)) == pytest.approx(float(torch.cat(each).double().mean()), rel=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_times_four_is_eight(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    without_evaluation(monkeypatch)
    common = ("train.optimizer=sgd", "train.learning_rate=0.1", "train.clip_norm=0.5")
    one = job(bench, method, "train.batch_size=8", *common)
    two = job(bench, method, "train.batch_size=4", "train.accumulation=2", *common)
    run_here(one)
    run_here(two)
    assert losses(bench, one) == pytest.approx(losses(bench, two), rel=1e-6)
    left, right = weights(bench, one), weights(bench, two)
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], atol=1e-6, rtol=1e-5)


def test_gradients_are_clipped_as_a_whole(bench: Bench) -> None:
    made = trainer(
        bench,
        "lora",
        "train.optimizer=sgd",
        "train.schedule=constant",
        "train.warmup=0",
        "train.learning_rate=1",
        "train.clip_norm=0.001",
    )
    trained = [p for p in made.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    train.one_step(made)
    moved = [(p.detach() - b).norm() for p, b in zip(trained, before, strict=True)]
    assert float(torch.stack(moved).norm()) == pytest.approx(0.001, rel=1e-3)


class Scaling(Accelerator):
    """accelerate with a loss scaler on the CPU, where it has none of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        self.scaler.unscale_((optimizer or self._optimizers[0]).optimizer)


def test_a_method_without_a_backward_pass_takes_steps_beside_a_scaler(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for accelerator in (trainers.Accelerator, Scaling):
        monkeypatch.setattr(trainers, "Accelerator", accelerator)
        made = trainer(bench, "mezo")
        train.one_step(made)
        found.append(deepcopy(made.method.trained_tensors(made.model)))
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())


SEEN = {"apt": ("method.growths=2",), "adalora": ("method.begin=0", "method.end=1")}
"""Methods that learn from gradients what matters, with settings."""


@pytest.mark.parametrize("method", SEEN)
def test_methods_look_at_gradients_without_the_factor_of_a_scaler(
    bench: Bench, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*SEEN[method], "train.clip_norm=0.01", "train.accumulation=2")

    def after_two_steps() -> tuple[Trainer, Any]:
        made = trainer(bench, method, *words)
        for _ in range(2):
            train.one_step(made)
        weights = made.method.trained_tensors(made.model)
        return made, deepcopy((weights, made.ctx.evolution.state_dict()))

    expected = after_two_steps()[1]
    monkeypatch.setattr(trainers, "Accelerator", Scaling)
    made, found = after_two_steps()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)  # the factor is a power of 2
    made.ctx.reduce = lambda members, _: members[0].grad.fill_(torch.inf)
    train.one_step(made)
    assert all(map(math.isfinite, _numbers(made.ctx.evolution.state_dict())))


def _numbers(state: Any) -> list[float]:
    """Return all numbers of a state."""
    if isinstance(state, dict):
        return [x for value in state.values() for x in _numbers(value)]
    return torch.as_tensor(state).flatten().tolist() if state is not None else []


def test_recomputed_activations_give_the_same_losses(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_evaluation(monkeypatch)
    for method in ("full", "qdylora", "lora_drop"):
        one = job(bench, method)
        two = job(bench, method, "train.gradient_checkpointing=true")
        run_here(one)
        run_here(two)
        assert losses(bench, one) == pytest.approx(losses(bench, two), rel=1e-6)
        assert losses(bench, one)[-1] != losses(bench, one)[0]


# -- validation --------------------------------------------------------------------------------


def test_early_stopping_keeps_the_best_weights(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "train.max_steps=30",
        "train.validate_every=1",
        "train.patience=2",
        "train.learning_rate=0.3",
        "train.schedule=constant",
    )
    made = job(bench, "lora", *words)
    held: dict[int, dict[str, torch.Tensor]] = {}
    validate = train._validate

    def watched(work: Trainer) -> None:
        tensors = work.method.trained_tensors(work.model)
        held[work.done.step] = {n: t.clone() for n, t in tensors.items()}
        validate(work)

    monkeypatch.setattr(train, "_validate", watched)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        on_event(patch, "validation", 1, interrupt)
        run_here(made)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_event(patch, "metric", 1, interrupt)  # the artefact is made, its evaluation begun
        run_here(made)
    record = bench.run("train", "method=lora", *[o for o in SMALL if "max_steps" not in o], *words)
    assert record.key == made.spec.key
    found = [e["loss"] for e in events(bench, made, "validation")]
    best = found.index(min(found))
    assert len(found) == best + 3 < 30
    assert same(weights(bench, made), held[best + 1])
    assert [n for n in record.notes if f"stopped early at step {best + 3}" in n] == record.notes
    assert len(record.notes) == 1


def test_patience_needs_validations(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"train\.patience"):
        run_here(job(bench, "lora", "train.patience=2"))


def test_validating_before_the_first_step_does_not_hinder_learning(bench: Bench) -> None:
    # A 4-bit layer whose weight is repacked in eval mode may stop passing gradients on.
    made = job(
        bench,
        "qlora",
        "train.validate_every=1",
        "train.max_steps=12",
        "train.batch_size=8",
        "train.learning_rate=0.01",
    )
    work = trainer(bench, "qlora")
    work.validation = work.examples[:4]
    train._validate(work)
    train.one_step(work)
    factors = [(n, p) for n, p in work.model.named_parameters() if "lora_B" in n]
    assert len(factors) == 28
    for name, factor in factors:
        assert factor.grad is not None and factor.grad.abs().max() > 0, name
    run_here(made)
    found = [e["loss"] for e in events(bench, made, "validation")]
    assert found[-1] < found[0] - 0.1


# -- refusals ----------------------------------------------------------------------------------


def test_a_window_without_gradients_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoRA, "loss", lambda *_: torch.ones((), requires_grad=True) * 2)
    with pytest.raises(UserError, match="No parameter received a gradient"):
        run_here(job(bench, "lora"))


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(bench, "lora", "train.checkpoint_every=1")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="nan at step 3"):
        loss = LoRA.loss
        patch.setattr(LoRA, "loss", lambda s, m, b, c: loss(s, m, b, c) * [1, math.nan][c.step > 1])
        run_here(made)
    state = torch.load(bench.folder(made).checkpoint, weights_only=True)
    assert state["done"]["step"] == 2
    assert all(t.isfinite().all() for t in state["tensors"].values())
    run_here(made)
    other = Bench(bench.root / "other")
    run_here(job(other, "lora", "train.checkpoint_every=1"))
    assert same(weights(bench, made), weights(other, made))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half"])
def test_a_corrupt_checkpoint_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    made = job(bench, "lora")
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        on_event(patch, "step", 2, interrupt)
        run_here(made)
    path = bench.folder(made).checkpoint
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(UserError, match="cannot be read") as error:
        run_here(made)
    assert "--fresh" in error.value.hint
    assert "\n" not in error.value.message


# -- other optimisers and dtypes -----------------------------------------------------------------


def test_eight_bit_adam_learns_and_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    without_evaluation(monkeypatch)
    words = ("train.optimizer=adamw8bit", "train.max_steps=8", "train.learning_rate=0.02")
    words += ALL_IN_ONE_STEP
    made = job(bench, "full", *words)
    run_here(made)
    assert losses(bench, made)[-1] < losses(bench, made)[0] - 0.1
    other = Bench(bench.root / "other")
    again = job(other, "full", *words)
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            on_event(patch, "step", 3, interrupt)
            run_here(again)
    run_here(again)
    assert losses(other, again) == losses(bench, made)
    assert same(weights(other, again), weights(bench, made))


def test_eight_bit_moments_cannot_be_protected(bench: Bench) -> None:
    # bitsandbytes keeps the moments of tensors below 4,096 numbers in float32.
    words = ("train.optimizer=adamw8bit", "method.protect_inactive=true", "method.rank=32")
    with pytest.raises(UserError, match="8-bit"):
        run_here(job(bench, "dylora", *words))


@pytest.mark.parametrize("method", ["full", "qdylora"])
def test_bfloat16_learns_and_evaluates_alike_afterwards(bench: Bench, method: str) -> None:
    words = ("hardware.dtype=bfloat16", "train.learning_rate=0.01", *ALL_IN_ONE_STEP)
    made = job(bench, method, *words)
    run_here(made)
    assert losses(bench, made)[-1] < losses(bench, made)[0]
    assert {t.dtype for t in weights(bench, made).values()} == {torch.float32}
    own = json.loads((bench.store.records / f"{made.spec.key}.json").read_text())
    fixed = [o for o in SMALL if o.startswith("hardware") and "dtype" not in o]
    again = bench.run("eval", f"from={made.spec.key}", "hardware.dtype=bfloat16", *fixed)
    before = {(m["name"], m["point"]): m["value"] for m in own["metrics"] if m["split"]}
    assert before == {(m.name, m.point): m.value for m in again.metrics if m.split}


# -- stopping and going on -----------------------------------------------------------------------


def test_a_request_at_the_last_step_is_heard(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(bench, "lora")
    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="step 5 of 5"):
        on_event(patch, "step", 5, interrupt)
        run_here(made)
    run_here(made)
    assert len(losses(bench, made)) == 5
    assert bench.folder(made).finished


def test_a_crash_between_artefact_and_note_is_survived(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(bench, "lora", "train.checkpoint_every=2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "note_made", lambda *_, **__: interrupt())
        run_here(made)
    first = weights(bench, made)
    run_here(made)
    assert same(weights(bench, made), first)
    assert len(losses(bench, made)) == 5


def worker(made: Job) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "effbench.runner.worker_process"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(plain(made)))
    process.stdin.close()
    return process


def wait_for_step(bench: Bench, made: Job, process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if events(bench, made):
            return
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    raise AssertionError("no step after a minute")


def test_ctrl_c_saves_and_the_same_command_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train.max_steps=60", "train.checkpoint_every=1000", "method.dropout=0.1")
    made = job(bench, "qdylora", *words)
    process = worker(made)
    wait_for_step(bench, made, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr is not None
    said = process.stderr.read()
    assert "Stopped after step" in said and "of 60; everything is saved" in said
    assert "Traceback" not in said
    done = len(events(bench, made))
    assert 0 < done < 60
    without_evaluation(monkeypatch)
    run_here(made)
    other = Bench(bench.root / "other")
    run_here(job(other, "qdylora", *words))
    assert losses(bench, made) == losses(other, made)
    assert same(weights(bench, made), weights(other, made))


def test_a_second_process_waits_and_finds_it_done(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    made = job(bench, "lora", "train.max_steps=40")
    process = worker(made)
    wait_for_step(bench, made, process)
    run_here(made)
    assert f"waiting: process {process.pid} on" in capsys.readouterr().err
    assert process.wait(60) == 0
    assert bench.folder(made).finished
    assert [e["step"] for e in events(bench, made)] == list(range(1, 41))
    assert len(list(bench.store.records.iterdir())) == 1


# -- the event log -------------------------------------------------------------------------------


def test_events_are_cut_back_and_mended(bench: Bench, tmp_path: Path) -> None:
    path, made = tmp_path / "events.jsonl", job(bench, "lora")
    log = EventLog(path, made)
    log.append("step", step=1)
    place = log.position()
    log.append("step", step=2)
    log.cut(place)
    log.append("step", step=3)
    log.close()
    path.write_bytes(path.read_bytes() + b'{"time": 1, "event": "st')
    assert [e["step"] for e in read_events(path, "step")] == [1, 3]
    log = EventLog(path, made)
    log.append("step", step=4)
    with pytest.raises(UserError, match=r"events\.jsonl cannot be read: it lacks its end"):
        log.cut(10_000)  # else the steps behind it would count for nothing
    log.append("step", step=5)
    log.close()
    assert [e["step"] for e in read_events(path, "step")] == [1, 3, 4, 5]
    assert b"\0" not in path.read_bytes()
    log = EventLog(path, made)
    log.append("phase", name="load")
    log.append("made")
    assert log.after("made") == log.position()
    assert log.after("part") is None
    log.append("metric", name="loss")
    log.cut()  # what phases took was taken, whatever becomes of the rest
    log.append("part", name="last")
    log.close()
    assert [e["event"] for e in read_events(path)] == ["phase", "part"]


def test_what_libraries_made_is_not_looked_through_at_every_phase(bench: Bench) -> None:
    gc.unfreeze()
    try:
        bench.run("train", "method=lora", "train.max_steps=1", "evaluator=[]")
        assert gc.get_freeze_count() > 10 * len(gc.get_objects())
    finally:
        gc.unfreeze()
