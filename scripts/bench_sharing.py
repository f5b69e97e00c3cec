"""Shared keys and values: prefill with and without its shortcut, decoding, training, and ceilings.

The weights of a real model are shared as they are, for speed does not depend on them. Each arm is
timed against the unshared model in turn, on the same threads, with sessions of the same kind.
Ceilings are ratios of what has to be done: FLOPs for prefill and training (without the optimiser,
whose work shrinks with the parameters), bytes of weights and cache for decoding. A measured ratio
above its ceiling by more than noise is a mistake in the measurement: it is taken again.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from effbench.api.batch import Batch
from effbench.api.cost import cost_of
from effbench.api.footprint import Pass, step_flops, training_of
from effbench.api.session import Session
from effbench.api.shape import AnyShape, ModelShape
from effbench.api.sharing import shared_shape, top_map
from effbench.api.weights import COMPUTE
from effbench.config.compose import compose
from effbench.methods.base import Method
from effbench.models import load as models
from effbench.nn.decode.session import CachedSession
from effbench.nn.decode.sessions import session_for
from effbench.nn.decode.shared import SharedSession
from effbench.nn.llama.shared_attention import share
from effbench.resources.counting import parameters
from effbench.resources.roofline import decode_bytes, prefill_flops
from effbench.resources.timing import Clock, Ratio, interleaved

SHARES = (0.25, 0.5)
PROMPT, NEW, TRAINED, REPEATS = 1024, 24, 256, 7
TRIES = 3
"""Most measurements of one ratio."""


def main() -> int:
    begun = time.perf_counter()
    spec = compose("eval", sys.argv[1:]).spec
    dtype = spec.hardware.dtype
    loaded = models.load(
        spec.model, device=spec.hardware.device, dtype=getattr(torch, dtype), tokenizer=False
    )
    dense, shape = loaded.model.requires_grad_(False), loaded.shape
    draws = torch.Generator().manual_seed(0)
    prompt = torch.randint(shape.vocab_size, (1, PROMPT), generator=draws)
    prompt = prompt.to(spec.hardware.device)
    before = cost_of(shape, dtype)
    print(f"{spec.model.name} in {dtype}, {torch.get_num_threads()} threads, prompt {PROMPT}")
    exact = True
    for part in SHARES:
        sharing = top_map(shape.num_layers, round(part * shape.num_layers))
        small = share(copy.deepcopy(dense), sharing).eval()
        less = shared_shape(shape, sharing)
        cost = cost_of(less, dtype)
        session = read(SharedSession(small), prompt)
        held = cost.kv_bytes_per_token * PROMPT
        exact &= parameters(small).total == cost.params and session.kv_bytes() == held
        print(
            f"kv/top {part:.0%}: parameters {cost.params:,} of {before.params:,}, cache "
            f"{cost.kv_bytes_per_token:,} of {before.kv_bytes_per_token:,} bytes per token"
        )
        whole = prefill_flops(before, shape, 1, PROMPT)
        skipping = whole / prefill_flops(cost, less, 1, PROMPT)
        reading = whole / (whole - 2 * PROMPT * (before.params - cost.params))
        bytes_read = (decode_bytes(before, 1, PROMPT, NEW), decode_bytes(cost, 1, PROMPT, NEW))
        for shortcut, ceiling in ((True, skipping), (False, reading)):
            prefilling(prompt, dense, small, shortcut, ceiling)
        decoding(prompt, dense, small, bytes_read[0] / bytes_read[1])
        training(prompt[:, :TRAINED], dense, small, trained_flops(shape) / trained_flops(less))
    print(f"{time.perf_counter() - begun:.0f} s in all")
    return int(not exact)


def read(session: Session, prompt: torch.Tensor) -> Session:
    """Return the session after it has read the prompt."""
    session.prefill(prompt)
    return session


def prefilling(
    prompt: torch.Tensor, dense: Any, small: Any, shortcut: bool, ceiling: float
) -> None:
    """Print how much faster the shared model reads the prompt than the unshared one."""
    ratio = below(
        ceiling,
        lambda: SharedSession(small, shortcut).prefill(prompt),
        lambda: CachedSession(dense).prefill(prompt),
        Clock(prompt.device),
    )
    show(f"prefill {'with' if shortcut else 'without'} the shortcut", ratio, ceiling)


def decoding(prompt: torch.Tensor, dense: Any, small: Any, ceiling: float) -> None:
    """Print how much faster the shared model decodes: sessions alike, and each at its best."""
    makers: dict[str, Callable[[Any], Session]] = {"alike": CachedSession, "at best": session_for}
    for name, make in makers.items():
        ours, theirs = make(small), make(dense)
        work, other = (steps(read(session, prompt), prompt[:, -1:]) for session in (ours, theirs))
        ratio = below(ceiling, work, other, Clock(prompt.device))
        kinds = " against ".join(getattr(s, "engine", "forward pass") for s in (ours, theirs))
        show(f"decode, sessions {name} ({kinds})", ratio, ceiling)


def training(tokens: torch.Tensor, dense: Any, small: Any, ceiling: float) -> None:
    """Print how much faster the shared model goes forward and backward, every weight trained."""
    batch = Batch(tokens, torch.ones_like(tokens), tokens, [0], TRAINED - 1)

    def work(model: Any) -> Callable[[], None]:
        def step() -> None:
            Method().token_nll(model, batch).sum().backward()
            model.zero_grad(set_to_none=True)

        return step

    for model in (small, dense):
        model.requires_grad_(True).train()
    ratio = below(ceiling, work(small), work(dense), Clock(tokens.device))
    for model in (small, dense):
        model.requires_grad_(False).eval()
    show("forward and backward pass", ratio, ceiling)


def trained_flops(shape: AnyShape) -> float:
    """Return the FLOPs of a forward and backward pass over the tokens that training reads."""
    one = Pass("train", 1, TRAINED, TRAINED - 1)
    return step_flops(training_of(ModelShape.of(shape).trained(COMPUTE), "bfloat16"), one)


def below(ceiling: float, a: Callable[[], object], b: Callable[[], object], clock: Clock) -> Ratio:
    """Return how much faster `a` is than `b`, taken again while all of it is above the ceiling."""
    for _ in range(TRIES):
        ratio = interleaved(a, b, REPEATS, clock=clock)
        if ratio.speedup.low <= ceiling:
            break
    return ratio


def steps(session: Session, token: torch.Tensor) -> Callable[[], None]:
    """Return work that decodes a few tokens more; the context grows by them each time."""

    def work() -> None:
        for _ in range(NEW):
            session.step(token)

    return work


def show(name: str, ratio: Ratio, ceiling: float) -> None:
    """Print a ratio with its interval beside its ceiling."""
    value, low, high = ratio.speedup
    odd = ", which cannot be" if low > ceiling else ""
    found = f"{value:.3f} [{low:.3f}, {high:.3f}] times"
    print(f"  {name}: {found}, ceiling {ceiling:.3f}{odd}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
