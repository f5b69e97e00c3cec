"""Round-to-nearest, shifted and binary codes of 3 bits: which errors of the weights cost the loss.

For each of the three: the error of all weights and of the hundredth that is largest, over the
linears of the decoder, and the loss on the test rows of experiment `low_bits`. The controls
exchange that hundredth alone: the codes' for the dense one, and one kind's for the other's. Shifted
codes (`hqq`) of one round are round-to-nearest with a zero point that is not rounded.

    python scripts/bench_low_bits.py [KEY=VALUE ...]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from effbench.api.batch import collate
from effbench.config.compose import compose
from effbench.methods.compresses import CompressesLinears
from effbench.methods.quant.hqq import HQQ
from effbench.methods.quant.lut_gemm import LUTGEMM
from effbench.methods.quant.rtn import RTN
from effbench.nn.quant.linears import dense_linears
from effbench.report.table import Table
from effbench.results.store import RunFolder, Store
from effbench.runner.open import open_data, open_model
from effbench.runner.run import open_run

BITS, GROUP, SHARE = 3, 64, 0.01
Weights = dict[str, torch.Tensor]


@torch.no_grad()
def loss_of(model: Any, batches: list[Any]) -> float:
    """Return the mean loss of the answers' tokens, in nats."""
    total, count = 0.0, 0
    for batch in batches:
        labels = batch.labels
        tokens = int((labels[:, 1:] != -100).sum())
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
        total, count = total + float(out.loss) * tokens, count + tokens
    return total / count


def largest(weight: torch.Tensor) -> torch.Tensor:
    """Return which weights are among the hundredth that is largest."""
    size = weight.abs()
    return size >= size.flatten().kthvalue(int(size.numel() * (1 - SHARE))).values


def error(found: Weights, dense: Weights, of: Weights) -> float:
    """Return the root of the squared errors of some weights over that of their squares."""
    off = sum(float((found[n] - w)[of[n]].double().square().sum()) for n, w in dense.items())
    return (off / sum(float(w[of[n]].double().square().sum()) for n, w in dense.items())) ** 0.5


def main() -> None:
    """Print a row for each kind of weights."""
    job = compose("eval", ["experiment=low_bits", "method=none", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as scratch:
        run = open_run(job, RunFolder(Path(scratch)), Store(Path(job.runtime.results)))
        model: Any = open_model(run).model.eval().requires_grad_(False)
        pad = run.tokenizer.pad_token_id
        batches = [collate([e], pad) for e in open_data(run).examples("test")]
    linears = dict(dense_linears(model))
    dense = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    top = {name: largest(weight) for name, weight in dense.items()}
    every = {name: torch.ones_like(part) for name, part in top.items()}

    def coded(method: CompressesLinears) -> Weights:
        made: dict[str, Any] = {n: method.compressed(linear) for n, linear in linears.items()}
        return {name: layer.dense_weight(torch.float32) for name, layer in made.items()}

    even, signs = coded(RTN(BITS, GROUP)), coded(LUTGEMM(bits=BITS, group_size=GROUP))
    moved, unmoved = coded(HQQ(BITS, GROUP)), coded(HQQ(BITS, GROUP, rounds=1))

    def with_top(rest: Weights, best: Weights) -> Weights:
        return {n: torch.where(part, best[n], rest[n]) for n, part in top.items()}

    cases: dict[str, Callable[[], Weights]] = {
        "dense": lambda: dense,
        "rtn": lambda: even,
        "hqq": lambda: moved,
        "hqq, one round": lambda: unmoved,
        "lut_gemm": lambda: signs,
        "rtn, largest of lut_gemm": lambda: with_top(even, signs),
        "rtn, largest dense": lambda: with_top(even, dense),
        "lut_gemm, largest of rtn": lambda: with_top(signs, even),
        "lut_gemm, largest dense": lambda: with_top(signs, dense),
    }
    rows = []
    for name, case in cases.items():
        weights = case()
        for path, linear in linears.items():
            linear.weight.data = weights[path]
        errors = (f"{error(weights, dense, of):.3f}" for of in (every, top))
        rows.append((name, *errors, f"{loss_of(model, batches):.3f}"))
    head = ("weights", "error", f"error of the largest {SHARE:.0%}", "loss (nats/token)")
    print(Table(f"{BITS} bits, groups of {GROUP}", head, rows).markdown())


if __name__ == "__main__":
    main()
