"""A step with caches that do not keep everything: CPU time over that with the dense cache."""

from __future__ import annotations

import argparse
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from effbench.api.method_types import Context
from effbench.api.plugins import make_method
from effbench.api.session import Session
from effbench.api.shape import Shape
from effbench.api.spec import Plugin
from effbench.methods.compresses import Compresses
from effbench.models.random import random_model
from effbench.stats import Interval, ratio_interval

SHAPE = Shape(
    hidden_size=576,
    intermediate_size=1536,
    num_layers=4,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=4096,
    tied=True,
    max_positions=16384,
)
"""Layers of SmolLM2-135M, four of them, and few words."""
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "kv_quant, 4 bits": ("kv_quant", {}),
    "kv_quant, 2 bits": ("kv_quant", {"bits": 2}),
    "lorc, keys .6": ("lorc", {"kept_keys": [0.6], "kept_values": [1]}),
    "lorc, both .75": ("lorc", {"kept_keys": [0.75]}),
    "dijiang": ("dijiang", {}),
}
WEIGHTS, STEPS = {"aten::mm", "aten::addmm", "aten::linear"}, 4


def session(name: str, settings: dict[str, Any], engine: Any = "auto") -> Session:
    """Return a session of a method on a random model."""
    model = random_model(SHAPE, 0, "cpu", torch.float32).eval().requires_grad_(False)
    method = make_method(Plugin(name, settings)).resolve(SHAPE)
    draws = torch.Generator().manual_seed(0)
    context = Context(0, torch.device("cpu"), torch.float32, draws, lambda other: model)
    if isinstance(method, Compresses):
        for part in method.compress(model, [], context):
            part.put(part.make())
    else:
        model = method.prepare(model, context).eval().requires_grad_(False)
    return method.session(model, method.points()[-1], engine)


def cpu_seconds(of: Session, token: torch.Tensor) -> float:
    """Return the CPU time of some steps, the system's included."""
    begun = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(STEPS):
        of.step(token)
    ended = resource.getrusage(resource.RUSAGE_SELF)
    return ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime


@contextmanager
def without_kernels() -> Iterator[None]:
    """Have torch's operations alone inside the context."""
    os.environ["EFFBENCH_NATIVE"] = "0"
    try:
        yield
    finally:
        del os.environ["EFFBENCH_NATIVE"]


def product_share(of: Session, token: torch.Tensor) -> float:
    """Return the share of torch's time in a step that is spent on products with weights."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        cpu_seconds(of, token)
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return sum(times.get(name, 0) for name in WEIGHTS) / sum(times.values())


def row(name: str, settings: dict[str, Any], tokens: int, rounds: int) -> list[str]:
    """Return what one cache gives after so many tokens."""
    ids = torch.arange(tokens)[None] * 7 % SHAPE.vocab_size
    own, engine, eager = (
        session(name, settings),
        session("none", {}),
        session("none", {}, "eager"),
    )
    with without_kernels():
        bare = session(name, settings)
    for each in (own, bare, engine, eager):
        with without_kernels() if each is bare else nullcontext():
            token = each.prefill(ids).argmax(-1, keepdim=True)
            cpu_seconds(each, token)
    times: list[list[float]] = [[], [], [], []]
    for turn in range(rounds):
        for place in sorted(range(4), key=lambda i: i * (-1) ** turn):  # to and fro
            with without_kernels() if place == 1 else nullcontext():
                times[place].append(cpu_seconds((own, bare, eager, engine)[place], token))
    ratios = (ratio_interval(times[0], other) for other in times[1:])
    return [*map(said, ratios), f"{product_share(own, token):.0%}"]


def said(ratio: Interval) -> str:
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("Layers of SmolLM2-135M, float32, batch 1, one thread: CPU time of a step, as a ratio")
    heads = ("over torch alone", "over dense, modules", "over dense, engine", "products")
    print(f"{'cache':18}{'tokens':>8}" + "".join(f"{head:>22}" for head in heads))
    for name, of in CACHES.items():
        for tokens in args.tokens:
            cells = "".join(f"{cell:>22}" for cell in row(*of, tokens, args.rounds))
            print(f"{name:18}{tokens:>8}{cells}", flush=True)


if __name__ == "__main__":
    main()
