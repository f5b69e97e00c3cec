"""Compression: part by part, each part a resume point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from effbench.datasets import Example
from effbench.errors import StoppedError
from effbench.files import atomic_path
from effbench.footprint import Pass
from effbench.methods.base import CALIBRATION_ROWS, Batch
from effbench.nn.state import read_tensors
from effbench.stages.common import (
    Bench,
    as_batch,
    count_model,
    count_trained,
    evaluate,
    load_made,
    note_made,
    open_data,
    open_model,
    save_artefact,
)
from effbench.stages.train import stop_signal


class Parts(Mapping[str, Mapping[str, torch.Tensor]]):
    """Finished parts of a compression, on disk, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __getitem__(self, name: str) -> Mapping[str, torch.Tensor]:
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            raise KeyError(name)
        return read_tensors(path)

    def __iter__(self) -> Iterator[str]:
        return (p.name.removesuffix(".safetensors") for p in self.folder.glob("*.safetensors"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def add(self, name: str, part: torch.nn.Module) -> None:
        """Keep a finished part."""
        tensors = {n: t.contiguous().cpu() for n, t in part.state_dict().items()}
        with atomic_path(self.folder / f"{name}.safetensors") as place:
            save_file(tensors, place)


def compress(bench: Bench) -> None:
    """Compress, save and evaluate.

    Raises:
        StoppedError: After Ctrl-C or a termination signal; finished parts are kept.
    """
    data = open_data(bench)
    model = open_model(bench).requires_grad_(False).eval()
    made = load_made(bench, model)
    if made is None:
        rows = _calibration(bench, data.examples("train"))
        passes = {Pass("score", 1, batch.input_ids.shape[1], 1) for batch in rows}
        bench.know(calibrate=tuple(passes), lengths=0)
        with bench.phase("compress"):
            _parts(bench, model, rows)
        count_model(bench, model)
        count_trained(bench, model)
        save_artefact(bench, model)
        note_made(bench)
    evaluate(bench, made or model, data)


def _calibration(bench: Bench, examples: Sequence[Example]) -> list[Batch]:
    pad = bench.tokenizer.pad_token_id
    return [as_batch(e, pad).to(bench.device) for e in examples[:CALIBRATION_ROWS]]


def _parts(bench: Bench, model: torch.nn.Module, calibration: list[Batch]) -> None:
    ctx = bench.context()
    parts = Parts(bench.folder.path / "parts")
    ctx.finished = parts
    before = set(parts)
    with stop_signal() as stop:
        for done, (name, part) in enumerate(bench.method.compress(model, calibration, ctx), 1):
            if name not in before:
                parts.add(name, part)
                bench.events.append("part", name=name)
            bench.progress.count("part", done, name)
            if stop.requested:
                raise StoppedError(f"part {name}")
