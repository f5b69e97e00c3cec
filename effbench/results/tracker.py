"""A copy of a run's events in wandb."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from effbench.api.schema import plain
from effbench.api.spec import Job
from effbench.util.errors import UserError
from effbench.util.wrap import write

PLACE = ("task", "split", "phase", "name", "point")
"""What the key of a metric is made of, in this order, where it has it."""
CURVES = ("step", "validation")
"""Events of a training step; all others are said once and belong into the summary."""


class Wandb:
    """Curves over training steps, and one number for each metric in the summary."""

    def __init__(self, job: Job, folder: Path) -> None:
        """Begin, or go on with, the wandb run of a job.

        Raises:
            UserError: When wandb is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise UserError("wandb is not installed.", "pip install 'effbench[wandb]'") from None
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to the makers of wandb
        spec = job.spec
        self._says = job.runtime.progress
        self._run = wandb.init(
            project="effbench",
            id=spec.key,
            name=spec.label,
            group=spec.label.rpartition(" seed ")[0],
            tags=[spec.stage, spec.method.name, spec.model.called, spec.dataset.called],
            config=plain(spec),
            dir=folder,
            resume="allow",
        )

    def log(self, kind: str, facts: dict[str, Any]) -> None:
        """Send an event."""
        if kind in CURVES:
            name = "train" if kind == "step" else kind
            numbers = {f"{name}/{k}": v for k, v in facts.items() if _is_number(v) and k != "step"}
            self._run.log(numbers, step=facts["step"])
        elif kind == "metric":
            self._run.summary["/".join(facts[p] for p in PLACE if facts[p])] = facts["value"]

    def finish(self) -> None:
        """End the run; one that is offline says how it is uploaded."""
        offline, place = self._run.settings.mode == "offline", self._run.settings.sync_dir
        self._run.finish()
        if offline and self._says:
            write(f"wandb is offline; to upload this run: wandb sync {place}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
