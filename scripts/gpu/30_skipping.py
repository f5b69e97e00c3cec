"""Decoding at 7B shape with fewer layers: depths, and LoRA-Drop p = 0.5, k = 3, as graphs."""

from __future__ import annotations

from gpu_stage import Row, Stage

SECONDS = 120


def run(stage: Stage) -> None:
    """Time each beside the whole model in the same engine."""
    words = ["evaluator=speed", "evaluator.speed.repeats=3", "evaluator.speed.roofline=false"]
    words += [f"evaluator.speed.new_tokens={stage.size(48, 8)}"]
    with stage.part("depths"):
        depths = stage.size(16, 2), stage.size(32, 4)
        record = stage.effbench(
            *("eval", "method=depths", f"method.eval_depths=[{depths[0]},{depths[1]}]"),
            *(*stage.model, "dataset=arithmetic", *words),
        )
        half, whole = (_rate(record, f"d{n}") for n in depths)
        bound = _read(record, f"d{depths[1]}") / _read(record, f"d{depths[0]}")
        _note(stage, f"depth {depths[0]} of {depths[1]}", half / whole, bound, record.key)
    with stage.part("LoRA-Drop"):
        record = stage.effbench(
            *("train", "method=lora_drop", "method.windows=[0,3]", "train.max_steps=1"),
            *("train.batch_size=1", *stage.model, *stage.prose(), *words),
            "evaluator.speed.baseline=whole",
        )
        ceiling = stage.metric("LoRA-Drop: ceiling by bytes", record, "speed_ceiling@decode/k3")
        found = stage.metric("LoRA-Drop: times as fast", record, "decode_speedup@decode/k3")
        stage.metric("LoRA-Drop: a dropped token", record, "tpot_drop_ms@decode/k3")
        stage.metric("LoRA-Drop: a refreshing token", record, "tpot_refresh_ms@decode/k3")
        stage.note(Row("LoRA-Drop: share of its ceiling", found / ceiling, at_least=_goal(stage)))


def _goal(stage: Stage) -> float | None:
    return None if stage.tiny else 0.85


def _rate(record: object, point: str) -> float:
    return _value(record, "decode_tokens_per_second", point)


def _read(record: object, point: str) -> float:
    return _value(record, "bytes_per_token", point)


def _value(record: object, name: str, point: str) -> float:
    metrics = record.metrics  # type: ignore[attr-defined]
    return next(float(m.value) for m in metrics if (m.name, m.point) == (name, point))


def _note(stage: Stage, what: str, found: float, bound: float, key: str) -> None:
    stage.note(Row(f"{what}: times as fast", found, key=key))
    stage.note(Row(f"{what}: share of its ceiling", found / bound, at_least=_goal(stage)))
