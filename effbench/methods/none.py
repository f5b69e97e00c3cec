"""The model as it is: the base line of every comparison, and the way to evaluate any artefact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effbench.api.shape import Anatomy
from effbench.methods.reads import Reads


@dataclass(frozen=True)
class Unchanged(Reads):
    """Changes nothing and trains nothing."""

    anatomy: ClassVar[Anatomy] = "other"
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "classifier", "seq2seq"})
