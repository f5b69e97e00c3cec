"""Several processes make the step that one makes; the first alone writes, and all end together."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import example_of
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from effbench.api.spec import Job
from effbench.methods.adapters.lora import LoRA
from effbench.nn.llama.weights import read_tensors
from effbench.results.events import EventLog, read_events
from effbench.runner import peer, peers
from effbench.runner.group import Processes, buckets
from effbench.runner.stages.batching import passes_of, window
from effbench.testing.bench import Bench, without_evaluation
from effbench.util.errors import StoppedError, UserError

CPU = torch.device("cpu")
LENGTHS = (5, 40, 9, 31, 17, 60, 4)
"""Tokens of rows so different that a mean of means would be far off."""
WORDS = [
    "train.batch_size=4",
    "train.accumulation=2",
    "train.max_steps=4",
    "train.checkpoint_every=1",
    "train.clip_norm=0.5",
    "train.learning_rate=0.002",
    "+dataset.limit.train=24",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
    "evaluator=[]",
]


# -- the parts of a step ---------------------------------------------------------------------------


def parts(processes: int) -> list[list[Any]]:
    """Return the micro-batches of each process."""
    examples = [example_of(seed, length) for seed, length in enumerate(LENGTHS)]
    rows = [6, 2, 0, 1, 5, 3, 4]
    return [window(examples, rows, 3, 0, CPU, r, processes) for r in range(processes)]


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_parts_hold_each_row_once_and_divide_by_the_tokens_of_all(processes: int) -> None:
    [alone] = parts(1)
    for whole, *shared in zip(alone, *parts(processes), strict=True):
        counted = [b for b in shared if b.loss_tokens]
        assert sorted(row for b in counted for row in b.rows) == sorted(whole.rows)
        assert {b.window_tokens for b in shared} == {whole.window_tokens}
        for part in shared:
            assert part.whole == len(whole.rows)
            assert [whole.rows[place] for place in part.places] == part.rows
        assert len(counted) == min(processes, len(whole.rows)), "rows are spread"


def test_draws_for_rows_are_those_of_the_whole_micro_batch() -> None:
    def draw(batch: Any) -> torch.Tensor:
        draws = torch.Generator().manual_seed(0)
        drawn: torch.Tensor = batch.drawn(lambda n: torch.rand(n, 2, generator=draws))
        return drawn

    [alone] = parts(1)
    for whole, *shared in zip(alone, *parts(2), strict=True):
        expected = draw(whole)
        for part in shared:
            assert draw(part).equal(expected[part.places])


def test_a_process_is_foreseen_its_own_part() -> None:
    examples = [example_of(0, 20) for _ in range(8)]
    [whole], _ = passes_of(examples, 1, 0, 8, 8, CPU)
    [part], _ = passes_of(examples, 1, 0, 8, 8, CPU, 2)
    assert (whole.rows, part.rows) == (8, 4)


def test_buckets_hold_all_in_order_and_no_more_than_fits() -> None:
    tensors = [torch.zeros(n) for n in (3, 3, 9, 1)] + [torch.zeros(2, dtype=torch.float64)]
    found = list(buckets(tensors, most=7 * 4))
    assert [[t.numel() for t in b] for b in found] == [[3, 3], [9], [1], [2]]
    assert [t for b in found for t in b] == tensors


def test_what_has_a_gradient_elsewhere_has_one_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the processes would sum other tensors, and wait for each other for ever."""

    def summed(tensor: torch.Tensor, by: Any = None) -> torch.Tensor:
        return tensor.add_(1)  # the other process has a gradient of ones for each

    monkeypatch.setattr("effbench.runner.group._reduced", summed)
    here, elsewhere = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    here.grad = torch.ones(2)
    Processes(0, 2).reduce([here, elsewhere], torch.zeros(()))
    assert [p.grad.tolist() for p in (here, elsewhere)] == [[2, 2], [1, 1]]


# -- two processes ---------------------------------------------------------------------------------


class Forked:
    """A process that is this one's copy, with what `peers` asks of a `Popen`."""

    def __init__(self, folder: Path, rank: int, text: bytes) -> None:
        _clear_sharding_prop_cache()  # a copy is not the first in the meshes that it remembers
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=self.help, args=(folder, rank, text))
        self.process.start()

    @staticmethod
    def help(folder: Path, rank: int, text: bytes) -> None:
        gc.freeze()  # a group that an earlier test left would wait for threads that no copy has
        torch.set_num_threads(1)
        os._exit(peer.main(folder, rank, text.decode()))

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> None:
        self.process.join()


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have further processes start in no time."""
    torch.set_num_threads(1)
    monkeypatch.setattr(peers, "_started", Forked)
    without_evaluation(monkeypatch)


def job(bench: Bench, method: str, devices: int, *words: str) -> Job:
    given = {word.partition("=")[0] for word in words}
    usual = [word for word in WORDS if word.partition("=")[0] not in given]
    return bench.job("train", f"method={method}", f"hardware.devices={devices}", *usual, *words)


def losses(bench: Bench, method: str, devices: int, *words: str) -> list[float]:
    """Return the losses of a training in a folder of its own."""
    other = Bench(bench.root / f"{method}{devices}{len(words)}")
    made = job(other, method, devices, *words)
    other.go(made)
    return other.losses(made)


def notes(bench: Bench, made: Job) -> list[str]:
    return [e["text"] for e in read_events(bench.folder(made).path / "events.jsonl", "note")]


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Ask the first process alone to stop once it has made a step."""
    append, first = EventLog.append, os.getpid()

    def watched(log: EventLog, kind: str, **facts: Any) -> None:
        append(log, kind, **facts)
        if kind == "step" and facts["step"] == step and os.getpid() == first:
            os.kill(first, signal.SIGINT)

    patch.setattr(EventLog, "append", watched)


def on_the_other(patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something in the second process where its second step begins."""
    loss, first = LoRA.loss, os.getpid()

    def watched(self: Any, model: Any, batch: Any, ctx: Any) -> Any:
        if os.getpid() != first and ctx.step == 1:
            act()
        return loss(self, model, batch, ctx)

    patch.setattr(LoRA, "loss", watched)


linux = pytest.mark.skipif(sys.platform != "linux", reason="forks a process with torch in it")


@linux
@pytest.mark.usefixtures("forked")
def test_two_processes_train_as_one_and_the_first_alone_writes(bench: Bench) -> None:
    one, two = job(bench, "lora", 1), job(bench, "lora", 2)
    assert one.spec.key == two.spec.key, "the number of devices is in no key"
    expected = losses(bench, "lora", 1)
    bench.go(two)
    assert bench.losses(two) == pytest.approx(expected, rel=1e-6)
    steps = list(read_events(bench.folder(two).path / "events.jsonl", "step"))
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert notes(bench, two) == ["trained on 2 devices from step 1 on"]


@linux
@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    "words",
    [
        ("full",),
        ("full", "train.optimizer=sgd", "train.learning_rate=0.1"),
        ("full", "train.gradient_checkpointing=true"),
        ("full", "hardware.dtype=bfloat16"),
        ("lora_plus",),
        ("qlora",),
        ("qdylora", "method.rank=4"),
        ("dylora", "method.rank=4", "method.protect_inactive=true"),
        ("lora_drop",),
        ("sorted_full",),
        ("sorted_full", "method.objective=soft"),
        ("sorted_lora",),
    ],
)
@pytest.mark.parametrize("devices", [2, 3])
def test_methods_train_on_several_processes_as_on_one(
    bench: Bench, words: tuple[str, ...], devices: int
) -> None:
    tolerance = 1e-2 if "hardware.dtype=bfloat16" in words else 1e-6
    expected = losses(bench, words[0], 1, *words[1:])
    assert losses(bench, words[0], devices, *words[1:]) == pytest.approx(expected, rel=tolerance)
    assert expected[-1] != expected[0]


SHARDED = "hardware.sharding=fsdp"


@linux
@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    "words",
    [
        ("full", SHARDED),
        ("full", SHARDED, "train.optimizer=sgd", "train.learning_rate=0.1"),
        ("full", SHARDED, "train.gradient_checkpointing=true"),
        ("full", SHARDED, "hardware.dtype=bfloat16"),
        ("lora", SHARDED),
        ("lora", SHARDED, "hardware.dtype=bfloat16"),
    ],
)
def test_parts_of_a_model_train_as_the_whole(bench: Bench, words: tuple[str, ...]) -> None:
    alone = [word for word in words[1:] if word != SHARDED]
    one, two = (
        (work := Bench(bench.root / str(n)), job(work, words[0], n, *rest))
        for n, rest in ((1, alone), (2, words[1:]))
    )
    for work, made in (one, two):
        work.go(made)
    rounded = "hardware.dtype=bfloat16" in words
    expected = pytest.approx(one[0].losses(one[1]), rel=1e-2 if rounded else 1e-6)
    assert two[0].losses(two[1]) == expected
    left, right = (
        read_tensors(next(w.folder(j).artefact.glob("*.safetensors"))) for w, j in (one, two)
    )
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=1e-3, atol=1e-2 if rounded else 1e-4)


@linux
@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_parts_and_wholes_go_on_from_each_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses(bench, "full", 1)
    for step, devices, *words in ((1, 1), (2, 2, SHARDED), (3, 3, SHARDED)):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            stop_at(patch, step)
            bench.go(job(bench, "full", devices, *words))
    last = job(bench, "full", 1)
    bench.go(last)
    assert bench.losses(last) == pytest.approx(expected, rel=1e-6)


@linux
@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("method", ["full", "qdylora"])
def test_a_run_goes_on_with_another_number_of_processes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    expected = losses(bench, method, 1)
    for devices, step in ((1, 1), (2, 2), (3, 3)):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            stop_at(patch, step)
            bench.go(job(bench, method, devices))
    last = job(bench, method, 1)
    bench.go(last)
    assert bench.losses(last) == pytest.approx(expected, rel=1e-6)
    assert notes(bench, last) == [
        "trained on 2 devices from step 2 on",
        "trained on 3 devices from step 3 on",
        "trained on one device from step 4 on",
    ]


@linux
@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_the_best_weights_are_chosen_by_all_together(bench: Bench, sharding: str) -> None:
    words = (
        "train.validate_every=1",
        "train.patience=1",
        "train.learning_rate=0.1",
        "train.max_steps=12",
        "train.schedule=constant",
        "+dataset.limit.validation=8",
    )
    expected = losses(bench, "lora", 1, *words)
    shared = losses(bench, "lora", 2, *words, f"hardware.sharding={sharding}")
    assert shared == pytest.approx(expected, rel=1e-3)
    assert len(expected) < 12


# -- how they end ----------------------------------------------------------------------------------


@linux
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "Process 2 of 2 was ended (SIGKILL)"),
        pytest.param(
            lambda: 1 / 0, "failed: ZeroDivisionError: division by zero", marks=pytest.mark.slow
        ),
    ],
)
def test_a_process_that_ends_ends_the_others_with_a_sentence(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], said: str
) -> None:
    made = job(bench, "lora", 2)
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        on_the_other(patch, act)
        begun = time.monotonic()
        bench.go(made)
    assert said in error.value.message
    assert time.monotonic() - begun < 60
    assert not multiprocessing.active_children()
    state = torch.load(bench.folder(made).checkpoint, weights_only=True)
    assert state["done"]["step"] == 1
    bench.go(made)
    assert len(bench.losses(made)) == 4


@pytest.mark.slow
def test_a_real_command_stops_all_its_processes_and_goes_on(bench: Bench) -> None:
    words = [f"run.results={bench.root}", "model=tiny", "dataset=arithmetic", "method=lora"]
    words += [w for w in WORDS if "max_steps" not in w and "checkpoint_every" not in w]
    words += ["train.max_steps=2000", "hardware.devices=2"]
    command = [sys.executable, "-P", "-m", "effbench", "train", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        logs = bench.root.glob("runs/*/events.jsonl")
        for _ in range(3000):
            if any('"step"' in log.read_text() for log in bench.root.glob("runs/*/events.jsonl")):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "everything is saved" in said and "Traceback" not in said
    [log] = logs
    state = torch.load(log.parent / "checkpoint.pt", weights_only=True)
    assert state["done"]["step"] == len(list(read_events(log, "step")))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "method=apt"], "apt was not shown to train on several devices"),
        (["train", "method=mezo"], "mezo was not shown"),
        (["train", "method=lora", "train.batch_size=1"], "train.batch_size=1 has no row for each"),
        (["eval", "method=none"], "effbench eval uses one device"),
        (["train", "method=qdylora", "hardware.sharding=fsdp"], "with hardware.sharding=fsdp"),
    ],
)
def test_what_cannot_be_spread_says_so_before_loading(
    bench: Bench, words: list[str], said: str
) -> None:
    with pytest.raises(UserError) as error:
        bench.job(words[0], "hardware.devices=2", "train.batch_size=4", *words[1:])
    assert said in error.value.message and error.value.hint


def test_parts_need_several_devices(bench: Bench) -> None:
    with pytest.raises(UserError, match="there is one"):
        bench.job("train", "method=full", "hardware.sharding=fsdp")


def test_a_subclass_is_refused_until_it_says_that_it_can() -> None:
    from effbench.methods.trains import data_parallel

    class Further(LoRA):
        """LoRA with something more."""

    assert "none" in data_parallel(LoRA())
    assert not data_parallel(Further())
