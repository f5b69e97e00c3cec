"""Whether a piece of decoding succeeds under a cap on memory, tried in a process of its own.

On a CPU the cap is on the process's data (`RLIMIT_DATA` of setrlimit(2): heap and private writable
mappings, not the pages of files or the code of libraries). On CUDA it is the share of the device
that torch's allocator may use.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from effbench.util.errors import UserError, says_out_of_memory

OUT_OF_MEMORY = 97
"""Exit status of a trial that ran out of memory."""

NO_THREAD = ("can't start new thread", "resource temporarily unavailable")
"""How Python and Rust say that a thread could not be had: under a cap, for want of its stack."""


def succeeds_under(cap: int, work: Mapping[str, Any], device: str) -> bool:
    """Return whether `work` succeeds with at most `cap` bytes.

    Args:
        cap: Bytes.
        work: What `effbench.runner.memory_trial` reads: the job, the operating point and the sizes.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: When the trial fails for another reason than memory.
    """
    text = json.dumps({"cap": cap, "device": device, **work})
    done = subprocess.run(
        [sys.executable, "-P", "-m", "effbench.runner.memory_trial"],
        input=text,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return True
    if done.returncode == OUT_OF_MEMORY or _speaks_of_memory(done.stderr):
        return False
    last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    raise UserError(f"A trial of the smallest cap failed, and not for memory: {last}")


def _speaks_of_memory(text: str) -> bool:
    return says_out_of_memory(text) or any(sign in text.lower() for sign in NO_THREAD)


def cap_here(cap: int, device: str) -> None:
    """Cap the memory of this process from now on.

    Raises:
        UserError: When the system has no such cap.
    """
    if device.startswith("cuda"):
        import torch

        total = torch.cuda.get_device_properties(torch.device(device)).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), torch.device(device))
        return
    if sys.platform != "linux":
        raise UserError(
            "evaluator.memory.smallest_cap caps memory with RLIMIT_DATA, which only Linux heeds.",
            "Leave it out.",
        )
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
