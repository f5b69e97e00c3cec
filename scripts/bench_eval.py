"""Items per second of effbench's scoring against `lm_eval --model hf`, on the same weights.

Both score the same items of hellaswag (0-shot) and of mmlu (5-shot) in one process, in turn.
lm-eval runs at the batch size that is fastest for it on these items, found first.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from effbench.api.points import UNNAMED
from effbench.config.compose import compose
from effbench.data import lm_eval_tasks
from effbench.evaluators.subject import Subject
from effbench.methods.base import Method
from effbench.models import load as models
from effbench.resources.timing import Clock, interleaved

GOALS = {"hellaswag": 2.0, "mmlu": 4.0}
BATCHES = (1, 4, 8, 16, 32)
SUBJECTS = ("mmlu_anatomy", "mmlu_virology")
TOO_SLOW = 1.15


@dataclass
class Work:
    """The same items for both."""

    name: str
    items: list[tuple[lm_eval_tasks.BenchmarkTask, int]]
    ours: Callable[[], list[float]]
    theirs: Callable[[int], list[float]]


def work(name: str, loaded: list[lm_eval_tasks.BenchmarkTask], subject: Subject, lm: Any) -> Work:
    items = [(task, index) for task in loaded for index in range(len(task.docs))]
    instances = [i for task, index in items for i in task.instances()[index]]

    def ours() -> list[float]:
        rows = [row for task in loaded for row in lm_eval_tasks.requests(task, subject.tokenizer)]
        scores = subject.score([r for row in rows for r in row], name)
        return [s.loglikelihood for s in scores]

    def theirs(batch: int) -> list[float]:
        lm.batch_size_per_gpu = batch
        return [value for value, _ in lm.loglikelihood(instances, disable_tqdm=True)]

    return Work(name, items, ours, theirs)


def best_batch(run: Callable[[int], Any], device: str) -> int:
    """Return the fastest batch size; larger ones are not tried once they only get slower."""
    clock, best, fastest = Clock(device), 1, float("inf")
    for batch in BATCHES:
        seconds = clock.seconds(partial(run, batch))
        print(f"  lm-eval at batch size {batch}: {seconds:.1f} s", flush=True)
        if seconds < fastest:
            best, fastest = batch, seconds
        elif seconds > TOO_SLOW * fastest:
            break
    return best


def agreement(w: Work, ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Return the share of items with the same `acc`, and the largest gap in log-likelihood."""
    at, same = 0, 0
    for task, index in w.items:
        count = len(task.instances()[index])
        pair = [
            task.results(index, [(v, False) for v in values[at : at + count]])["acc"]
            for values in (ours, theirs)
        ]
        same += pair[0] == pair[1]
        at += count
    return same / len(w.items), max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def report(w: Work, rounds: int, device: str) -> bool:
    print(f"{w.name}: {len(w.items)} items")
    w.ours()
    batch = best_batch(w.theirs, device)
    same, gap = agreement(w, w.ours(), w.theirs(batch))
    ratio = interleaved(w.ours, lambda: w.theirs(batch), rounds, clock=Clock(device), drop=0)
    goal, count = GOALS[w.name], len(w.items)
    reached = ratio.speedup.value >= goal
    print(
        f"  effbench {count / ratio.a.value:.2f} items/s, lm-eval (batch size {batch}) "
        f"{count / ratio.b.value:.2f} items/s"
    )
    print(
        f"  ratio {ratio.speedup.value:.2f} [{ratio.speedup.low:.2f}, {ratio.speedup.high:.2f}], "
        f"goal {goal:g}: {'reached' if reached else 'MISSED'}"
    )
    print(f"  same acc on {100 * same:.1f} % of items; largest gap {gap:.2g} nats", flush=True)
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hellaswag", type=int, default=48, help="items")
    parser.add_argument("--mmlu", type=int, default=24, help="items of each of two subjects")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("overrides", nargs="*", help="for example hardware.dtype=float32")
    given = parser.parse_args()

    start = time.perf_counter()
    spec = compose("eval", ["method=none", *given.overrides]).spec
    device, dtype = spec.hardware.device, getattr(torch, spec.hardware.dtype)
    loaded = models.load(spec.model, device=device, dtype=dtype)
    model = loaded.model.eval().requires_grad_(False)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=loaded.tokenizer, batch_size=1)
    subject = Subject(
        model,
        Method(),
        UNNAMED,
        None,  # type: ignore[arg-type]
        torch.device(device),
        0,
        0,
        tokenizer=loaded.tokenizer,
    )
    print(
        f"{spec.model.name}, {spec.hardware.dtype} on {device}, {torch.get_num_threads()} threads"
    )
    hellaswag = [lm_eval_tasks.load("hellaswag", num_fewshot=0, limit=given.hellaswag)]
    mmlu = [lm_eval_tasks.load(name, num_fewshot=5, limit=given.mmlu) for name in SUBJECTS]
    reached = [
        report(work(name, some, subject, lm), given.rounds, device)
        for name, some in (("hellaswag", hellaswag), ("mmlu", mmlu))
    ]
    print(f"{time.perf_counter() - start:.0f} s in all")
    return int(not all(reached))


if __name__ == "__main__":
    sys.exit(main())
