"""Multiple choice on SmolLM2-135M: items a second, and the share of the matrix ceiling."""

from __future__ import annotations

from gpu_stage import Row, Stage

SECONDS = 120
TASKS = ("piqa", "arc_easy")


def run(stage: Stage) -> None:
    """Evaluate the untouched model; its evaluation phase is what is timed."""
    words = ["hardware=cuda", "evaluator=choices", "evaluator.choices.batch_tokens=16384"]
    words += [f"evaluator.choices.tasks=[{','.join(TASKS)}]"]
    if stage.tiny:
        words = [*stage.model, "dataset=arithmetic", "evaluator=choices", "dataset.limit.test=24"]
    record = stage.effbench("eval", *words)
    name = "accuracy" if stage.tiny else "acc"
    items = 0
    for task in ("",) if stage.tiny else TASKS:
        found = next(m for m in record.metrics if m.name == name and (m.task or "") == task)
        items += found.n
        stage.note(Row(f"{name} {task}".strip(), found.value, key=record.key))
    seconds = next(
        m.value for m in record.metrics if (m.name, m.phase) == ("phase_seconds", "evaluate")
    )
    stage.note(Row("items a second, tokenising included", items / seconds, "/s", key=record.key))
