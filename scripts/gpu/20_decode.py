"""Decoding at 7B shape in bfloat16: our CUDA graph beside `generate`, and a batch of 16."""

from __future__ import annotations

from gpu_stage import Stage

SECONDS = 150


def run(stage: Stage) -> None:
    """Time single sequences against transformers' own loop, then batches alone."""
    words = [*stage.model, "dataset=arithmetic", "evaluator=speed", *probe(stage)]
    new = stage.size(64, 8)
    with stage.part("one sequence"):
        record = stage.effbench(
            *("eval", *words, f"evaluator.speed.new_tokens={new}"),
            *("evaluator.speed.repeats=5", "evaluator.speed.baseline=generate"),
        )
        reach = {} if stage.tiny else {"at_least": 0.75}
        stage.metric("MBU, share of probed bytes/s", record, "mbu@decode", **reach)
        stage.metric("decode", record, "decode_tokens_per_second@decode")
        stage.metric("time per token", record, "tpot_ms@decode")
        stage.metric("times as fast as generate", record, "decode_speedup@decode")
        stage.metric("time to first token", record, "ttft_ms@prefill")
        stage.metric("probed GEMM", record, "ceiling_gemm@roofline")
        stage.metric("probed matrix-vector products", record, "ceiling_gemv@roofline")
        stage.metric("probed copy", record, "ceiling_copy@roofline")
    with stage.part("batches"):
        prompt, batch = stage.size(1024, 32), stage.size(16, 4)
        record = stage.effbench(
            *("eval", *words, f"evaluator.speed.batch_sizes={batch}", "evaluator.speed.repeats=3"),
            *(f"evaluator.speed.prompt_tokens={prompt}", f"evaluator.speed.new_tokens={new}"),
        )
        what = f"batch {batch}, prompt {prompt}"
        stage.metric(f"{what}: decode", record, "decode_tokens_per_second@decode")
        stage.metric(f"{what}: MBU", record, "mbu@decode")
        stage.metric(f"{what}: MFU of prefill", record, "mfu@prefill")


def probe(stage: Stage) -> list[str]:
    """Return words that keep the probe of the ceilings small in a rehearsal."""
    small = ["evaluator.speed.probe_mb=1", "evaluator.speed.probe_side=128"]
    return small if stage.tiny else ["evaluator.speed.probe_mb=2048"]
