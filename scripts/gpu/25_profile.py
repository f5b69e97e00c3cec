"""Where a decoding step goes at 7B shape, one sequence: our kernels beside cuBLAS."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from gpu_stage import Row, Stage

SECONDS = 90
STEPS = 40
PROFILED = 3
"""Steps whose kernels are watched."""


def run(stage: Stage) -> None:
    """Time steps made in either way, then watch their kernels; all of them go to the log."""
    import torch

    from effbench.config.compose import compose
    from effbench.models.load import load
    from effbench.nn.decode import cuda_graph
    from effbench.nn.decode.pointwise import fused

    spec = compose("eval", [*stage.model, "dataset=arithmetic"]).spec
    device, dtype = spec.hardware.device, getattr(torch, spec.hardware.dtype)
    model = load(spec.model, device=device, dtype=dtype, tokenizer=False).model.eval()
    prompt = torch.randint(4, 500, (1, stage.size(128, 16)), device=device)
    ours = cuda_graph.compiled
    ways: dict[str, Callable[[int], Any]] = {
        "ours": ours,
        "cuBLAS": lambda rows: fused(torch.compile),
    }
    for name, way in ways.items():
        with stage.part(name), torch.inference_mode():
            cuda_graph.compiled = way  # type: ignore[assignment]
            _watched(stage, name, model.requires_grad_(False), prompt)
    cuda_graph.compiled = ours


def _watched(stage: Stage, name: str, model: Any, prompt: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    from effbench.nn.decode.static import StaticSession
    from effbench.resources.timing import Clock

    session, clock = StaticSession(model), Clock(prompt.device)
    session.reserve(1, prompt.shape[1] + STEPS + PROFILED, prompt.shape[1])
    token, times = session.prefill(prompt).argmax(-1, keepdim=True), []
    for _ in range(STEPS):
        start = clock.now()
        token = session.step(token).argmax(-1, keepdim=True)
        times.append(clock.now() - start)
    stage.note(Row(f"{name}: a step", 1e3 * median(times), "ms"))
    activities = [ProfilerActivity.CPU, *([] if stage.tiny else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as watched:
        for _ in range(PROFILED):
            session.step(token)
        clock.now()
    found = watched.key_averages()
    by = "self_cpu_time_total" if stage.tiny else "self_device_time_total"
    print(found.table(sort_by=by, row_limit=20, max_name_column_width=60))
    total = sum(getattr(event, by) for event in found) / PROFILED
    stage.note(Row(f"{name}: its kernels", total / 1e3, "ms"))
    for event in sorted(found, key=lambda e: -getattr(e, by))[:4]:
        share = getattr(event, by) / PROFILED / 1e3
        stage.note(
            Row(f"{name}: {event.key[:40]}", share, "ms", note=f"{event.count // PROFILED} calls")
        )
