"""A/A: a method against itself, trained on other seeds, must show no difference.

A tiny model is trained from many seeds. Each comparison takes seeds that no other one has for
either side and holds the two groups against each other over seeds and items, as `effbench compare`
does. In as many comparisons as stated the interval must hold zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

from effbench.cli.selfcheck.base import Check
from effbench.stats import Student, seeds_and_items
from effbench.stats.base import Floats

COMPARISONS, SHORT_COMPARISONS = 200, 20
BOUNDS, SHORT_BOUNDS = (93.0, 97.0), (75.0, 100.0)
"""Per cent that must hold zero. The short form's few would have less than its bound once in some
three thousand times."""
SEEDS = 5
"""Of each side of a comparison."""
STEPS, ROWS = 4, 4
"""Optimiser steps of a training, and rows of a step."""
ITEMS = 60
"""Rows that the loss is measured on."""
WORDS = (
    "model=tiny",
    "model.shape.num_layers=2",
    "model.shape.hidden_size=32",
    "model.shape.num_heads=2",
    "model.shape.num_kv_heads=1",
    "dataset=arithmetic",
    "method=full",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    f"train.max_steps={STEPS}",
    f"dataset.limit.test={ITEMS}",
    "train.learning_rate=0.005",
)


def run(short: bool) -> Iterator[Check]:
    """Yield how many comparisons of a method with itself hold zero."""
    comparisons = SHORT_COMPARISONS if short else COMPARISONS
    losses = trainings(2 * SEEDS * comparisons)
    inside = held(losses, comparisons)
    detail = f"{comparisons} comparisons of {SEEDS} and {SEEDS} trainings on {ITEMS} items"
    bounds = SHORT_BOUNDS if short else BOUNDS
    yield Check("intervals that hold zero", 100 * inside / comparisons, *bounds, "%", detail)


def held(losses: Floats, comparisons: int) -> int:
    """Return in how many comparisons the interval of the difference holds zero.

    Args:
        losses: Of each training on each item, [trainings, items].
        comparisons: Each takes `2 * SEEDS` trainings of its own.
    """
    sides = losses.reshape(comparisons, 2, SEEDS, -1)
    intervals = [_difference(a, b).interval() for a, b in sides]
    return sum(found.low <= 0 <= found.high for found in intervals)


def _difference(a: Floats, b: Floats) -> Student:
    return seeds_and_items(a, b)


def trainings(seeds: int) -> Floats:
    """Return the loss of each item after a training from each seed, [seeds, items]."""
    import torch

    from effbench.api.plugins import make_method
    from effbench.config.compose import compose
    from effbench.data.dataset import Data
    from effbench.models.load import load

    spec = compose("train", list(WORDS)).spec
    loaded = load(spec.model, device="cpu", dtype=torch.float32)
    data = Data(spec.dataset, loaded.tokenizer)
    method = make_method(spec.method)
    pad = loaded.tokenizer.pad_token_id
    rows, items = data.examples("train"), data.examples("test")
    losses = []
    for seed in range(seeds):
        model = _trained(copy.deepcopy(loaded.model), method, rows, spec, pad, seed)
        losses.append(_losses(model, method, items, pad))
    return np.stack(losses)


def _trained(model: Any, method: Any, rows: Any, spec: Any, pad: int, seed: int) -> Any:
    """Return the model after a short training whose draws and rows are the seed's."""
    import torch

    from effbench.api.method_types import Context
    from effbench.methods.trains import begin_training
    from effbench.runner.stages.batching import rows_of_step, window

    torch.manual_seed(seed)
    device, draws = torch.device("cpu"), torch.Generator().manual_seed(seed)
    ctx = Context(seed, device, torch.float32, draws, lambda name: model, total_steps=STEPS)
    model = begin_training(method, model, ctx).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=spec.train.learning_rate, weight_decay=0.0)
    for ctx.step in range(STEPS):
        ctx.evolution.before_step()
        chosen = rows_of_step(len(rows), seed, ctx.step, ROWS)
        method.update(model, optimizer, window(rows, chosen, ROWS, pad, device), ctx)
    return model.eval()


def _losses(model: Any, method: Any, items: Any, pad: int) -> Floats:
    """Return the mean loss of each item, in nats per token."""
    import torch

    from effbench.api.batch import make_batch

    batch = make_batch([(item.ids, item.labels()) for item in items], pad)
    with torch.inference_mode():
        nll = method.token_nll(model, batch).double().sum(dim=1)
    tokens = (batch.labels[:, 1:] != -100).sum(dim=1)
    return np.asarray(nll / tokens, dtype=np.float64)
