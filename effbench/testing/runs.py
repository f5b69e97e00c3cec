"""Small runs of a method, and what a finished one left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from effbench.api import registry
from effbench.api.plugins import make_method
from effbench.api.spec import Job
from effbench.config.compose import compose, settings_of
from effbench.methods.base import Method
from effbench.methods.chain import resolved
from effbench.nn.llama.weights import read_tensors
from effbench.results.records import Record
from effbench.testing.bench import Bench
from effbench.testing.kinds import method_class
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


@dataclass
class Made:
    """A finished run of a method, and what its model gave just before it was saved."""

    bench: Bench
    job: Job
    record: Record
    logits: dict[str, str]

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
        job = compose("train", [*overrides(name), "model=tiny", "dataset=arithmetic", *words])
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
