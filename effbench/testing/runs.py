"""Small runs of a method, and what a finished one left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest import mock

import torch

from effbench.api import registry
from effbench.api.plugins import make_method
from effbench.api.spec import Job
from effbench.config.compose import compose
from effbench.config.composed import settings_of
from effbench.methods.base import Method
from effbench.methods.chain import resolved
from effbench.methods.compresses import Part
from effbench.nn.llama.weights import read_tensors
from effbench.results.records import Record
from effbench.testing.bench import Bench, HardKill
from effbench.testing.kinds import compresses, method_class
from effbench.testing.models import tiny_shape
from effbench.util.errors import UserError

HARDWARE = ["hardware.device=cpu", "hardware.dtype=float32", "hardware.threads=1"]
SMALL = [
    "train.max_steps=4",
    "train.batch_size=2",
    "train.checkpoint_every=2",
    "+dataset.limit.train=16",
    "dataset.limit.test=8",
    *HARDWARE,
]
CHEAP = "evaluator=[perplexity]"


def every_evaluator(only: Callable[[Any], bool] = lambda cls: True) -> list[str]:
    """Return the overrides that choose evaluators, each with settings that take a moment."""
    chosen = [n for n in registry.names("evaluators") if only(registry.find("evaluators", n))]
    return [
        f"evaluator=[{','.join(chosen)}]",
        *(
            f"evaluator.{name}.{key}={json.dumps(value)}"
            for name in chosen
            for key, value in registry.find("evaluators", name).trial.items()
        ),
    ]


def overrides(name: str, **settings: Any) -> list[str]:
    """Return the overrides of a small run; dropout is on, so that random numbers are drawn."""
    cls = method_class(name)
    chosen = {**cls.needs, **settings}
    if "dropout" in {f.name for f in fields(cls)}:
        chosen.setdefault("dropout", 0.1)
    words = (f"method.{key}={json.dumps(value)}" for key, value in chosen.items())
    return [f"method={name}", *SMALL, *words]


def files_of(name: str) -> list[str]:
    """Return the words that choose what a small run is composed of, as all tests choose it.

    Hydra composes the same choice once in a process.
    """
    return ["model=tiny", "dataset=arithmetic", f"method={name}", CHEAP]


@dataclass
class Parts:
    """What a compression computes: its parts by name, and how often a module is run to make them.

    Passes in which a method `replays` rows through finished parts do not count.
    """

    made: list[str] = field(default_factory=list)
    passes: int = 0


@contextmanager
def counted(name: str, every: int = 0) -> Iterator[Parts]:
    """Count what compressions by a method compute meanwhile; of another method, nothing.

    Args:
        name: The method.
        every: Kill a compression before each so manieth part is made; 0 kills none.
    """
    cls, parts, making, kills = method_class(name), Parts(), False, 0

    def passed(*_: Any) -> None:
        parts.passes += making

    def watched(*arguments: Any) -> Iterator[Part]:
        nonlocal making
        making = not cls.replays
        try:
            for part in compress(*arguments):
                yield replace(part, make=partial(make, part))
        finally:
            making = False

    def make(part: Part) -> dict[str, torch.Tensor]:
        nonlocal making, kills
        if every and len(parts.made) == every * (kills + 1):
            kills += 1
            raise HardKill
        parts.made.append(part.name)
        making = True
        try:
            return part.make()
        finally:
            making = not cls.replays

    if not compresses(name):
        yield parts
        return
    compress = cls.compress
    hook = torch.nn.modules.module.register_module_forward_pre_hook(passed)
    with mock.patch.object(cls, "compress", watched):
        try:
            yield parts
        finally:
            hook.remove()


@dataclass
class Made:
    """A finished run of a method, and what its model gave just before it was saved."""

    bench: Bench
    job: Job
    record: Record
    logits: dict[str, str]
    parts: Parts = field(default_factory=Parts)

    @property
    def artefact(self) -> dict[str, bytes]:
        """The content of each file of the artefact."""
        return self.bench.artefact(self.job)

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return self.bench.losses(self.job)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the artefact by name."""
        files = sorted(self.bench.folder(self.job).artefact.rglob("*.safetensors"))
        return {name: t for path in files for name, t in read_tensors(path).items()}

    def reading(self, *evaluators: str) -> list[str]:
        """Return the words of an evaluation that goes on from the run."""
        words = [f"run.results={self.bench.root}", "run.progress=false", *HARDWARE]
        return [f"from={self.record.key}", *evaluators, *words]


STOPPING = [
    "train.validate_every=1",
    "train.patience=1",
    "train.schedule=constant",
    "+dataset.limit.validation=8",
]


@cache
def all_changed(name: str) -> list[str]:
    """Return overrides that give each setting of evaluation alone another value, all at once."""
    cls, words = method_class(name), list[str]()
    for key in sorted(cls.eval_settings):
        literals = [v for v in _literals(get_type_hints(cls)[key]) if isinstance(v, str)]
        values = [*literals, *([v] for v in literals), True, False, 1, 2, 3, [1], [2], [3], [0]]
        tried = (f"method.{key}={json.dumps(value)}" for value in values)
        words.append(next(word for word in tried if _changes(name, key, [*words, word])))
    return words


def _changes(name: str, key: str, words: list[str]) -> bool:
    try:
        job = compose("train", [*files_of(name), *overrides(name), *words])
    except UserError:
        return False
    changed: bool = job.spec.method.settings[key] != settings_of(method_class(name))[key]
    return changed


def _literals(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for part in get_args(hint):
            yield from _literals(part)


def fitted(run: Made) -> tuple[Method, list[Path]]:
    """Return the method of a run, resolved, and the artefact that it left."""
    method = resolved(make_method(run.job.spec.method), tiny_shape())
    return method, [run.bench.folder(run.job).artefact]
