"""A training step of effbench against a bare PyTorch loop that does the same work, in turn.

Both train the same LoRA model on the same windows; each pair of steps runs in one process, one
right after the other, in changing order. Reported is the median of the paired ratios.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from effbench.config.compose import compose
from effbench.results.store import Store
from effbench.runner.open import open_data, open_model
from effbench.runner.run import open_run
from effbench.runner.stages import train as stage
from effbench.stats import ratio_interval

LIMIT = 1.02
PAIRS = 40


def trainer(results: str) -> stage.Trainer:
    job = compose(
        "train",
        [
            "method=lora",
            f"run.results={results}",
            "run.progress=false",
            "train.batch_size=1",
            "train.max_steps=1000",
            "train.checkpoint_every=1000",
            *sys.argv[1:],
        ],
    )
    folder = Store(Path(results)).run(job.spec.key)
    folder.create(job.spec)
    run = open_run(job, folder, Store(Path(results)))
    return stage.build_trainer(run, open_model(run), open_data(run))


def bare_step(model: Any, optimizer: Any, batches: list[Any], parameters: list[Any]) -> float:
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        hidden = model.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state[:, :-1]
        targets = batch.labels[:, 1:]
        kept = targets != -100
        logits = model.lm_head(hidden[kept]).float()
        loss = F.cross_entropy(logits, targets[kept], reduction="sum") / batch.window_tokens
        loss.backward()
        total += float(loss)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return total


def main() -> int:
    with tempfile.TemporaryDirectory() as results:
        ours = trainer(results)
        parameters = [p for p in ours.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        harness, bare = list[float](), list[float]()
        for pair in range(PAIRS + 2):
            batches = stage.window_of(ours, ours.done.step)
            step = ours.done.step
            for which in ("harness", "bare") if pair % 2 else ("bare", "harness"):
                start = time.perf_counter()
                if which == "harness":
                    ours.done.step = step
                    stage.one_step(ours)
                else:
                    bare_step(ours.model, optimizer, batches, parameters)
                (harness if which == "harness" else bare).append(time.perf_counter() - start)
    ratio = ratio_interval(harness[2:], bare[2:])
    print(f"effbench step / bare step: {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]")
    print(f"{PAIRS} pairs, limit {LIMIT}: {'reached' if ratio.value <= LIMIT else 'MISSED'}")
    return int(ratio.value > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
