"""Loss per exit of the base, LoRA, Sorted-LoRA and SoFT-LoRA; speed of each depth and of exits.

The arms have the same rows, steps and learning rate. Sampled depths do less work per step: the
column of layer forwards says how much. Words of the command line override the config of all arms;
`seeds=0,1,2` repeats them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from effbench.config import compose
from effbench.measure.timing import interleaved
from effbench.nn.decoding import CachedSession, greedy
from effbench.records import Record, read
from effbench.spec import Job
from effbench.stages.common import open_bench, open_data, open_model
from effbench.store import Store
from effbench.worker import run_here

DEPTHS = (18, 21, 24, 27, 30)
LISTED = ",".join(map(str, DEPTHS))
TRAINING = ["train.max_steps=16", "train.batch_size=2", "train.accumulation=5", "train.warmup=0.1"]
TRAINING += ["train.checkpoint_every=1000", "dataset.limit.test=12"]
ARMS = {
    "LoRA": ["method=sorted_lora", f"method.depths=[{DEPTHS[-1]}]"],
    "Sorted-LoRA": ["method=sorted_lora", f"method.depths=[{LISTED}]"],
    "SoFT-LoRA": ["method=sorted_lora", f"method.depths=[{LISTED}]", "method.objective=soft"],
}
PROMPTS, PROMPT, NEW, PAIRS = 2, 32, 16, 4


def run(stage: Any, words: list[str]) -> tuple[Job, Record]:
    job = compose(stage, words)
    run_here(job)
    return job, read(Store(Path(job.runtime.results)).records / f"{job.spec.key}.json")


def values(record: Record, name: str) -> dict[str, float]:
    return {m.point: m.value for m in record.metrics if m.name == name}


def losses(results: str, words: list[str], seeds: list[int]) -> Job:
    """Print the loss of each arm at each depth; return the first job of Sorted-LoRA."""
    common = [f"run.results={results}", "run.progress=false", *TRAINING, *words]
    at = f"method.eval_depths=[{LISTED}]"
    _, record = run("eval", [*common, "method=depths", at])
    print("loss (nats/token) at depth " + " ".join(f"{n:>7}" for n in DEPTHS), end="")
    print("   tokens  layer forwards")
    row("base", values(record, "loss"), 0, 0)
    first = None
    for seed in seeds:
        for name, arm in ARMS.items():
            job, record = run("train", [*common, *arm, at, f"seed={seed}"])
            tokens, work = (values(record, f"train_{w}")[""] for w in ("tokens", "layer_forwards"))
            row(f"{name} seed {seed}", values(record, "loss"), tokens, work)
            first = first or (job if name == "Sorted-LoRA" else None)
    assert first is not None
    return first


def row(name: str, loss: dict[str, float], tokens: float, work: float) -> None:
    cells = " ".join(f"{loss[f'd{n}']:7.3f}" for n in DEPTHS)
    print(f"{name:<26} {cells} {tokens:8,.0f} {work:15,.0f}", flush=True)


@torch.inference_mode()
def speed(job: Job) -> None:
    """Print decode speed at each depth and of both ways of dynamic decoding, against all layers."""
    store = Store(Path(job.runtime.results))
    bench = open_bench(job, store.run(job.spec.key), store)
    model = open_model(bench)
    method: Any = bench.method
    model = method.load(model, bench.folder.artefact, bench.context())
    model.eval().requires_grad_(False)
    prompts = [torch.tensor([e.ids[:PROMPT]]) for e in open_data(bench).examples("test")[:PROMPTS]]
    assert bench.shape is not None

    def decode(point: str) -> list[torch.Tensor]:
        with method.at(model, point):
            return [greedy(method.session(model), p, NEW) for p in prompts]

    def bytes_at(n: int) -> float:
        cost = method.cost(bench.shape, job.spec.hardware.dtype, f"d{n}")
        return float(cost.bytes_per_token)

    full = f"d{DEPTHS[-1]}"
    for n in DEPTHS[:-1]:
        found = interleaved(lambda n=n: decode(f"d{n}"), lambda: decode(full), PAIRS).speedup
        ceiling = bytes_at(DEPTHS[-1]) / bytes_at(n)
        print(
            f"decode at depth {n}: {found.value:.2f}x [{found.low:.2f}, {found.high:.2f}] of all "
            f"layers, {ceiling:.2f}x by bytes read"
        )
    for way in ("exit", "speculative"):
        found = interleaved(lambda way=way: decode(way), lambda: decode(full), PAIRS).speedup
        print(f"{way}: {found.value:.2f}x [{found.low:.2f}, {found.high:.2f}]", end="")
        print(counts(method, model, way, prompts), flush=True)


def counts(method: Any, model: Any, way: str, prompts: list[torch.Tensor]) -> str:
    """Return what sessions counted, averaged over prompts, and how many tokens are the same."""
    found: list[dict[str, float]] = []
    same = total = 0
    for prompt in prompts:
        expected = greedy(CachedSession(model), prompt, NEW)
        with method.at(model, way):
            session = method.session(model)
            tokens = greedy(session, prompt, NEW)
        found.append(session.counts())
        same += int((tokens == expected).sum())
        total += NEW
    means = {key: sum(f[key] for f in found) / len(found) for key in found[0]}
    told = "".join(f", {key} {value:.2f}" for key, value in means.items())
    return f"{told}, {same} of {total} tokens the full model's"


def main() -> int:
    words = [w for w in sys.argv[1:] if not w.startswith("seeds=")]
    chosen = [w.removeprefix("seeds=") for w in sys.argv[1:] if w.startswith("seeds=")]
    seeds = [int(s) for s in (chosen or ["0"])[0].split(",")]
    with tempfile.TemporaryDirectory() as results:
        speed(losses(results, words, seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
