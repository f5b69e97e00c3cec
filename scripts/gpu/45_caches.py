"""Caches and states at 7B shape beside the dense cache: decoding and memory after a long prompt."""

from __future__ import annotations

from gpu_stage import Stage

SECONDS = 120
POLICIES = ("kv_quant", "streaming", "snapkv")
"""Methods that need no training."""


def run(stage: Stage) -> None:
    """Time each in turn with the dense cache; linear attention after one step of training."""
    prompt, new = stage.size(2048, 32), stage.size(32, 8)
    words = ["evaluator=speed", "evaluator.speed.baseline=dense", "evaluator.speed.roofline=false"]
    words += [f"evaluator.speed.prompt_tokens={prompt}", f"evaluator.speed.new_tokens={new}"]
    words += [f"evaluator.speed.batch_sizes={stage.size(4, 2)}", "evaluator.speed.repeats=6"]
    for method in POLICIES:
        with stage.part(method):
            found = ["eval", f"method={method}", *stage.model, "dataset=arithmetic", *words]
            _note(stage, method, found)
    with stage.part("linear attention"):
        trained = ["train", "method=dijiang", "method.trains=converted", "train.max_steps=1"]
        trained += ["method.count=2", "train.batch_size=1", *stage.model, *stage.prose()]
        _note(stage, "dijiang, two layers", [*trained, *words])


def _note(stage: Stage, what: str, words: list[str]) -> None:
    record = stage.effbench(*words)
    stage.metric(f"{what}: decoding, times as fast as dense", record, "decode_speedup@decode")
    stage.metric(f"{what}: memory of dense over own", record, "memory_gain@decode")
    stage.metric(f"{what}: cache", record, "kv_bytes@decode")
