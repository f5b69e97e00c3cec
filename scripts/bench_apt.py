"""APT against pruning before and after LoRA: same weights left, same tokens; speed of the slice.

Every arm trains adapters of rank 8 on the same linears with the same learning rate, steps and rows
of a real model, and is evaluated on held-out rows. Parameters are those after merging. Give Hydra
overrides to change the runs, for example `train.max_steps=200`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from effbench import models
from effbench.config import compose, make_method
from effbench.launch import execute
from effbench.measure.counting import parameters
from effbench.measure.timing import interleaved
from effbench.methods.base import Context, Method
from effbench.nn.decoding import greedy
from effbench.nn.quantised import storage_bytes
from effbench.records import Record
from effbench.shapes import Shape
from effbench.stats import mean_interval
from effbench.store import Store

KEEP = 0.75
PROMPT, NEW, REPEATS = 128, 24, 9
TARGETS = "[q_proj,v_proj,gate_proj,up_proj,down_proj]"
COMMON = [
    "run.progress=false",
    "train.max_steps=36",
    "train.batch_size=4",
    "train.checkpoint_every=1000",
    "dataset.max_length=128",
    "evaluator=[perplexity]",
    "dataset.limit.test=64",
]
BLOCKS = ["method.blocks=[groups,neurons]", f"method.keep={KEEP}"]
GRADUAL = ["method.begin=0.1", "method.end=0.5", "method.prunings=5", "method.mask_step=0.1"]
ONCE = ["method.prunings=1", "method.mask_step=1", "method.grow=1"]
LORA = ["method=lora", "method.rank=8", "method.alpha=16", f"method.targets={TARGETS}"]
ARMS: dict[str, list[list[str]]] = {
    "LoRA, unpruned": [LORA],
    "APT": [["method=apt", *BLOCKS, *GRADUAL]],
    "APT without growth": [["method=apt", *BLOCKS, *GRADUAL, "method.grow=1"]],
    "APT, neurons only": [["method=apt", *BLOCKS, *GRADUAL, "method.blocks=[neurons]"]],
    "Wanda neurons, then LoRA": [
        [
            "method=structured",
            *BLOCKS,
            "method.criterion=wanda",
            "method.scope=layer",
            "method.blocks=[neurons]",
        ],
        LORA,
    ],
    "LoRA, then APT's blocks": [
        ["method=apt", *BLOCKS, *ONCE, "method.begin=1", "method.end=1"],
    ],
}


def run(results: str, words: Sequence[str], parent: str = "") -> Record:
    """Run one job in a process of its own and return its record."""
    stage: Any = "compress" if "method=structured" in words else "train"
    fixed = [w for w in COMMON if not (parent and w.startswith("dataset."))]
    start = [f"from={parent}"] if parent else []
    job = compose(stage, [f"run.results={results}", *fixed, *start, *words, *sys.argv[1:]])
    return execute(job)


def value(record: Record, name: str, phase: str = "") -> float:
    """Return one metric of a record, NaN where it is not there."""
    found = [m.value for m in record.metrics if m.name == name and m.phase == phase]
    return found[0] if found else float("nan")


def losses(record: Record) -> list[float]:
    """Return the loss of every held-out row, in nats per token of the row."""
    return next(o.values for o in record.outcomes if o.metric == "loss")


def main() -> int:
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as results:
        records = {}
        for arm, parts in ARMS.items():
            record, parent = None, ""
            for words in parts:
                record = run(results, words, parent)
                parent = record.key
            assert record is not None
            records[arm] = record
            adapters = value(record, "trainable_params") if parts[-1] is LORA else 0
            peak = value(record, "peak_bytes", "train") / 2**30
            trained = value(record, "trainable_params")
            print(
                f"{arm:26} loss {value(record, 'loss'):.4f}  parameters "
                f"{value(record, 'params') - adapters:,.0f}  trained {trained:,.0f}"
                f"  step {value(record, 'step_seconds', 'train'):.2f} s  peak {peak:.2f} GiB",
                flush=True,
            )
        compare(records)
        ok = speed(results, records["APT"])
    print(f"{time.perf_counter() - begun:.0f} s in all")
    return int(not ok)


def compare(records: dict[str, Record]) -> None:
    """Print the paired difference of each arm's held-out loss to APT's."""
    ours = losses(records["APT"])
    for arm, record in records.items():
        if arm != "APT":
            pairs = [a - b for a, b in zip(losses(record), ours, strict=True)]
            mean, low, high = mean_interval(pairs)
            print(f"{arm} - APT: {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats per token, by row")


def speed(results: str, record: Record) -> bool:
    """Print how fast the slice is beside the dense model; return whether the counts are exact."""
    store = Store(Path(results))
    spec = store.spec_of(record.key)
    method, dtype = make_method(spec.method), getattr(torch, spec.hardware.dtype)
    dense, slice_ = (
        models.load(spec.model, device=spec.hardware.device, dtype=dtype, tokenizer=False)
        for _ in range(2)
    )
    folder = store.run(record.key).artefact
    shape: Shape = method.left(dense.shape, folder)
    draws = torch.Generator()
    ctx = Context(0, torch.device(spec.hardware.device), dtype, draws, lambda name: dense.model)
    small = method.load(slice_.model, folder, ctx).eval()
    cost = method.cost(shape, spec.hardware.dtype)
    whole = Method().cost(dense.shape, spec.hardware.dtype)
    counted, held = parameters(small).total, storage_bytes(small)
    print(f"parameters of the slice: {counted:,} counted, {cost.params:,} by the formula")
    print(f"bytes of the slice: {held:,} held, {cost.resident_bytes:,} by the formula")
    share = shape.linear_params / dense.shape.linear_params
    print(f"linear weights left: {share:.4f} of the dense model's, budget {KEEP}")
    sizes = [shape.layer(i) for i in range(shape.num_layers)]
    print(
        f"layers without attention: {sum(not s.num_heads for s in sizes)} of {len(sizes)}, "
        f"without MLP: {sum(not s.intermediate_size for s in sizes)}"
    )
    prompt = torch.randint(
        dense.shape.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0)
    )

    def prefill(model: torch.nn.Module) -> object:
        return method.session(model).prefill(prompt)

    def decode(model: torch.nn.Module) -> object:
        return greedy(method.session(model), prompt[:, :8], NEW)

    for name, work, bytes_ in (
        ("prefill", prefill, whole.flops_per_token / cost.flops_per_token),
        ("decode", decode, whole.bytes_per_token / cost.bytes_per_token),
    ):
        ratio = interleaved(
            lambda work=work: work(small),  # type: ignore[misc]
            lambda work=work: work(dense.model),  # type: ignore[misc]
            REPEATS,
        ).speedup
        kind = "FLOPs" if name == "prefill" else "weight bytes"
        print(
            f"{name} speed, slice / dense: {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]; "
            f"{kind}, dense / slice: {bytes_:.3f}",
            flush=True,
        )
    return counted == cost.params and held == cost.resident_bytes


if __name__ == "__main__":
    sys.exit(main())
