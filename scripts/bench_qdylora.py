"""A QDyLoRA step against a QLoRA step of the same maximal rank, in turn; bytes of the base."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from effbench.config import compose
from effbench.kernels.nf4 import nf4_bytes
from effbench.nn.linears import decoder_linears
from effbench.nn.quantised import storage_bytes
from effbench.stages import train as stage
from effbench.stages.common import open_bench, open_data, open_model
from effbench.stats import ratio_interval
from effbench.store import Store

LIMIT = 1.15
PAIRS = 16


def trainer(method: str, results: str) -> stage.Trainer:
    words = [f"method={method}", f"run.results={results}", "run.progress=false"]
    words += ["train.batch_size=4", "train.max_steps=1000", "train.checkpoint_every=1000"]
    job = compose("train", [*words, *sys.argv[1:]])
    folder = Store(Path(results)).run(job.spec.key)
    folder.create(job.spec)
    bench = open_bench(job, folder, Store(Path(results)))
    model = open_model(bench)
    counted = sum(storage_bytes(m) for _, m in decoder_linears(model))
    assert bench.shape is not None
    formula = sum(nf4_bytes(i, o) for _, _, i, o in bench.shape.linears())
    weights = bench.shape.linear_params
    print(
        f"{method}: base storage {counted:,} bytes counted, {formula:,} by the formula, "
        f"{counted / weights:.5f} bytes a weight"
    )
    return stage.prepare(bench, model, open_data(bench))


def main() -> int:
    with tempfile.TemporaryDirectory() as results:
        arms = {name: trainer(name, results) for name in ("qdylora", "qlora")}
        times: dict[str, list[float]] = {name: [] for name in arms}
        for pair in range(PAIRS + 2):
            for name in sorted(arms, reverse=bool(pair % 2)):
                start = time.perf_counter()
                stage.one_step(arms[name])
                times[name].append(time.perf_counter() - start)
    ratio = ratio_interval(times["qdylora"][2:], times["qlora"][2:])
    print(f"QDyLoRA step / QLoRA step: {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
    print(f"{PAIRS} pairs, limit {LIMIT}: {'reached' if ratio.value <= LIMIT else 'MISSED'}")
    return int(ratio.value > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
