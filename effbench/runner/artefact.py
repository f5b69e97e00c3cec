"""What a run made: saved, noted, loaded again."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from effbench.api.schema import plain
from effbench.resources.usage import Taken
from effbench.results.records import Metric
from effbench.runner.run import Bench


def save_artefact(bench: Bench, model: torch.nn.Module) -> None:
    """Write the artefact so that it is there whole or not at all."""
    from effbench.util.files import replace_folder, scratch_folder

    with scratch_folder(bench.folder.path, "artefact") as new:
        bench.method.save(model, new)
        (new / "method.json").write_text(json.dumps(plain(bench.spec.method), indent=1))
        replace_folder(new, bench.folder.artefact)
    size = sum(f.stat().st_size for f in bench.folder.artefact.rglob("*") if f.is_file())
    bench.count("artefact_bytes", size, "bytes")


def note_made(bench: Bench) -> None:
    """Remember that the artefact is whole, with what was found out while making it."""
    facts = {
        "metrics": [vars(m) for m in bench.metrics],
        "notes": bench.notes,
        "took": {name: asdict(t) for name, t in bench.took.items()},
    }
    bench.folder.write_json("made.json", facts)


def load_made(bench: Bench, model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the base `model` turned into what an interrupted run had made; None if nothing yet."""
    facts = bench.folder.read_json("made.json")
    if facts is None:
        return None
    bench.metrics = [Metric(**m) for m in facts["metrics"]]
    bench.notes = facts["notes"]
    bench.took |= {name: Taken(**t) for name, t in facts["took"].items()}
    return bench.method.load(model, bench.folder.artefact, bench.context())
