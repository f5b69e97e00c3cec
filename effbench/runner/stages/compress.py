"""Compression: part by part, each part a resume point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from effbench.api.batch import Batch, collate
from effbench.api.examples import Example
from effbench.api.footprint import Pass
from effbench.methods.compresses import Compresses
from effbench.nn.llama.weights import read_tensors, save_tensors
from effbench.results.store import RunFolder
from effbench.runner.artefact import load_made, note_made, save_artefact
from effbench.runner.evaluation import evaluate
from effbench.runner.open import context, open_data, open_model
from effbench.runner.programs import run_program
from effbench.runner.run import Run, count_model, count_trained, hold_against_plan
from effbench.runner.signals import stop_signal
from effbench.util.c_library import give_back
from effbench.util.errors import StoppedError


class Parts:
    """Finished parts of a compression, on disk, by name."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def read(self, name: str, device: torch.device) -> dict[str, torch.Tensor] | None:
        """Return a finished part, None when it is not there."""
        place = self._place(name)
        if not (self.run.path / place).exists():
            return None
        path = self.run.check(place, hint="Delete it: the same command then makes it again.")
        return {n: t.to(device) for n, t in read_tensors(path).items()}

    def add(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep a finished part."""
        with self.run.writing(self._place(name)) as path:
            save_tensors(tensors, path)

    def _place(self, name: str) -> str:
        return f"parts/{name}.safetensors"


def perform(run: Run) -> None:
    """Compress, save and evaluate.

    Raises:
        StoppedError: After Ctrl-C or a termination signal; finished parts are kept.
    """
    data = open_data(run)
    opened = open_model(run)
    method = opened.method
    assert isinstance(method, Compresses)
    model = opened.model.requires_grad_(False).eval()
    made = load_made(run, method, model)
    if made is None:
        run.events.cut()
        rows = _calibration(run, method, data.examples("train"))
        passes = {Pass("score", 1, batch.input_ids.shape[1], 1) for batch in rows}
        run.know(calibrate=tuple(passes), lengths=0)
        with run.phase("compress"):
            _parts(run, method, model, rows)
        count_model(run, model)
        count_trained(run, model)
        save_artefact(run, method, model)
        note_made(run)
    evaluate(run, replace(opened, model=made or model), data)
    hold_against_plan(run, opened.base, opened.base_bytes)


def _calibration(run: Run, method: Compresses, examples: Sequence[Example]) -> list[Batch]:
    pad = run.tokenizer.pad_token_id
    rows = method.calibration_rows(len(examples), run.spec.seed)
    return [collate([examples[row]], pad).to(run.device) for row in rows]


def _parts(
    run: Run, method: Compresses, model: torch.nn.Module, calibration: Sequence[Batch]
) -> None:
    """Make every part that is not finished yet, and put all of them in place, in order."""
    finished = Parts(run.folder)
    total = method.num_parts(model, calibration)
    ctx = context(run)
    parts = method.compress(model, calibration, ctx)
    known = {event["name"] for event in run.events.so_far() if event["event"] == "part"}
    with stop_signal() as stop:
        ctx.program = partial(
            run_program,
            environment={"OMP_NUM_THREADS": str(torch.get_num_threads())},
            stop=lambda: stop.requested,
            show=partial(run.progress.bar, "part", 0, total),
        )
        for done, part in enumerate(parts, 1):
            tensors = finished.read(part.name, run.device)
            if tensors is None:
                tensors = part.make()
                finished.add(part.name, tensors)
            if part.name not in known:
                run.events.append("part", name=part.name)
            part.put(tensors)
            del tensors
            give_back()
            run.progress.bar("part", done, total, part.name)
            if stop.requested:
                raise StoppedError(f"part {part.name}")
