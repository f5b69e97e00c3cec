"""Every evaluator at every operating point."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from effbench.api.cost import Cost
from effbench.api.footprint import POINTS_AT_ONCE
from effbench.api.plugins import make_evaluator
from effbench.api.points import Point
from effbench.api.schema import plain
from effbench.api.shape import ModelShape
from effbench.api.spec import Plugin
from effbench.data.dataset import Data
from effbench.evaluators.base import Result
from effbench.evaluators.subject import Subject
from effbench.nn.quant.linears import storage_bytes
from effbench.results.journal import Journal
from effbench.results.records import Metric, Outcomes
from effbench.results.store import evaluation_stem
from effbench.runner.open import Opened, load_base, load_frozen
from effbench.runner.run import Run


@dataclass(frozen=True)
class Evaluated:
    """What is evaluated: a model at all its points, and all that is known of it from shapes."""

    opened: Opened
    data: Data
    shape: ModelShape
    """Sizes of what the run leaves."""
    used: Mapping[Point, ModelShape]
    """The model as it is used, by operating point."""
    costs: Mapping[Point, Cost]
    """By operating point."""
    whole: Cost
    """Of the point with all that is in memory."""

    @classmethod
    def of(cls, run: Run, opened: Opened, data: Data) -> Evaluated:
        """Return what a run evaluates, once it is made."""
        lineage, dtype = run.lineage, run.spec.hardware.dtype
        shape = lineage.left(opened.base)
        whole = opened.method.full_point(shape)
        points = {whole, *opened.method.points()}
        costs = {point: lineage.cost(opened.base, dtype, point) for point in points}
        used = {point: lineage.used(opened.base, point) for point in points}
        return cls(opened, data, shape, used, costs, costs[whole])


def evaluate(run: Run, opened: Opened, data: Data) -> None:
    """Run every evaluator at every operating point; finished ones are not run again."""
    if not run.spec.evaluators:
        return
    # Frozen, because torch multiplies by a weight that requires gradients in another order.
    model, method = opened.model.eval().requires_grad_(False), opened.method
    done = run.folder.path / "evaluations"
    plugins = [make_evaluator(p) for p in run.spec.evaluators]
    run.know(evaluate=tuple(p for e in plugins for p in e.work(run.spec, data)))
    with run.phase("evaluate"):
        subject = Evaluated.of(run, opened, data)
        for point in method.points():
            with method.at(model, point):
                for plugin in run.spec.evaluators:
                    path = done / f"{evaluation_stem(plugin.name, point.name)}.json"
                    result = _read_result(run, path)
                    if result is None:
                        result = _run_one(run, subject, plugin, point)
                        run.folder.write_json(f"evaluations/{path.name}", asdict(result))
                    run.add(result.metrics)
                    for note in result.notes:
                        if note not in run.so_far().notes:  # it may hold at every point
                            run.note(note)
                    run.events.append("evaluated", name=path.stem)
                count_cost(run, subject.costs[point], point, storage_bytes(model))


def _read_result(run: Run, path: Path) -> Result | None:
    if not path.exists():
        return None
    values = run.folder.read_json(f"evaluations/{path.name}")
    return Result(
        [Metric(**m) for m in values["metrics"]],
        [Outcomes(**o) for o in values["outcomes"]],
        values.get("notes", []),
    )


def _run_one(run: Run, evaluated: Evaluated, plugin: Plugin, point: Point) -> Result:
    place = run.folder.path / "evaluations"

    def path(point: Point, end: str) -> Path:
        return place / f"{evaluation_stem(plugin.name, point.name)}.{end}"

    def journal(point: Point, name: str, items: Sequence[str]) -> Journal:
        return Journal(path(point, f"{name}.items"), items)

    opened = evaluated.opened
    points = opened.method.points()
    later = points[points.index(point) + 1 :][: POINTS_AT_ONCE - 1]
    subject = Subject(
        model=opened.model,
        method=opened.method,
        point=point,
        data=evaluated.data,
        device=run.device,
        seed=run.spec.seed,
        pad_token_id=run.tokenizer.pad_token_id or 0,
        progress=lambda what, n, of: run.progress.bar(f"{what} {point}".strip(), n, of),
        tokenizer=evaluated.data.tokenizer,
        shape=evaluated.shape,
        dtype=run.spec.hardware.dtype,
        used=evaluated.used[point],
        cost=evaluated.costs[point],
        whole=evaluated.whole,
        machine=run.job.runtime.machine,
        journal=partial(journal, point),
        beside={p: partial(journal, p) for p in later},
        keep=lambda name, rows: _write_rows(run, path(point, f"{name}.jsonl").name, rows),
        load_model=partial(load_frozen, run),
        others=run.spec.others,
        load_base=partial(load_base, run),
        base_bytes=opened.base_bytes,
        job=plain(run.job),
    )
    result: Result = make_evaluator(plugin).run(subject)
    headline = ", ".join(f"{m.name} {m.value:.4g}" for m in result.metrics[:2])
    run.progress.say(f"{plugin.name} {point}: {headline}".replace(" :", ":"))
    return result


def _write_rows(run: Run, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    run.folder.write_text(f"evaluations/{name}", lines)


def count_cost(run: Run, cost: Cost, point: Point, held: int | None = None) -> None:
    """Count what a model needs at an operating point, from shapes.

    Args:
        run: Where it goes.
        cost: What the model needs.
        point: The operating point.
        held: Bytes of the weights in memory, where there is a model.
    """
    run.count("params", cost.params, "parameters", point.name)
    if held is not None:
        run.count("weight_bytes", held, "bytes", point.name)
    if not cost.per_token:
        return
    run.count("bytes_per_token", cost.bytes_per_token, "bytes/token", point.name)
    run.count("flops_per_token", cost.flops_per_token, "FLOP/token", point.name)
    run.count("kv_bytes_per_token", cost.kv_bytes_per_token, "bytes/token", point.name)
    if cost.kv_bytes_per_sequence:
        run.count("kv_bytes_per_sequence", cost.kv_bytes_per_sequence, "bytes", point.name)
