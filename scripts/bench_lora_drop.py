"""Decoding with dropped layers against the same engine without, in turn in one process.

For each share p of droppable layers and each window k: tokens per second, the speed-up beside the
ceiling that the weight bytes allow, latencies of dropped and of refresh steps, layers per token and
the bytes of the cache. Stand-ins are random, for speed does not depend on what they learnt. On a
CUDA device: `python scripts/bench_lora_drop.py --device cuda --shape llama2-7b`.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median
from typing import Any

import torch

from effbench.api.method_types import Context
from effbench.api.session import Cyclic, Session
from effbench.api.shape import DTYPE_BYTES, AnyShape
from effbench.api.skipping import speed_ceiling
from effbench.config.compose import compose
from effbench.methods.chain import chain_cost
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.depth.points import Window
from effbench.models import load as models
from effbench.nn.decode.session import greedy
from effbench.nn.llama.walk import why_not
from effbench.resources.timing import Clock, interleaved
from effbench.util.hardware import default_device, default_dtype

FRACTIONS, WINDOWS, PROMPTS = (0.25, 0.5, 0.75), (1, 2, 3, 5), (128, 1024)
STEPS = 12
"""Steps that are timed at once: whole cycles of every window."""
GOAL = 0.85
"""Share of its ceiling that p = 0.5, k = 3 has to reach."""


class Decoding:
    """A session that has read its prompt, and goes on by greedy tokens."""

    def __init__(self, session: Session, prompt: torch.Tensor, room: int, device: str) -> None:
        self.session, self.clock = session, Clock(device)
        reserve = getattr(session, "reserve", None)
        if reserve is not None:
            reserve(len(prompt), prompt.shape[1] + room, prompt.shape[1])
        self.token = session.prefill(prompt).argmax(-1, keepdim=True)
        self.times: dict[str, list[float]] = {}
        """Seconds of every step, by its kind."""

    def go_on(self) -> None:
        """Make some whole cycles."""
        for _ in range(STEPS):
            start = self.clock.now()
            self.token = self.session.step(self.token).argmax(-1, keepdim=True)
            kind = self.session.cycle.kind if isinstance(self.session, Cyclic) else "base"
            self.times.setdefault(kind, []).append(self.clock.now() - start)

    def p50(self, *kinds: str) -> float:
        """Return the median milliseconds of a step of some kinds, the first cycles left out."""
        return 1e3 * median(t for kind in kinds or self.times for t in self.times[kind][STEPS:])


def with_stand_ins(model: Any, method: LoRADrop, device: str) -> None:
    """Put random stand-ins in the place of whatever the model has."""
    draws = torch.Generator().manual_seed(0)
    ctx = Context(0, torch.device(device), model.dtype, draws, lambda name: model)
    method.prepare(model, ctx)
    model.requires_grad_(False)
    for name, parameter in model.lora_drop.named_parameters():
        if name.endswith("B"):
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=draws))


def ceiling(method: LoRADrop, shape: AnyShape, dtype: str, window: int) -> float:
    """Return 1 / (1 - f + f / w), f being the droppable layers' share of the weight bytes."""
    dropped = method.droppable(shape.num_layers)
    linears = sum(i * o for layer, _, i, o in shape.linears() if layer in dropped)
    weights = linears + 2 * shape.hidden_size * len(dropped)
    whole = chain_cost([method], shape, dtype, Window(0)).bytes_per_token
    return speed_ceiling(weights * DTYPE_BYTES[dtype] / whole, window)


@torch.no_grad()
def row(model: Any, method: LoRADrop, shape: AnyShape, given: Any, prompt: int, k: int) -> float:
    """Time one window against the base, print its row, return its share of the ceiling."""
    ids = torch.randint(shape.vocab_size, (given.batch, prompt), device=given.device)
    room = STEPS * (given.pairs + 1)
    made = []
    for point in (Window(0), Window(k)):
        with method.at(model, point):
            made.append(Decoding(method.session(model), ids, room, given.device))
    base, ours = made
    ratio = interleaved(ours.go_on, base.go_on, given.pairs, clock=Clock(given.device))
    limit = ceiling(method, shape, given.dtype, k)
    found, session = ratio.speedup, ours.session
    assert isinstance(session, Cyclic)
    share = found.value / limit
    rate = given.batch * STEPS / ratio.a.value
    print(
        f"  {prompt:>5} {method.fraction:>5} {k:>2} {rate:>9.1f} "
        f"{found.value:>6.2f} [{found.low:.2f}, {found.high:.2f}] {limit:>8.2f} {share:>6.1%} "
        f"{base.p50():>8.2f} {ours.p50():>6.2f} {ours.p50('drop'):>6.2f} "
        f"{ours.p50('refresh'):>8.2f} {session.cycle.passes / session.cycle.tokens:>7.2f} "
        f"{ours.session.kv_bytes() / base.session.kv_bytes():>6.1%}",
        flush=True,
    )
    return share


@torch.no_grad()
def same_tokens(model: Any, method: LoRADrop, given: Any, vocabulary: int) -> str:
    """Say for how many tokens our engine and whole modules agree."""
    ids = torch.randint(vocabulary, (1, 32), device=given.device)
    with method.at(model, Window(3)):
        sessions = method.session(model), method.session(model, engine="eager")
        ours, theirs = (greedy(session, ids, 13) for session in sessions)
    alike = int((ours == theirs)[0].long().cumprod(0).sum())
    return f"the first {alike} of 13 tokens are those of whole modules"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", default="")
    parser.add_argument("--shape", default="", help="a config of models, with random weights")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompts", type=int, nargs="*", default=list(PROMPTS))
    parser.add_argument("--fractions", type=float, nargs="*", default=list(FRACTIONS))
    parser.add_argument("--windows", type=int, nargs="*", default=list(WINDOWS))
    parser.add_argument("--pairs", type=int, default=7)
    given = parser.parse_args()
    given.dtype = given.dtype or default_dtype(given.device)
    words = [f"model={given.shape or 'smollm2-135m'}"]
    words += ["model.source=random"] if given.shape else []
    spec = compose("eval", words).spec.model
    loaded = models.load(spec, device=given.device, dtype=getattr(torch, given.dtype))
    model: Any = loaded.model
    torch.manual_seed(0)
    print(f"{spec.name}, {given.dtype}, {given.device}, {torch.get_num_threads()} threads", end="")
    print(f", batch {given.batch}: {why_not(model) or 'our engine'}")
    shares = []
    print(
        "  prompt    p  k  tokens/s  speed-up              ceiling  share  base ms    p50   drop "
        " refresh  layers  cache"
    )
    for fraction in given.fractions:
        method = LoRADrop(fraction=fraction, window=max(given.windows))
        with_stand_ins(model, method, given.device)
        for prompt in given.prompts:
            for k in given.windows:
                share = row(model, method, loaded.shape, given, prompt, k)
                shares += [share] if (fraction, k) == (0.5, 3) else []
        if fraction == 0.5 and 3 in given.windows:
            print(f"  p=0.5 k=3: {same_tokens(model, method, given, loaded.shape.vocab_size)}")
    reached = all(share >= GOAL for share in shares)
    print(f"  p=0.5, k=3 at {GOAL:.0%} of its ceiling: {'reached' if reached else 'MISSED'}")
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
