"""What a run made: saved, noted, loaded again."""

from __future__ import annotations

import json
from typing import Any

import torch

from effbench.api.schema import build, plain
from effbench.methods.base import Method
from effbench.resources.predict import Workload
from effbench.results.store import ARTEFACT
from effbench.runner.open import context
from effbench.runner.run import Run
from effbench.util.files import replace_folder, scratch_folder


def save_artefact(run: Run, method: Method, model: torch.nn.Module) -> None:
    """Write the artefact so that it is there whole or not at all."""
    with scratch_folder(run.folder.path, "artefact") as new:
        method.save(model, new)
        (new / "method.json").write_text(json.dumps(plain(run.spec.method), indent=1))
        for file in sorted(p for p in new.rglob("*") if p.is_file()):
            run.folder.manifest.announce(f"{ARTEFACT}/{file.relative_to(new).as_posix()}", file)
        replace_folder(new, run.folder.artefact)
    size = sum(f.stat().st_size for f in run.folder.artefact.rglob("*") if f.is_file())
    run.count("artefact_bytes", size, "bytes")


def note_made(run: Run, **facts: Any) -> None:
    """Remember that the artefact is whole, the batches that it was made with, and more facts."""
    run.events.append("made", workload=plain(run.workload), **facts)


def load_made(run: Run, method: Method, model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the base `model` turned into what an interrupted run had made; None if nothing yet."""
    place = run.events.after("made")
    if place is None:
        return None
    run.events.cut(place)
    made = [event for event in run.events.so_far() if event["event"] == "made"][-1]
    if made.get("workload"):
        run.workload = build(Workload, made["workload"], "workload")
    return method.load(model, run.folder.check_artefact(whole=True), context(run))
