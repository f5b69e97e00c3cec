"""What a physical slice is worth, and what pruning while training costs.

- Slices of the real model at three quarters of its linear weights, cut by magnitude: layers alike,
  layers of any size, and of any size in steps of 64. Prefill and decode against the dense model in
  turn, beside the FLOPs and bytes that are left, and the shares of the machine's ceilings.
- A training step of APT with and without salience, in turn: what its hooks and the gradients down
  to the embedding cost.
- Peaks of training of LoRA, of APT, and of LoRA on a slice, each in a process of its own.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from effbench.api.cost import Cost, cost_of
from effbench.api.method_types import Context
from effbench.api.shape import AnyShape
from effbench.config.compose import compose
from effbench.methods.compresses import compress_whole
from effbench.methods.full import Full
from effbench.methods.pruning.apt import APT
from effbench.methods.pruning.structured import Structured
from effbench.models import load as models
from effbench.nn.decode.static import StaticSession
from effbench.nn.pruning.pruner import Pruning
from effbench.nn.pruning.slicing import shape_left
from effbench.nn.quant.linears import storage_bytes
from effbench.resources.counting import parameters
from effbench.resources.roofline import Ceilings, decode_bytes, prefill_flops, probe
from effbench.resources.timing import Ratio, interleaved
from effbench.results.records import Record
from effbench.results.store import Store
from effbench.runner.local import execute
from effbench.runner.open import open_data, open_model
from effbench.runner.run import open_run
from effbench.runner.stages import train as stage

KEEP = 0.75
PROMPT, NEW, PAIRS = 128, 32, 9
TARGETS = "method.targets=[q_proj,v_proj,gate_proj,up_proj,down_proj]"
SLICES = {
    "layers alike": Structured(keep=KEEP, scope="layer"),
    "layers of any size": Structured(keep=KEEP, scope="global"),
    "layers of any size, steps of 64": Structured(keep=KEEP, scope="global", align=64),
}


@dataclass(frozen=True)
class Subject:
    """A model at hand, and what it needs."""

    model: Any
    shape: AnyShape
    cost: Cost


def load() -> Subject:
    """Return the dense model as the command line names it."""
    spec = compose("eval", sys.argv[1:]).spec
    dtype = getattr(torch, spec.hardware.dtype)
    loaded = models.load(spec.model, device=spec.hardware.device, dtype=dtype, tokenizer=False)
    loaded.model.requires_grad_(False)
    return Subject(
        loaded.model, loaded.shape, cost_of(loaded.shape, str(dtype).removeprefix("torch."))
    )


def sliced(method: Structured) -> Subject:
    """Return a slice of it."""
    whole = load()
    weight = whole.model.model.embed_tokens.weight
    draws = torch.Generator()
    ctx = Context(0, weight.device, weight.dtype, draws, lambda name: whole.model)
    compress_whole(method, whole.model, [], ctx)
    shape = shape_left(whole.model, whole.shape)
    return Subject(
        whole.model.eval(), shape, cost_of(shape, str(weight.dtype).removeprefix("torch."))
    )


# -- speed -----------------------------------------------------------------------------------------


def speed(name: str, part: Subject, dense: Subject, ceilings: Ceilings) -> bool:
    """Print how a slice compares with the dense model; return whether its counts are exact."""
    counted, held = parameters(part.model).total, storage_bytes(part.model)
    share = part.shape.linear_params / dense.shape.linear_params
    print(f"\n{name}: {share:.4f} of the linear weights, budget {KEEP}")
    print(f"  parameters {counted:,} counted, {part.cost.params:,} by the formula")
    print(f"  bytes {held:,} held, {part.cost.resident_bytes:,} by the formula; ", end="")
    print(f"slice / dense {held / dense.cost.resident_bytes:.3f}")
    draws = torch.Generator().manual_seed(0)
    prompt = torch.randint(part.shape.vocab_size, (1, PROMPT), generator=draws)
    prompt = prompt.to(part.model.device)
    flops = [prefill_flops(s.cost, s.shape, 1, PROMPT) for s in (part, dense)]
    ours, theirs = (partial(prefilled, s.model, prompt, 0) for s in (part, dense))
    show("prefill", interleaved(ours, theirs, PAIRS), flops, "FLOPs", ceilings.gemm, PROMPT)
    # Every call decodes NEW tokens more; the contexts of both grow alike.
    context = PROMPT + NEW * (PAIRS + 1) // 2
    moved = [decode_bytes(s.cost, 1, context, NEW) for s in (part, dense)]
    sessions = [prefilled(s.model, prompt, NEW * (PAIRS + 1)) for s in (part, dense)]
    print(f"  engine: {sessions[0].engine}, of the dense model {sessions[1].engine}")
    step, other = (partial(steps, session) for session in sessions)
    show("decode", interleaved(step, other, PAIRS), moved, "bytes", ceilings.bandwidth, NEW)
    return counted == part.cost.params and held == part.cost.resident_bytes


def prefilled(model: Any, prompt: torch.Tensor, more: int) -> StaticSession:
    """Return a session that has read the prompt and has room for more tokens."""
    session = StaticSession(model)
    session.reserve(1, prompt.shape[1] + more)
    session.prefill(prompt)
    return session


def steps(session: StaticSession) -> None:
    """Decode NEW tokens."""
    token = torch.zeros(1, 1, dtype=torch.long, device=session.device)
    for _ in range(NEW):
        token = session.step(token).argmax(-1, keepdim=True)


def show(
    what: str, ratio: Ratio, done: list[float], kind: str, ceiling: float, tokens: int
) -> None:
    """Print tokens per second, shares of the ceiling, and the ratio beside that of the work."""
    found = []
    for name, seconds, work in (("slice", ratio.a, done[0]), ("dense", ratio.b, done[1])):
        rate = work / seconds.value
        found.append(f"{name} {tokens / seconds.value:.1f} tokens/s ({rate / ceiling:.1%})")
    print(f"  {what}: {', '.join(found)}; shares are of the best rate of {kind} seen")
    speedup = ratio.speedup
    print(
        f"    slice / dense {speedup.value:.3f} [{speedup.low:.3f}, {speedup.high:.3f}]; ", end=""
    )
    print(f"{kind} dense / slice {done[1] / done[0]:.3f}", flush=True)


# -- salience --------------------------------------------------------------------------------------


def salience_cost(results: str) -> None:
    """Print the ratio of a step's passes with salience to those without it."""
    words = ["method=apt", f"method.keep={KEEP}", "train.batch_size=4", "run.progress=false"]
    job = compose("train", [*words, f"run.results={results}", *sys.argv[1:]])
    store = Store(Path(results))
    folder = store.run(job.spec.key)
    folder.create(job.spec)
    run = open_run(job, folder, store)
    trainer = stage.build_trainer(run, open_model(run), open_data(run))
    model, method, ctx = trainer.model, trainer.method, trainer.ctx
    batches = stage.window_of(trainer, 0)
    pruning = Pruning.of(model)
    assert isinstance(method, APT)
    assert pruning is not None

    def passes(plain: bool) -> None:
        for batch in batches:
            one = Full().loss if plain else method.loss
            one(model, batch, ctx).backward()
        if not plain:
            pruning.watcher.finish_step()
        model.zero_grad(set_to_none=True)

    ratio = interleaved(partial(passes, True), partial(passes, False), PAIRS).speedup
    print(
        f"\npasses of a step with salience / without: {ratio.value:.3f} "
        f"[{ratio.low:.3f}, {ratio.high:.3f}], {PAIRS} pairs",
        flush=True,
    )


# -- memory ----------------------------------------------------------------------------------------

RUN = [
    "run.progress=false",
    "run.exact_memory=true",
    "train.max_steps=4",
    "train.batch_size=4",
    "dataset.max_length=128",
    "evaluator=[]",
]
LORA = ["method=lora", "method.rank=8", TARGETS]
ONCE = ["method.begin=0", "method.end=0", "method.prunings=1", "method.mask_step=1"]


def peaks(results: str) -> None:
    """Print the peak of training beyond what the process held before."""
    cut = run(results, "compress", "method=structured", f"method.keep={KEEP}")
    arms = {
        "LoRA": run(results, "train", *LORA),
        "APT, nothing cut yet": run(results, "train", "method=apt", f"method.keep={KEEP}"),
        "APT, cut in the first step": run(
            results, "train", "method=apt", f"method.keep={KEEP}", *ONCE
        ),
        "structured, then LoRA": run(results, "train", f"from={cut.key}", *LORA),
    }
    print()
    for name, record in arms.items():
        phase = record.plan["phases"]["train"]
        own = phase["measured_bytes"] - record.plan["base_bytes"]
        print(f"peak of training, {name}: {own / 2**20:.0f} MiB beyond the process, ", end="")
        print(f"{phase['peak_bytes'] / 2**20:.0f} predicted", flush=True)


def run(results: str, kind: Any, *words: str) -> Record:
    """Run one job in a process of its own and return its record."""
    fixed = [w for w in RUN if not (words[0].startswith("from=") and w.startswith("dataset."))]
    return execute(compose(kind, [f"run.results={results}", *fixed, *words, *sys.argv[1:]]))


def main() -> int:
    dense = load()
    weight = dense.model.model.embed_tokens.weight
    reading = dense.cost.bytes_per_token
    ceilings = probe(weight.device, weight.dtype, working_set=reading, repeats=3)
    exact = [speed(name, sliced(method), dense, ceilings) for name, method in SLICES.items()]
    with tempfile.TemporaryDirectory() as results:
        salience_cost(results)
        peaks(results)
    return int(not all(exact))


if __name__ == "__main__":
    sys.exit(main())
