"""Decode, prefill and training of EchoAtt against the unshared model, fused and eager.

Each line is one pair of passes timed in turn, in one process and along one path: transformers'
modules. `copied` hands attention maps on, as decoding steps do; otherwise layers take queries and
keys, and attend for themselves. Words of the command line override the config.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from effbench.api.method_types import Context
from effbench.config.compose import compose
from effbench.methods.base import Method
from effbench.methods.chain import inference_cost
from effbench.methods.sharing.echoatt import EchoAtt
from effbench.models import load as models
from effbench.nn.decode.copied_maps import CopyingSession
from effbench.nn.decode.session import CachedSession
from effbench.nn.decode.sessions import session_for
from effbench.nn.decode.shared import SharedSession
from effbench.nn.llama.shared_attention import copying
from effbench.nn.losses.token import answer_nll
from effbench.resources.timing import Clock, interleaved

SHARED = (5, 7, 8, 9, 15, 21, 22, 23, 24, 26, 27, 28)
"""The first 12 of 30 layers that `effbench similarity model=smollm2-135m` would share."""
CONTEXTS, NEW, PAIRS = (128, 1024), 4, 6
PROMPT, TRAINED = 512, 256


def report(
    name: str, ours: Callable[[], Any], theirs: Callable[[], Any], device: Any = "cpu"
) -> None:
    found = interleaved(ours, theirs, PAIRS, clock=Clock(device)).speedup
    print(f"{name}: {found.value:.2f}x [{found.low:.2f}, {found.high:.2f}]", flush=True)


def decoding(session: Any, prompt: torch.Tensor) -> Callable[[], None]:
    """Return a function that decodes `NEW` tokens after the prompt and takes them back."""
    token = prompt[:, -1:]
    session.prefill(prompt)

    def steps() -> None:
        for _ in range(NEW):
            session.step(token)
        session.cache.crop(-NEW)

    return steps


def decode(base: Any, student: Any, attention: str) -> None:
    for length in CONTEXTS:
        prompt = torch.randint(10, 500, (1, length), device=base.device)
        theirs = decoding(CachedSession(base), prompt)
        where = f"decode after {length} tokens, {attention}"
        report(f"{where}, copied", decoding(CopyingSession(student), prompt), theirs, base.device)
        report(where, decoding(SharedSession(student), prompt), theirs, base.device)


def prefill(base: Any, student: Any, attention: str) -> None:
    ids = torch.randint(10, 500, (1, PROMPT), device=base.device)

    def read(model: Any, context: Callable[[Any], Any] = nullcontext) -> None:
        with context(model), torch.inference_mode():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    where = f"prefill of {PROMPT} tokens, {attention}"
    report(where, lambda: read(student), lambda: read(base), base.device)
    report(f"{where}, copied", lambda: read(student, copying), lambda: read(base), base.device)


def train(base: Any, student: Any, attention: str) -> None:
    """Compare forward and backward passes; both optimisers would do the same per weight."""
    ids = torch.randint(10, 500, (1, TRAINED), device=base.device)

    def step(model: Any, context: Callable[[Any], Any] = nullcontext) -> None:
        with context(model):
            answer_nll(model, ids, torch.ones_like(ids), ids).sum().backward()
        model.zero_grad(set_to_none=True)

    for model in (base, student):
        model.train().requires_grad_(True)
    where = f"training step of {TRAINED} tokens, {attention}"
    report(where, lambda: step(student), lambda: step(base), base.device)
    report(f"{where}, copied", lambda: step(student, copying), lambda: step(base), base.device)
    for model in (base, student):
        model.eval().requires_grad_(False)


def main() -> int:
    spec = compose("eval", sys.argv[1:]).spec
    device, dtype = spec.hardware.device, getattr(torch, spec.hardware.dtype)
    loaded = [models.load(spec.model, device=device, dtype=dtype) for _ in range(2)]
    ctx = Context(0, torch.device(device), dtype, torch.Generator(), lambda name: loaded[0].model)
    shape = loaded[0].shape
    layers = tuple(i for i in SHARED if i < shape.num_layers) or (1,)
    method = EchoAtt(layers=layers, refine=1.0)
    base: Any = loaded[0].model
    student: Any = method.prepare(loaded[1].model, ctx)
    for model in (base, student):
        model.eval().requires_grad_(False)
    costs = [inference_cost([m], shape, spec.hardware.dtype) for m in (Method(), method)]
    ratios = {
        name: getattr(costs[0], name) / getattr(costs[1], name)
        for name in ("bytes_per_token", "flops_per_token", "kv_bytes_per_token")
    }
    print("  ".join(f"{name} {ratio:.3f}x" for name, ratio in ratios.items()))
    for attention in ("sdpa", "eager"):
        for model in (base, student):
            model.set_attn_implementation(attention)
        decode(base, student, attention)
        prefill(base, student, attention)
        train(base, student, attention)
    base.set_attn_implementation("sdpa")
    student.set_attn_implementation("sdpa")
    for length in CONTEXTS:
        prompt = torch.randint(10, 500, (1, length), device=device)
        ours, theirs = (engine_steps(model, prompt) for model in (student, base))
        report(f"decode after {length} tokens, our engine", ours, theirs, device)
    return 0


def engine_steps(model: Any, prompt: torch.Tensor) -> Callable[[], None]:
    """Return a function that decodes `NEW` more tokens each time."""
    session = session_for(model)
    session.prefill(prompt)

    def steps() -> None:
        for _ in range(NEW):
            session.step(prompt[:, -1:])

    return steps


if __name__ == "__main__":
    sys.exit(main())
