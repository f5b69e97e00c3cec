"""A program of somebody else's, in an environment of its own: a folder in, a folder out.

Our own door, after no paper: what compresses the model is a command. `{input}` in it is a folder
with the model and its tokenizer as transformers saves them; it is expected to leave the same model
with other weights in `{output}`, which is not there before. `{rows}` is a file with the calibration
rows, a JSON object {"input_ids": [...]} a line, and `{seed}` the seed of the run.

    w' = what {output} has for each weight w, in the compute dtype

Names and shapes of the weights must be the same: it is for what leaves the model dense, such as
simulated quantisation, merging or a search of weights. The bytes that {output} takes are counted
beside (`program_bytes`); what it says of its own packed weights is not believed.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from effbench.api.batch import Batch
from effbench.api.keys import WHOLE
from effbench.api.method_types import Context, ProgramUsage
from effbench.api.schema import digest
from effbench.api.shape import Anatomy, AnyShape, ModelShape
from effbench.methods.compresses import DrawsRows, Part
from effbench.nn.llama import folders
from effbench.nn.pruning import plain
from effbench.util.errors import UserError
from effbench.util.files import scratch_folder, tree_bytes
from effbench.util.hashes import hash_of
from effbench.util.lazy import torch

TOOK = "program"
"""Name of the tensor that tells what the program took; no weight is named so."""
PLACES = ("{input}", "{output}", "{rows}")
SEED = "{seed}"


@dataclass(frozen=True)
class External(DrawsRows):
    """Has a command change the weights."""

    anatomy: ClassVar[Anatomy] = "other"
    needs: ClassVar[dict[str, Any]] = {"command": "cp -r {input} {output}"}

    command: str = ""
    """The program and its arguments, without a shell; `{input}` and `{output}` stand in it, and
    `{rows}` and `{seed}` may."""
    fingerprint: str = ""
    """Hash of the files that the command names and of the packages beside its program; filled in
    when the config is composed."""

    def sealed(self) -> Self:
        """Return itself with the identity of the program."""
        words = self._words()
        if self.draw and not self.calibrates:
            raise UserError(
                "method.draw=true draws calibration rows, and method.command takes none.",
                "Say in it where {rows} goes, or leave method.draw out.",
            )
        program = shutil.which(words[0])
        if program is None:
            raise UserError(
                f"method.command begins with {words[0]}, which is no program here.",
                "Give its path, such as /path/to/venv/bin/python.",
            )
        files = [Path(program), *(p for word in words[1:] if (p := Path(word)).is_file())]
        hashes = [hash_of(path) for path in files]
        found = {"packages": packages_beside(Path(program)), "files": hashes}
        return replace(self, fingerprint=digest(found, WHOLE))

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse a model that no class of transformers holds as it is."""
        model = ModelShape.of(shape)
        cut = model.family == "llama" and not model.uniform
        if cut or model.kv_bytes_per_sequence(4):
            raise UserError(
                "What became of this model fits no class of transformers, and so no folder.",
                "Compress it with method=external before that, or start from another run.",
            )
        return self

    def _words(self) -> list[str]:
        """Return the words of the command.

        Raises:
            UserError: When it lacks the places of input or output, or a quotation does not end.
        """
        hint = "Such as 'method.command=\"python quantise.py {input} {output}\"'."
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise UserError(f"method.command cannot be read: {error}.", hint) from None
        for place in PLACES[:2]:
            if not any(place in word for word in words[1:]):
                raise UserError(f"method.command does not say where {place} goes.", hint)
        return words

    @property
    def calibrates(self) -> bool:
        """It does where the command has `{rows}`."""
        return PLACES[2] in self.command

    def num_parts(self, model: torch.nn.Module, calibration: Sequence[Batch]) -> int:
        """Return 1: the program is run once."""
        return 1

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Run the program; what it made is kept, so that it is not run again."""
        make = partial(self._run, model, calibration, ctx)
        yield Part("program", make, partial(_put, model, ctx))

    def _run(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> dict[str, torch.Tensor]:
        """Return the weights that the program makes, and what it took.

        Raises:
            UserError: When it fails, or leaves no such model.
        """
        if self.fingerprint and self.sealed().fingerprint != self.fingerprint:
            raise UserError("The program of method.command has changed.", "Give the command again.")
        with scratch_folder(ctx.folder, "program") as scratch:
            places = dict(zip(PLACES, _places(scratch), strict=True))
            _write_model(model, ctx.tokenizer, Path(places["{input}"]))
            if self.calibrates:
                _write_rows(calibration, Path(places["{rows}"]))
            places[SEED] = str(ctx.seed)
            took = ctx.program([_filled(word, places) for word in self._words()])
            output = Path(places["{output}"])
            found = folders.read(output, model)
            return {**found, TOOK: _as_tensor(took, tree_bytes(output))}


def packages_beside(program: Path) -> list[str]:
    """Return the names with versions of the packages in a program's virtual environment, if any."""
    home = program.parent.parent
    if not (home / "pyvenv.cfg").is_file():
        return []
    return sorted(p.stem for p in home.glob("lib*/python*/site-packages/*.dist-info"))


def _places(scratch: Path) -> tuple[str, str, str]:
    """Return where the model, the result and the calibration rows lie."""
    return str(scratch / "input"), str(scratch / "output"), str(scratch / "rows.jsonl")


def _filled(word: str, places: Mapping[str, str]) -> str:
    for place, path in places.items():
        word = word.replace(place, path)
    return word


def _write_model(model: torch.nn.Module, tokenizer: Any, folder: Path) -> None:
    plain.write(plain.plain_model(model), folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write_rows(calibration: Sequence[Batch], path: Path) -> None:
    """Write calibration rows as lines of token ids, without padding."""
    rows = (b.input_ids[0][b.attention_mask[0].bool()].tolist() for b in calibration)
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))


def _as_tensor(took: ProgramUsage, size: int) -> torch.Tensor:
    numbers = [took.seconds, took.processor_seconds, float(took.peak_bytes), float(size)]
    return torch.tensor(numbers, dtype=torch.float64)


def _put(model: torch.nn.Module, ctx: Context, stored: Mapping[str, torch.Tensor]) -> None:
    """Put the weights into the model, and what the program took into the record."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(stored[name])
    seconds, processor, peak, size = stored[TOOK].tolist()
    ctx.measured("program_seconds", seconds, "s")
    ctx.measured("program_cpu_seconds", processor, "s")
    ctx.measured("program_peak_bytes", int(peak), "bytes")
    ctx.measured("program_bytes", int(size), "bytes")
