"""The tiny random model as the subject of an evaluator, without a run around it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from effbench.api.points import UNNAMED
from effbench.config.compose import model_named
from effbench.data.dataset import Data
from effbench.evaluators.base import Result
from effbench.evaluators.subject import Subject
from effbench.methods.none import Unchanged
from effbench.results.records import Metric
from effbench.runner.open import _load_dense, load_base, open_model
from effbench.runner.run import open_run
from effbench.testing.bench import Bench

HARDWARE = ["hardware.device=cpu", "hardware.dtype=float32", "hardware.threads=1"]


def subject_of(bench: Bench, *words: str, strength: float = 5) -> Subject:
    """Return the tiny model, its weights made large enough for its outputs to differ."""
    job = bench.job("eval", *words, *HARDWARE)
    folder = bench.folder(job)
    folder.create(job.spec)
    work = open_run(job, folder, bench.store)
    opened = open_model(work)
    model = strengthened(opened.model, strength)
    return Subject(
        model,
        Unchanged(),
        UNNAMED,
        Data(job.spec.dataset, work.tokenizer),
        torch.device("cpu"),
        0,
        0,
        tokenizer=work.tokenizer,
        shape=opened.base,
        load_model=lambda name: _load_dense(work, model_named(name)),
        others=[model_named("tiny")],
        load_base=lambda: strengthened(load_base(work), strength),
    )


@torch.no_grad()
def strengthened(model: torch.nn.Module, strength: float) -> torch.nn.Module:
    for p in model.parameters():
        p.mul_(strength if p.ndim > 1 else 1)
    return model


def text_file(folder: Path, texts: list[str]) -> list[str]:
    """Write texts as a dataset of documents and return the words that choose it."""
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return [
        "dataset=file",
        "dataset.kind=text",
        f"+dataset.files.test={path}",
        "dataset.cut={}",
    ]


def by_name(result: Result) -> dict[str, Metric]:
    return {m.name: m for m in result.metrics}
