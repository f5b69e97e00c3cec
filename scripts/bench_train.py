"""A training step of effbench beside one of transformers' Trainer (with peft for LoRA), in turn.

Both train the same model on the same rows in the same order, each with its own loop. Trainer runs
in a thread that goes on when it is its turn. Reported is Trainer's time over effbench's, median of
the pairs, and how far the losses are apart: LoRA begins with other draws in each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from effbench.config.compose import compose
from effbench.models import load as models
from effbench.results.store import Store
from effbench.runner.open import open_data, open_model
from effbench.runner.run import open_run
from effbench.runner.stages import train as stage
from effbench.runner.stages.trainer import Trainer, build_trainer
from effbench.stats import ratio_interval

GOAL = 1.2
RATE = 1e-5
WARMUP = 2
WORDS = {
    "lora": ["method=lora", "method.rank=16", "method.alpha=32"],
    "full": ["method=full", "hardware.dtype=float32"],
}
"""What both train: LoRA over a base in the machine's own dtype, and all weights in float32."""


def ours_of(name: str, results: str, rows: int, steps: int) -> Trainer:
    words = [*WORDS[name], f"run.results={results}", "run.progress=false"]
    words += [f"train.batch_size={rows}", f"train.learning_rate={RATE}", "train.warmup=0"]
    words += [f"train.max_steps={steps}", f"train.checkpoint_every={steps}"]
    job = compose("train", [*words, "train.schedule=constant", "train.weight_decay=0"])
    folder = Store(Path(results)).run(job.spec.key)
    folder.create(job.spec)
    run = open_run(job, folder, Store(Path(results)))
    return build_trainer(run, open_model(run), open_data(run))


def rows_of(ours: Trainer, steps: int) -> list[dict[str, list[int]]]:
    """Return the rows of some steps without their padding, in order."""
    rows = []
    for step in range(steps):
        for batch in stage.window_of(ours, step):
            for ids, mask, labels in zip(
                batch.input_ids, batch.attention_mask, batch.labels, strict=True
            ):
                kept = mask.bool()
                rows.append({"input_ids": ids[kept].tolist(), "labels": labels[kept].tolist()})
    return rows


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Return rows of a batch as tensors, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    there = [[1] * len(row["labels"]) + [0] * (longest - len(row["labels"])) for row in rows]
    return {
        "input_ids": filled("input_ids", 0),
        "labels": filled("labels", -100),
        "attention_mask": torch.tensor(there),
    }


class Turns(transformers.TrainerCallback):
    """Lets Trainer make a step when it is asked to, and takes its time."""

    def __init__(self) -> None:
        self.asked, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.seconds, self.losses = list[float](), list[float]()
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.asked.acquire()
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self.done.release()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def theirs_of(
    name: str, ours: Trainer, results: str, rows: int, steps: int
) -> tuple[Turns, threading.Thread]:
    """Return Trainer on the model that ours began with, waiting for its first turn."""
    job = compose("train", WORDS[name])
    dtype = next(ours.model.parameters()).dtype
    model = models.load(job.spec.model, device="cpu", dtype=dtype).model
    model.train().requires_grad_(True)
    if name == "lora":
        import peft

        config = peft.LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config)
    arguments = transformers.TrainingArguments(
        output_dir=f"{results}/theirs",
        use_cpu=True,
        per_device_train_batch_size=rows,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )
    turns = Turns()
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows_of(ours, steps),
        data_collator=padded,
        callbacks=[turns],
    )
    thread = threading.Thread(target=trainer.train, daemon=True)
    thread.start()
    return turns, thread


def measured(name: str, rows: int, pairs: int) -> float:
    """Print what a step takes in both; return the ratio."""
    steps = pairs + WARMUP
    with tempfile.TemporaryDirectory() as results:
        ours = ours_of(name, results, rows, steps)
        turns, thread = theirs_of(name, ours, results, rows, steps)
        own, losses = list[float](), list[float]()
        for pair in range(steps):
            for mine in (True, False) if pair % 2 else (False, True):
                if mine:
                    start = time.perf_counter()
                    losses.append(stage.one_step(ours))
                    own.append(time.perf_counter() - start)
                else:
                    turns.asked.release()
                    turns.done.acquire()
        thread.join()
    ratio = ratio_interval(turns.seconds[WARMUP:], own[WARMUP:])
    apart = max(abs(a - b) for a, b in zip(losses, turns.losses, strict=True))
    print(
        f"{name}: Trainer's step / effbench's: {ratio.value:.3f} [{ratio.low:.3f}, "
        f"{ratio.high:.3f}], {pairs} pairs; losses at most {apart:.4f} apart; "
        f"goal {GOAL}: {'reached' if ratio.value >= GOAL else 'MISSED'}",
        flush=True,
    )
    return float(ratio.value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(WORDS), choices=list(WORDS))
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--pairs", type=int, default=16)
    given = parser.parse_args()
    found = [measured(name, given.rows, given.pairs) for name in given.methods]
    return int(min(found) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
