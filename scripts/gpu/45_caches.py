"""Caches and states at 7B shape beside the dense cache: decoding and memory after a long prompt."""

from __future__ import annotations

from functools import partial
from typing import Any

from gpu_stage import Row, Stage

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
    with stage.part("products of states"):
        _products(stage, prompt)


def _note(stage: Stage, what: str, words: list[str]) -> None:
    record = stage.effbench(*words)
    stage.metric(f"{what}: decoding, times as fast as dense", record, "decode_speedup@decode")
    stage.metric(f"{what}: memory of dense over own", record, "memory_gain@decode")
    stage.metric(f"{what}: cache", record, "kv_bytes@decode")


def _products(stage: Stage, prompt: int) -> None:
    """Note how Triton's products of one layer of 7B shape compare with torch's, timed in turn."""
    import torch

    from effbench.nn.linear_attention import attention, decay, products
    from effbench.resources.timing import Clock, interleaved

    device, heads = "cpu" if stage.tiny else "cuda", stage.size(32, 2)
    for batch in (1, stage.size(16, 2)):
        sizes = (batch, heads, prompt, stage.size(128, 16))
        with torch.inference_mode():
            q, k, v = (torch.rand(sizes, device=device) for _ in range(3))
            of = q[:, :, None], k, v, decay.head_decays(heads).to(device)
            one = (*(t[..., -1:, :].contiguous() for t in of[:3]), of[3])
            _, state = products.chunked(*of)
            ours = attention.forms(q.device, q.dtype)
            if not stage.tiny and ours.__name__ == products.__name__:
                raise RuntimeError("Triton's products are not taken")
            for what, (own, other) in {
                "steps": [partial(_steps, form, one, state) for form in (ours, products)],
                "a prompt": [partial(form.chunked, *of) for form in (ours, products)],
            }.items():
                found = interleaved(own, other, 10, clock=Clock(device))
                what = f"linear attention, {what} at batch {batch}"
                stage.note(Row(f"{what}: times as fast as torch", found.speedup.value))


def _steps(form: Any, of: tuple[Any, ...], state: Any) -> None:
    """Make as many steps as hide what waiting for the device takes."""
    for _ in range(20):
        _, state = form.step(*of, state)
