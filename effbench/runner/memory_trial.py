"""One trial of a memory cap: `python -m effbench.runner.memory_trial`.

The work comes on standard input. It loads the model of a run, caps the memory of its own process
first, and decodes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from effbench.api.points import find_point
from effbench.api.schema import build
from effbench.api.spec import Job
from effbench.evaluators.memory_cap import OUT_OF_MEMORY, cap_here
from effbench.nn.decode.native import most_likely
from effbench.results.store import Store
from effbench.runner.signals import end_with_parent
from effbench.util.errors import ran_out_of_memory


def main() -> int:
    """Run the trial on standard input and return the exit status."""
    work = json.loads(sys.stdin.read())
    try:
        decode(work)
    except (MemoryError, RuntimeError, OSError) as error:
        if ran_out_of_memory(error):
            return OUT_OF_MEMORY
        raise
    return 0


def decode(work: dict[str, Any]) -> None:
    """Load what the run evaluates, under the cap, and decode at the operating point."""
    job = build(Job, work["job"], "job")

    import torch

    from effbench.evaluators.memory import random_tokens
    from effbench.runner.open import evaluated

    store = Store(Path(job.runtime.results))
    if job.spec.hardware.threads:
        torch.set_num_threads(job.spec.hardware.threads)
    cap_here(work["cap"], work["device"])
    with TemporaryDirectory() as scratch:
        opened = evaluated(job, store, Path(scratch))
    model, method = opened.model, opened.method
    prompt = random_tokens(model, work["seed"], work["batch_size"], work["prompt_tokens"])
    point = find_point(method.points(), work["point"], method.name)
    with torch.inference_mode(), method.at(model, point):
        session = method.session(model, point)
        token = most_likely(session.prefill(prompt.to(work["device"])))[:, None]
        for _ in range(work["new_tokens"]):
            token = most_likely(session.step(token))[:, None]


if __name__ == "__main__":
    end_with_parent()
    status = main()
    sys.stderr.flush()
    os._exit(status)  # a library that cannot allocate at exit must not change the answer
