"""Does trust go as the paper says: does it move least with 8 bits, more with 4, most with 3?

The default model (weights of a Q4_1 file, so rounded once already), rounded to nearest, against
itself before that, on the same questions under three seeds. Pruning, the paper's other half, waits
for a method that prunes. Weights are expanded once after rounding: the products are those of the
packed layers, without expanding for each batch.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from effbench.api.points import UNNAMED
from effbench.api.shape import ModelShape
from effbench.api.spec import Spec
from effbench.config.compose import compose
from effbench.evaluators.base import Result
from effbench.evaluators.subject import Subject
from effbench.evaluators.trust import Trust
from effbench.evaluators.trustworthiness.base import names
from effbench.methods.none import Unchanged
from effbench.models import load as models
from effbench.nn.llama.surgery import decoder_linears
from effbench.nn.quant.linears import PackedLinear
from effbench.report.table import Cell, Table, as_value
from effbench.report.terminal import print_table
from effbench.results.journal import Journal
from effbench.results.records import Metric

BITS = (8, 4, 3)
GROUP = 128
TRUST = Trust(items=12, seeds=[0, 1, 2])


@torch.no_grad()
def rounded(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    """Return a copy of the model whose decoder weights are rounded to nearest."""
    model = copy.deepcopy(model)
    linear: Any
    for _, linear in decoder_linears(model):
        packed = PackedLinear.quantise(linear, bits, GROUP)
        linear.weight.copy_(packed.dense_weight(linear.weight.dtype))
    return model


class Bench:
    """The dense model, and what was already asked of it."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.dtype = getattr(torch, spec.hardware.dtype)
        self.loaded = models.load(spec.model, device=spec.hardware.device, dtype=self.dtype)
        self.dense = self.loaded.model.requires_grad_(False)
        self.reference: Journal | None = None

    def journal(self, name: str, items: Sequence[str]) -> Journal:
        """Return a new journal; that of the dense model is one and the same for all."""
        if name != "reference":
            return Journal(None, items)
        if self.reference is None:
            self.reference = Journal(None, items)
        return self.reference

    def measured(self, bits: int) -> Result:
        """Return how far rounding to `bits` moves the model."""
        start = time.perf_counter()
        subject = Subject(
            model=rounded(self.dense, bits),
            method=Unchanged(),
            point=UNNAMED,
            data=None,  # type: ignore[arg-type]
            device=torch.device(self.spec.hardware.device),
            seed=0,
            pad_token_id=self.loaded.tokenizer.pad_token_id or 0,
            tokenizer=self.loaded.tokenizer,
            shape=ModelShape.of(self.loaded.shape),
            journal=self.journal,
            load_base=lambda: self.dense,
        )
        result = TRUST.run(subject)
        print(f"{bits} bits: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        return result


def metric(result: Result, name: str, task: str = "") -> Metric:
    """Return the one metric of that name."""
    (found,) = (m for m in result.metrics if (m.name, m.task) == (name, task))
    return found


def table(found: dict[int, Result], name: str, title: str) -> Table:
    """Return a metric of every dimension at every number of bits."""
    rows: list[tuple[Cell, ...]] = [
        (dimension, *(as_value(metric(found[bits], name, dimension)) for bits in BITS))
        for dimension in names()
    ]
    return Table(title, ("dimension", *(f"{bits} bits" for bits in BITS)), rows)


def in_order(found: dict[int, Result], name: str, what: str) -> bool:
    """Print a distance at every number of bits, and return whether it grows as bits go down."""
    distances = [metric(found[bits], name) for bits in BITS]
    shown = ", ".join(f"{b} bits {as_value(m)}" for b, m in zip(BITS, distances, strict=True))
    values = [m.value for m in distances]
    holds = values == sorted(values) and len(set(values)) == len(values)
    print(f"{what}: {shown}\n  8 < 4 < 3 bits {'holds' if holds else 'DOES NOT HOLD'}")
    return holds


def main() -> int:
    spec = compose("eval", ["evaluator=trust", *sys.argv[1:]]).spec
    bench = Bench(spec)
    found = {bits: bench.measured(bits) for bits in BITS}
    per_dimension = TRUST.items * len(TRUST.seeds)
    print(
        f"{spec.model.name}, {spec.hardware.dtype}, rtn group {GROUP}, about {per_dimension} "
        f"questions per dimension over {len(TRUST.seeds)} seeds\n"
    )
    for name, title in (
        ("trust_delta", "Score minus that of the dense model, points, 95 % interval"),
        ("trust_shift", "KL from the dense model, nats, 95 % interval"),
    ):
        print_table(table(found, name, title))
    points = in_order(found, "trust_delta_abs", "Mean |delta| over the dimensions, points")
    in_order(found, "trust_shift", "Mean KL over the questions, nats")
    return int(not points)


if __name__ == "__main__":
    sys.exit(main())
