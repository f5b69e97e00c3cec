"""How closely a model follows a reference model on the same tokens.

The reference is the dense model that the run started from, or another one of the same vocabulary.
Label and probability loyalty are those of Xu et al., "Beyond Preserved Accuracy: Evaluating Loyalty
and Robustness of BERT Compression", EMNLP 2021, arXiv 2109.03228; the classes are all tokens that
may come next, or a question's answers. Flips are those of Dutta et al., "Accuracy is Not All You
Need", NeurIPS 2024, arXiv 2407.09141.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from effbench.errors import UserError, did_you_mean
from effbench.evaluators.base import Evaluator, Result, Subject
from effbench.lazy import torch
from effbench.methods.base import Method
from effbench.schema import PositiveInt, build

if TYPE_CHECKING:
    from collections.abc import Sequence

    from effbench.datasets import Data, Example
    from effbench.footprint import Pass
    from effbench.shapes import Shape
    from effbench.spec import ModelSpec, Spec

BOUNDS = {
    "agreement": (0.0, 1.0),
    "kl": (0.0, math.inf),
    "reverse_kl": (0.0, math.inf),
    "js": (0.0, math.log(2)),
    "probability_loyalty": (1 - math.sqrt(math.log(2)), 1.0),
    "logit_mse": (0.0, math.inf),
}
"""What each number can be."""
UNITS = {"kl": "nats/token", "reverse_kl": "nats/token", "js": "nats/token"}


@dataclass(frozen=True)
class Fidelity(Evaluator):
    """Agreement with a reference model, and the distance between the two distributions."""

    headline: ClassVar[str] = "agreement"

    reference: str = ""
    """Name of a model config; empty is the dense model that the run started from."""
    split: str = "test"
    """Which split."""
    window: PositiveInt | None = None
    """Most tokens that the models see at once; null is the dataset's `max_length`."""
    stride: PositiveInt | None = None
    """Tokens that each window after a document's first one counts; null is half a window."""
    batch_tokens: PositiveInt = 1024
    """Largest batch, padding included, in tokens."""

    def check(self, spec: Spec, methods: Sequence[Method], shape: Shape | None) -> None:
        """Refuse a reference of another vocabulary, and windows that cannot be."""
        from effbench.windows import check_sizes

        limit = spec.dataset.max_length
        check_sizes("evaluator.fidelity", self.window, self.stride, limit, shape)
        if not self.reference:
            return
        theirs = model_spec(self.reference).shape
        check_sizes("evaluator.fidelity", self.window, self.stride, limit, theirs)
        if theirs and shape and theirs.vocab_size != shape.vocab_size:
            raise self._other_vocabulary(f"{theirs.vocab_size} entries, not {shape.vocab_size}")

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return the batches of windows that it scores."""
        from effbench.windows import passes, sizes

        window, stride = sizes(self.window, self.stride, spec.dataset.max_length)
        return passes(data, self.split, window, stride, self.batch_tokens)

    def run(self, subject: Subject) -> Result:
        """Return the metrics over tokens, and those over answers where the dataset has them."""
        other = self._reference(subject)
        examples = subject.data.documents(self.split)
        result = Result()
        self._add_tokens(result, subject, other, examples)
        if subject.data.spec.kind == "choices":
            self._add_answers(result, subject, other, examples)
        return result

    def _reference(self, subject: Subject) -> Subject:
        """Return the same subject with the reference as its model."""
        model = subject.load_model(self.reference) if self.reference else subject.load_base()
        ours, theirs = (
            m.get_input_embeddings().num_embeddings  # type: ignore[operator]
            for m in (subject.model, model)
        )
        if ours != theirs:
            raise self._other_vocabulary(f"{theirs} entries, not {ours}")
        if self.reference:
            from effbench.models import load_tokenizer

            tokenizer = load_tokenizer(model_spec(self.reference))
            if tokenizer.get_vocab() != subject.data.tokenizer.get_vocab():
                raise self._other_vocabulary("other tokens")
        return replace(subject, model=model, method=Method())

    def _other_vocabulary(self, what: str) -> UserError:
        return UserError(
            f"evaluator.fidelity.reference={self.reference} has another vocabulary: {what}.",
            "Choose a reference with the same tokenizer, or leave it out for the run's own base.",
        )

    # -- tokens --------------------------------------------------------------------------------

    def _add_tokens(
        self, result: Result, subject: Subject, other: Subject, examples: Sequence[Example]
    ) -> None:
        from effbench.nn.divergence import FIELDS

        rows = self._row_sums(subject, other, examples)
        counts, ids = [row[-1] for row in rows], [e.id for e in examples]
        for place, name in enumerate(FIELDS):
            result.add_ratio(
                subject,
                "fidelity",
                name,
                [row[place] for row in rows],
                counts,
                ids,
                unit=UNITS.get(name, ""),
                split=self.split,
                bounds=BOUNDS[name],
            )

    def _row_sums(
        self, subject: Subject, other: Subject, examples: Sequence[Example]
    ) -> list[list[float]]:
        """Return each row's sums of `divergence.FIELDS` and its number of positions."""
        from effbench.nn.divergence import FIELDS, row_sums
        from effbench.windows import cut, groups, sizes

        limit = subject.data.spec.max_length
        windows = cut(examples, *sizes(self.window, self.stride, limit))
        journal = subject.journal(self.split, [w.name(examples[w.row]) for w in windows])
        for group in journal.pending(groups(windows, self.batch_tokens)):
            batch = subject.batch([windows[i].sequence(examples[windows[i].row]) for i in group])
            with torch.inference_mode():
                found = row_sums(other.logits(batch), subject.logits(batch), batch.labels)
            journal.add(dict(zip(group, found.tolist(), strict=True)))
            subject.progress("fidelity", len(journal), len(windows))

        rows = [[0.0] * (len(FIELDS) + 1) for _ in examples]
        for window, values in zip(windows, journal.values(), strict=True):
            rows[window.row] = [a + b for a, b in zip(rows[window.row], values, strict=True)]
        return rows

    # -- answers -------------------------------------------------------------------------------

    def _add_answers(
        self, result: Result, subject: Subject, other: Subject, examples: Sequence[Example]
    ) -> None:
        ours = self._answer_scores(subject, examples, "answers")
        theirs = self._answer_scores(other, examples, "reference")
        outcomes = [
            answer_outcomes(p, q, e.right) for p, q, e in zip(theirs, ours, examples, strict=True)
        ]
        ids = [e.id for e in examples]
        for name in ("label_loyalty", "answer_loyalty", "flips"):
            values = [o[name] for o in outcomes]
            result.add_items(subject, "fidelity", name, values, ids, split=self.split)

    def _answer_scores(
        self, subject: Subject, examples: Sequence[Example], name: str
    ) -> list[list[float]]:
        """Return the summed log-likelihood of each answer of each question."""
        from effbench.nn.scoring import Request

        choices = [c for e in examples for c in e.choices or []]
        requests = [Request(c.ids[: c.prompt_length], c.ids[c.prompt_length :]) for c in choices]
        scores = iter(subject.score(requests, f"{self.split}.{name}", self.batch_tokens))
        return [[next(scores).loglikelihood for _ in e.choices or []] for e in examples]


def answer_outcomes(
    reference: Sequence[float], model: Sequence[float], right: int
) -> dict[str, float]:
    """Return what a question says of fidelity.

    Args:
        reference: Log-likelihood of each answer under the reference.
        model: The same under the model.
        right: Index of the right answer.

    Returns:
        `label_loyalty`: whether both choose the same answer. `answer_loyalty`: 1 - sqrt(JS) between
        the two softmax distributions over the answers. `flips`: whether one is right and the other
        is not.
    """
    from effbench.nn.divergence import FIELDS, divergences

    theirs, ours = (list(s).index(max(s)) for s in (reference, model))
    p, q = (torch.tensor([list(s)], dtype=torch.float64) for s in (reference, model))
    loyalty = FIELDS.index("probability_loyalty")
    return {
        "label_loyalty": float(theirs == ours),
        "answer_loyalty": float(divergences(p, q)[0, loyalty]),
        "flips": float((theirs == right) != (ours == right)),
    }


def model_spec(name: str) -> ModelSpec:
    """Return the model that a config names.

    Raises:
        UserError: When there is no such config.
    """
    import yaml

    from effbench.conf_files import options
    from effbench.spec import ModelSpec

    known = options("model")
    path = known.get(name)
    if path is None:
        raise UserError(f"There is no model {name!r}.", did_you_mean(name, known))
    return build(ModelSpec, yaml.safe_load(path.read_text()), "model")
