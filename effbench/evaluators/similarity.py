"""Which layers are alike: attention maps, keys and values, and what each layer changes.

Each text is rows of the dataset cut to one length, without padding; `nn.sharing.similarity` says
what is computed on it. What is in the record are means over layers and texts; the matrices, with an
interval for each layer's score, lie in the run folder, and `effbench similarity` shows them.
Nothing is scored against labels, so rows that something was trained on may be looked at.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from effbench.api.footprint import Pass
from effbench.api.schema import PositiveInt, digest
from effbench.evaluators.base import Evaluator, Result
from effbench.evaluators.subject import Subject
from effbench.nn.sharing import ranking, similarity
from effbench.util.errors import UserError
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from effbench.api.shape import AnyShape
    from effbench.api.spec import Spec
    from effbench.data.dataset import Data
    from effbench.methods.base import Method

MATRICES = ("attention", "keys", "values")
"""Similarities of each pair of layers."""


@dataclass(frozen=True)
class Similarity(Evaluator):
    """Similarity of layers, and how much each of them changes."""

    headline: ClassVar[str] = "attention_similarity"
    trial: ClassVar[dict[str, Any]] = {"samples": 4, "tokens": 8}

    split: str = "train"
    """Which split."""
    samples: PositiveInt = 16
    """Texts at most."""
    tokens: Annotated[int, Ge(2)] = 256
    """Tokens of each; the attention maps of all layers over them are in memory at once."""

    def splits(self) -> tuple[str, ...]:
        """Return no split: nothing is scored, so rows that were trained on are no leak."""
        return ()

    def check(self, spec: Spec, methods: Sequence[Method], shape: AnyShape | None) -> None:
        """Refuse a split that is not there, and texts longer than the model's positions."""
        from effbench.data.dataset import no_split, split_names

        known = split_names(spec.dataset)
        if self.split not in known:
            raise no_split(spec.dataset, self.split, known)
        if shape and self.tokens > shape.max_positions:
            raise UserError(
                f"evaluator.similarity.tokens={self.tokens} is more than the "
                f"{shape.max_positions} positions of the model.",
                f"Lower it: evaluator.similarity.tokens={shape.max_positions}",
            )

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return the pass over one text; its attention maps are not predicted."""
        return [Pass("score", 1, self.tokens, 1)]

    def run(self, subject: Subject) -> Result:
        """Return the means over layers, and keep the matrices in the run folder."""
        rows = (e.ids for e in subject.data.examples(self.split))
        texts = ranking.joined(rows, self.tokens, self.samples)
        if not texts:
            raise UserError(
                f"Split {self.split!r} has fewer than {self.tokens} tokens.",
                "Lower evaluator.similarity.tokens, or choose another dataset.",
            )
        ids = [digest(text) for text in texts]
        found = self._measured(subject, texts, ids)
        result = Result()
        for name, values in means(found).items():
            result.add_items(subject, "similarity", name, values, ids, split=self.split)
        subject.keep("layers", layer_rows(found, subject.seed))
        return result

    def _measured(
        self, subject: Subject, texts: Sequence[list[int]], ids: Sequence[str]
    ) -> list[dict[str, Any]]:

        journal = subject.journal(self.split, ids)
        for (index,) in journal.pending([[i] for i in range(len(texts))]):
            tokens = torch.tensor(texts[index], device=subject.device)
            measured = similarity.layer_similarity(subject.model, tokens)
            journal.add({index: {name: t.tolist() for name, t in vars(measured).items()}})
            subject.progress("similarity", len(journal), len(texts))
        return journal.values()


def means(found: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return one value per text and metric: means over pairs of layers, or over layers."""
    names = {"attention": "attention", "keys": "key", "values": "value"}
    result = {
        f"{name}_similarity": [statistics.fmean(ranking.scores(sample[matrix])) for sample in found]
        for matrix, name in names.items()
    }
    result["block_influence"] = [1 - statistics.fmean(sample["passed"]) for sample in found]
    return result


def layer_rows(found: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return one row per layer: its rows of the mean matrices, its score and its influence.

    Score and influence have their intervals over texts, `[value, low, high]`, the ends null where
    there are too few texts for them.

    Args:
        found: What was measured on each text, as plain values.
        seed: Of the resampling.
    """
    by_text = [ranking.scores(sample["attention"]) for sample in found]
    layers = range(len(found[0]["passed"]))

    def row(matrix: str, layer: int) -> list[float]:
        rows = [sample[matrix][layer] for sample in found]
        return [statistics.fmean(column) for column in zip(*rows, strict=True)]

    return [
        {
            "layer": layer,
            "score": _interval([s[layer] for s in by_text], seed),
            "influence": _interval([1 - sample["passed"][layer] for sample in found], seed),
            **{name: row(name, layer) for name in MATRICES},
            "distances": row("distances", layer)[layer + 1 :],
        }
        for layer in layers
    ]


def _interval(values: Sequence[float], seed: int) -> list[float | None]:
    import math

    from effbench.stats import mean_interval

    mean, low, high = mean_interval(values, seed=seed)
    return [mean, *(v if math.isfinite(v) else None for v in (low, high))]
