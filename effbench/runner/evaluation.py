"""Every evaluator at every operating point."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from effbench.api.footprint import POINTS_AT_ONCE
from effbench.api.plugins import make_evaluator
from effbench.api.schema import plain
from effbench.data.dataset import Data
from effbench.evaluators.base import Result
from effbench.evaluators.subject import Subject
from effbench.nn.quant.linears import storage_bytes
from effbench.results.journal import Journal
from effbench.results.records import Metric, Outcomes
from effbench.runner.run import Bench
from effbench.util.files import write_atomic


def evaluate(bench: Bench, model: torch.nn.Module, data: Data) -> None:
    """Run every evaluator at every operating point; finished ones are not run again."""
    if not bench.spec.evaluators:
        return
    # Frozen, because torch multiplies by a weight that requires gradients in another order.
    model.eval().requires_grad_(False)
    done = bench.folder.path / "evaluations"
    done.mkdir(exist_ok=True)
    plugins = [make_evaluator(p) for p in bench.spec.evaluators]
    bench.know(evaluate=tuple(p for e in plugins for p in e.passes(bench.spec, data)))
    with bench.phase("evaluate"):
        for point in bench.method.points():
            with bench.method.at(model, point):
                for plugin in bench.spec.evaluators:
                    path = done / f"{plugin.name}{'@' if point else ''}{point}.json"
                    result = _read_result(path)
                    if result is None:
                        result = _run_one(bench, model, data, plugin, point)
                        bench.folder.write_json(f"evaluations/{path.name}", asdict(result))
                    bench.metrics += result.metrics
                    bench.outcomes += result.outcomes
                _count_cost(bench, model, point)


def _read_result(path: Path) -> Result | None:
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    return Result(
        [Metric(**m) for m in values["metrics"]], [Outcomes(**o) for o in values["outcomes"]]
    )


def _run_one(bench: Bench, model: torch.nn.Module, data: Data, plugin: Any, point: str) -> Result:
    place = bench.folder.path / "evaluations"

    def where(point: str) -> str:
        return f"{plugin.name}{'@' if point else ''}{point}"

    def journal(point: str, name: str, items: Sequence[str]) -> Journal:
        return Journal(place / f"{where(point)}.{name}.items", items)

    points = bench.method.points()
    later = points[points.index(point) + 1 :][: POINTS_AT_ONCE - 1]
    subject = Subject(
        model=model,
        method=bench.method,
        point=point,
        data=data,
        device=bench.device,
        seed=bench.spec.seed,
        pad_token_id=bench.tokenizer.pad_token_id or 0,
        progress=lambda what, n, of: bench.progress.bar(f"{what} {point}".strip(), n, of),
        tokenizer=bench.tokenizer,
        shape=bench.shape,
        dtype=bench.spec.hardware.dtype,
        cost=bench.cost(point),
        whole=bench.cost(bench.method.whole(bench.shape)),
        machine=bench.job.runtime.machine,
        journal=partial(journal, point),
        beside={p: partial(journal, p) for p in later},
        keep=lambda name, rows: _write_rows(place / f"{where(point)}.{name}.jsonl", rows),
        load_model=bench.load_frozen,
        load_base=bench.load_base,
        base_bytes=bench.base_bytes,
        job=plain(bench.job),
    )
    result = make_evaluator(plugin).run(subject)
    for metric in result.metrics:
        bench.events.append("metric", **asdict(metric))
    headline = ", ".join(f"{m.name} {m.value:.4g}" for m in result.metrics[:2])
    bench.progress.say(f"{plugin.name} {point}: {headline}".replace(" :", ":"))
    return result


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _count_cost(bench: Bench, model: torch.nn.Module, point: str) -> None:
    cost = bench.cost(point)
    bench.count("params", cost.params, "parameters", point)
    bench.count("weight_bytes", storage_bytes(model), "bytes", point)
    bench.count("bytes_per_token", cost.bytes_per_token, "bytes/token", point)
    bench.count("flops_per_token", cost.flops_per_token, "FLOP/token", point)
    bench.count("kv_bytes_per_token", cost.kv_bytes_per_token, "bytes/token", point)
