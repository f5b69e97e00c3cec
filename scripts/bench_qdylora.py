"""A QDyLoRA step against a QLoRA step of the same maximal rank, in turn; bytes of the base.

Then an evaluation batch at all ranks: in one pass against one pass for each rank, in turn.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from effbench.api.batch import make_batch
from effbench.config.compose import compose
from effbench.nn.llama.surgery import decoder_linears
from effbench.nn.quant.linears import storage_bytes
from effbench.nn.quant.nf4 import nf4_bytes
from effbench.nn.scoring.multi_point import nll_at
from effbench.results.store import Store
from effbench.runner.open import open_data, open_model
from effbench.runner.run import open_run
from effbench.runner.stages import train as stage
from effbench.runner.stages.trainer import Trainer, build_trainer
from effbench.stats import ratio_interval

LIMIT = 1.15
PAIRS = 16
BATCHES = 6


def trainer(method: str, results: str) -> Trainer:
    words = [f"method={method}", f"run.results={results}", "run.progress=false"]
    words += ["train.batch_size=4", "train.max_steps=1000", "train.checkpoint_every=1000"]
    job = compose("train", [*words, *sys.argv[1:]])
    folder = Store(Path(results)).run(job.spec.key)
    folder.create(job.spec)
    run = open_run(job, folder, Store(Path(results)))
    opened = open_model(run)
    counted = sum(storage_bytes(m) for _, m in decoder_linears(opened.model))
    formula = sum(nf4_bytes(i, o) for _, _, i, o in opened.base.linears())
    weights = opened.base.linear_params
    print(
        f"{method}: base storage {counted:,} bytes counted, {formula:,} by the formula, "
        f"{counted / weights:.5f} bytes a weight"
    )
    return build_trainer(run, opened, open_data(run))


@torch.inference_mode()
def evaluation(arm: Trainer) -> None:
    """Print what one pass over all ranks takes of the time of separate passes."""
    method, model = arm.method, arm.model.eval().requires_grad_(False)
    points = method.points()
    rows = [(e.ids[:128], e.labels()[:128]) for e in arm.examples[:8]]
    batch = make_batch(rows, 0)
    inputs = batch.input_ids, batch.attention_mask, batch.labels

    def together() -> list[torch.Tensor]:
        return nll_at(model, [partial(method.at, model, p) for p in points], *inputs)

    def apart() -> list[torch.Tensor]:
        found = []
        for point in points:
            with method.at(model, point):
                found.append(method.token_nll(model, batch))
        return found

    ways = {"together": together, "apart": apart}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(BATCHES + 1):
        found = {}
        for name in sorted(ways, reverse=bool(number % 2)):
            start = time.perf_counter()
            found[name] = ways[name]()
            times[name].append(time.perf_counter() - start)
        assert all(a.equal(b) for a, b in zip(*found.values(), strict=True))
    ratio = ratio_interval(times["together"][1:], times["apart"][1:])
    print(
        f"{len(points)} ranks of {batch.input_ids.numel()} tokens, one pass / separate passes: "
        f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], the same bits"
    )


def main() -> int:
    with tempfile.TemporaryDirectory() as results:
        arms = {name: trainer(name, results) for name in ("qdylora", "qlora")}
        times: dict[str, list[float]] = {name: [] for name in arms}
        for pair in range(PAIRS + 2):
            for name in sorted(arms, reverse=bool(pair % 2)):
                start = time.perf_counter()
                stage.one_step(arms[name])
                times[name].append(time.perf_counter() - start)
        evaluation(arms["qdylora"])
    ratio = ratio_interval(times["qdylora"][2:], times["qlora"][2:])
    print(f"QDyLoRA step / QLoRA step: {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
    print(f"{PAIRS} pairs, limit {LIMIT}: {'reached' if ratio.value <= LIMIT else 'MISSED'}")
    return int(ratio.value > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
