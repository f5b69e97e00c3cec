"""Training at 7B shape: peaks against the plan, steps, and QDyLoRA's step beside QLoRA's."""

from __future__ import annotations

from gpu_stage import Row, Stage

SECONDS = 200
LAYERS = 8
"""Of full fine-tuning, whose float32 weights, gradients and moments leave no room for 32."""


def run(stage: Stage) -> None:
    """Train a few steps with each method; the peak is to be within 10 % of the prediction."""
    words = [*stage.model, *stage.prose(), f"train.batch_size={stage.size(4, 2)}"]
    words += [f"train.max_steps={stage.size(12, 2)}"]
    steps: dict[str, float] = {}
    for method in ("qlora", "qdylora", "lora", "full"):
        with stage.part(method):
            evaluated = "evaluator=[memory]" if method != "full" else "evaluator=[]"
            own = [f"model.shape.num_layers={LAYERS}"] if _cut(stage, method) else []
            own += ["method.eval_ranks=[16]"] if method == "qdylora" else []
            record = stage.effbench("train", f"method={method}", *words, evaluated, *own)
            name = f"{method} of {LAYERS} layers" if _cut(stage, method) else method
            steps[method] = stage.metric(f"{name}: step", record, "step_seconds@train")
            stage.metric(f"{name}: tokens", record, "train_tokens_per_second@train")
            stage.metric(f"{name}: peak", record, "peak_bytes@train")
            reach = {} if stage.tiny else {"at_least": -0.1, "at_most": 0.1}
            stage.metric(f"{name}: predicted peak, error", record, "plan_error@train", **reach)
            if method != "full":
                stage.metric(f"{name}: decode peak, error", record, "plan_error@decode", **reach)
    if {"qlora", "qdylora"} <= steps.keys():
        ratio = steps["qdylora"] / steps["qlora"]
        at_most = None if stage.tiny else 1.05
        stage.note(Row("QDyLoRA's step / QLoRA's", ratio, at_most=at_most))


def _cut(stage: Stage, method: str) -> bool:
    return method == "full" and not stage.tiny
