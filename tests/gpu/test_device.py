"""Kernels, meters and the loop on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from effbench.api import weights
from effbench.nn.quant import groupwise, nf4
from effbench.nn.quant.linears import NF4Linear
from effbench.resources.energy import Meter
from effbench.resources.environment import fingerprint
from effbench.resources.memory import PeakMemory
from effbench.resources.roofline import probe
from effbench.resources.timing import Clock
from effbench.results.events import read_events
from effbench.testing.bench import Bench, forget_accelerator

pytestmark = pytest.mark.gpu

SMALL = ["train.max_steps=6", "train.batch_size=2", "+dataset.limit.train=16", "evaluator=[]"]


def linear(d_in: int, d_out: int, device: str) -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(d_in, d_out).to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_nf4_products_agree_with_plain_ones(dtype: torch.dtype, rows: int, device: str) -> None:
    base = linear(256, 512, device)
    fast, plain = NF4Linear.quantise(base), NF4Linear.quantise(base, backend="torch")
    x = torch.randn(rows, 256, device=device, dtype=dtype, requires_grad=True)
    torch.testing.assert_close(fast.dense_weight(dtype), plain.dense_weight(dtype))
    torch.testing.assert_close(fast(x), plain(x), rtol=2e-2, atol=2e-2)
    grads = [torch.autograd.grad(layer(x).sum(), x)[0] for layer in (fast, plain)]
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", weights.names())
def test_products_of_a_format_are_within_its_tolerance(name: str, device: str) -> None:
    packed = weights.find(name)()
    made: Any = packed.quantise(linear(256, 512, device), torch.float32)
    x = torch.randn(7, 256, device=device)
    right = torch.nn.functional.linear(x, made.dense_weight(torch.float32), made.bias)
    bound = max(packed.tolerance, 1e-6)  # rounding, where weights are expanded
    assert (made(x) - right).abs().max() <= bound * right.abs().max()


def test_codes_are_those_of_the_cpu(device: str) -> None:
    weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(2))
    for here, there in zip(nf4.quantise(weight), nf4.quantise(weight.to(device)), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-6)
    here, there = (groupwise.quantise(w, 4, 64, False) for w in (weight, weight.to(device)))
    assert torch.equal(there.codes.cpu(), here.codes)


def test_a_peak_is_that_of_the_tensors(device: str) -> None:
    size = 64 * 2**20
    with PeakMemory(device, "work") as meter:
        tensor = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
        del tensor
    slack = 0 if device == "cuda" else 8 * 2**20
    assert size <= meter.peak.added_bytes + slack
    assert meter.peak.added_bytes <= size + 8 * 2**20


def test_the_clock_waits_for_the_device(device: str) -> None:
    a = torch.randn(1024, 1024, device=device)

    def work(count: int) -> None:
        for _ in range(count):
            a @ a

    clock = Clock(device)
    work(2)
    few, many = (min(clock.seconds(lambda n=n: work(n)) for _ in range(3)) for n in (4, 64))
    assert many > 4 * few


def test_ceilings_are_plausible(device: str) -> None:
    found = probe(device, torch.float32, most=2**24, side=256, repeats=2)
    assert 1e8 < found.gemm < 1e16
    assert 1e7 < found.copy < 1e14


def test_energy_and_environment_name_the_device(device: str) -> None:
    with Meter(device) as meter:
        Clock(device).seconds(lambda: torch.randn(2048, 2048, device=device).sum())
    assert meter.energy.joules >= 0
    if device == "cuda":
        assert fingerprint()["gpus"][0]["name"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_loss_falls(optimizer: str, dtype: str, device: str, tmp_path: Path) -> None:
    if device == "cpu" and (dtype == "float16" or optimizer == "adamw8bit"):
        pytest.skip("a GPU's")
    forget_accelerator()
    bench = Bench(tmp_path)
    own = [f"train.optimizer={optimizer}", f"hardware.dtype={dtype}", f"hardware.device={device}"]
    own += ["method=full", "train.learning_rate=0.05" if optimizer == "sgd" else "seed=0"]
    bench.run("train", *SMALL, *own, "train.max_steps=12")
    path = bench.folder(bench.job("train", *SMALL, *own, "train.max_steps=12")).path
    losses = [e["loss"] for e in read_events(path / "events.jsonl", "step")]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_an_interrupted_run_goes_on_to_the_same_end(device: str, tmp_path: Path) -> None:
    words = ["method=qdylora", f"hardware.device={device}", "hardware.dtype=float32", *SMALL]
    ends = []
    for name, every in (("straight", 25), ("stopped", 2)):
        forget_accelerator()
        bench = Bench(tmp_path / name)
        job = bench.job("train", *words, f"train.checkpoint_every={every}")
        if name == "stopped":
            stopped_after(bench, job, 3)
        bench.run("train", *words, f"train.checkpoint_every={every}")
        path = bench.folder(job).path / "events.jsonl"
        ends.append([e["loss"] for e in read_events(path, "step")])
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)


def stopped_after(bench: Bench, job: object, steps: int) -> None:
    """Run a job, and have it end without a chance to save anything after some steps."""
    from effbench.results.events import EventLog
    from effbench.runner.worker import run_here

    class HardKill(BaseException):
        pass

    seen, append = [], EventLog.append

    def counted(self: EventLog, kind: str, **facts: object) -> None:
        append(self, kind, **facts)
        seen.extend([kind] * (kind == "step"))
        if len(seen) == steps:
            raise HardKill

    with pytest.MonkeyPatch.context() as patch, pytest.raises(HardKill):
        patch.setattr(EventLog, "append", counted)
        run_here(job)  # type: ignore[arg-type]
    forget_accelerator()
