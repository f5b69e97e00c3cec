"""A tiny training with each optimiser gives what it gave: step by step, and bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args, get_type_hints

import pytest
from goldens import BITS, Golden

from effbench.api.spec import TrainSpec
from effbench.nn.llama.weights import read_tensors
from effbench.results.events import read_events
from effbench.testing.bench import Bench

OPTIMIZERS = get_args(get_type_hints(TrainSpec)["optimizer"])
WORDS = [
    "method=full",
    "model=tiny",
    "dataset=arithmetic",
    "evaluator=[]",
    "train.max_steps=4",
    "train.batch_size=2",
    "train.accumulation=2",
    "train.learning_rate=0.01",
    "train.weight_decay=0.1",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
]
TOLERANCE = 1e-5
"""Relative, between kernels for different processors, whose bits are not compared."""


@pytest.mark.golden
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_gives_what_it_gave(
    optimizer: str, bench: Bench, golden: Callable[[str], Golden]
) -> None:
    words = [*WORDS, f"train.optimizer={optimizer}"]
    folder = bench.folder(bench.job("train", *words))
    bench.run("train", *words)
    losses = [e["loss"] for e in read_events(folder.path / "events.jsonl", "step")]
    kept = golden("trainings.json")
    if kept[optimizer] == pytest.approx(losses, rel=TOLERANCE):
        losses = kept[optimizer]
    kept.check(optimizer, losses, BITS)
    tensors = read_tensors(folder.artefact / "weights.safetensors")
    golden("bits.json").check_bits(f"optimizer {optimizer}", TrainSpec.version, tensors)
