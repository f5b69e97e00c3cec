"""Shapes of models that are no plain Llamas: surveyed once, kept by what their config says.

A survey needs transformers and torch, which the commands before and after a run do without. Where
they are not loaded, a process of its own makes it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from effbench.api.schema import digest
from effbench.api.shape import ModelShape
from effbench.models.written import KIND, decoded, encoded
from effbench.nn.model_kinds.base import ModelKind
from effbench.util.cache import cache_dir
from effbench.util.errors import UserError
from effbench.util.files import write_atomic
from effbench.util.seals import sealed, unsealed
from effbench.util.wrap import write

FORM = 4
"""Raised when a survey finds something else, or is written down in another way."""
NO_MATTER = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""What a config says that changes nothing in a shape."""


def counted(config: Mapping[str, Any], where: str, kind: ModelKind | None = None) -> ModelShape:
    """Return the shape of a model of transformers from its config alone.

    Args:
        config: As in `config.json`.
        where: What it is of, for messages.
        kind: Of model; None for a causal one.

    Raises:
        UserError: When transformers has no such model, or it cannot be counted.
    """
    values = {k: v for k, v in config.items() if k not in NO_MATTER}
    if kind:
        values[KIND] = kind.name
    path = cache_dir() / "shapes" / f"{digest([FORM, version('transformers'), values], 32)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, UserError):
        return decoded(json.loads(unsealed(path.read_text(), path.name)))
    if path in _unkept:
        return _unkept[path]
    try:
        found = surveyed(values) if "torch" in sys.modules else _elsewhere(values, where)
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.hint) from None
    try:
        write_atomic(path, sealed(json.dumps(encoded(found)), path.name))
    except (OSError, UserError):  # the next process finds it again
        _unkept[path] = found
    return found


_unkept: dict[Path, ModelShape] = {}
"""What was found and could not be written down, by where it would stand."""


def surveyed(config: Mapping[str, Any]) -> ModelShape:
    """Return a shape surveyed in this process."""
    from effbench.models.survey import empty_model, survey

    values = dict(config)
    return survey(empty_model(values, values.pop(KIND, "")))


def _elsewhere(config: Mapping[str, Any], where: str) -> ModelShape:
    """Return a shape surveyed in another process, which takes seconds."""
    if sys.stderr.isatty():
        write(f"Counting the parts of {where} …")
    command = [sys.executable, "-P", "-m", "effbench.models.survey"]
    text = json.dumps(config)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise RuntimeError(f"the survey of a model ended with {done.stderr}") from None
    if "message" in answer:
        raise UserError(answer["message"], answer["hint"])
    return decoded(answer)
