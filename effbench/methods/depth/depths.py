"""The model as it is, read out after fewer layers: exits that nobody has trained.

What a method that trains exits has to beat, on the base model or on what a run made of it. A depth
n is the first n layers under the model's own final norm and head; see `methods.depth.reading` for
the ways of decoding.

Our choices: every ceil(L / 10)-th depth of L layers from 30 % on, which for 40 layers is the set of
Sorted LLaMA (arXiv 2309.08968), and an exact repair of the key/value cache after an early exit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from effbench.methods.base import Method
from effbench.methods.depth.reading import ReadsDepths
from effbench.methods.reads import Reads


@dataclass(frozen=True)
class Depths(Reads, ReadsDepths):
    """Changes nothing, trains nothing, and has a point for each depth."""

    identity: ClassVar[dict[str, Any] | None] = {"eval_depths": [4]}

    def check_start(self, earlier: Sequence[Method]) -> None:
        """Refuse to read out an artefact whose logits are not simply those of its layers."""
        super().check_start(earlier)
        self.check_plain(earlier)
