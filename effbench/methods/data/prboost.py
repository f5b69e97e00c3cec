"""PRBoost: a classifier from a few labels, and from rules that prompts suggest and people judge.

Zhang, Yu, Shetty, Song and Zhang, PRBoost: Prompt-Based Rule Discovery and Boosting for Interactive
Weakly-Supervised Learning, ACL 2022, arXiv 2203.09735. There is no public code; this follows the
paper's description. With K classes, a few labelled rows D_l, all others D_u without labels:

    m_0 learns from D_l; then in each round t, on the rows of D_l with the largest weights w:
    rule      "if the prompt on x predicts v_r and x resembles x_r, then y_r"       is judged
    s(x, r) = beta cos(e(x), e(x_r)) + (1 - beta) |v_x & v_r| / |v_r|               fires at sigma
    m_t learns from what rules fire on, then on the rest from its own predictions, sharpened
    alpha_t = log((1 - err_t) / err_t) + log(K - 1)        w_i <- w_i exp(alpha_t [m_t wrong on i])
    p(k|x)  = sum_t alpha_t p_t(k|x) / sum_t alpha_t

From the paper: boosting picks 10 rows a round, ten words each; people judge; similarity and shared
words match; self-training; the weighted ensemble; an encoder, asked for words at a mask token
(`nn.weak_labels.reading`). Our choices: words of a causal model where there is no such token, the
model itself or another one beside it; linear classifiers on frozen mean states; one half of D_l
weighed, the other learnt from, so that err is of rows that no classifier saw; rules of all rounds
label together; a round that keeps no rule makes no classifier; an oracle for the people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Interval

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.examples import Example
from effbench.api.keys import WHOLE
from effbench.api.method_types import Context, Paper
from effbench.api.schema import Fraction, ModelText, NonNegativeInt, PositiveInt, digest
from effbench.api.shape import AnyShape, ModelShape
from effbench.api.spec import DatasetSpec
from effbench.methods.data.classifiers import Classifiers, heads_of
from effbench.nn.model_kinds.base import ModelKind, find, kind_of
from effbench.nn.weak_labels import boosting, judging, reading, rules
from effbench.nn.weak_labels import pool as pools
from effbench.util.errors import UserError
from effbench.util.hashes import hash_of
from effbench.util.lazy import torch

RULES = "rules.jsonl"
"""File of the artefact with all rules that were judged."""
OWN = "start"
"""Speaker that is the model itself, asked in a pass of its own."""


@dataclass(frozen=True)
class PRBoost(Classifiers):
    """Boosted linear classifiers on frozen states, from rules."""

    paper: ClassVar[Paper | None] = Paper(
        "PRBoost: Prompt-Based Rule Discovery and Boosting for Interactive Weakly-Supervised "
        "Learning",
        "ACL 2022",
        "2203.09735",
    )
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "classifier", "masked"})
    learning_rate: ClassVar[float] = 1e-2
    read_tokens: ClassVar[int] = 4096
    needs: ClassVar[dict[str, Any]] = {
        "classes": 4,
        "labelled": 0.5,
        "rounds": 1,
        "source": "text",
        "judge": "all",
        "self_training": 0.5,
    }

    labelled: Annotated[float, Interval(gt=0, le=1)] = 0.05
    """Share of the training rows whose labels may be seen; at least two rows."""
    bought: NonNegativeInt = 0
    """Further labelled rows that classifiers learn from: what judgements would have paid for."""
    rounds: NonNegativeInt = 5
    """Rounds after the first classifier; 0 learns from all labelled rows and given rules alone."""
    anchors: PositiveInt = 10
    """Rows of a round that rules are made for."""
    pick: Literal["boosting", "random"] = "boosting"
    """Which: those of largest weight, or any (the baseline)."""
    source: Literal["prompt", "text"] = "prompt"
    """Where words of rules come from: what the model expects, or the text itself (the baseline)."""
    template: ModelText = "\nIn one word, this is"
    """What stands between a text and the word that the model is asked for; an encoder's may go on
    behind the word, for which `[MASK]` stands then."""
    speaker: str = ""
    """Name of the config of the model that says the words, the path of its folder, or `start`, the
    model itself in a pass of its own; empty for the model itself."""
    words: PositiveInt = 10
    """Words of a row."""
    judge: Literal["oracle", "noisy", "recorded", "all", "none"] = "oracle"
    """Who decides: labels of the development half, these with errors, a file, or nobody."""
    noise: Fraction = 0.1
    """Probability that `noisy` decides wrongly."""
    min_precision: Fraction = 0.8
    """Least precision on the development half, for the oracle and for sigma."""
    min_matches: PositiveInt = 3
    """Least matches there, for the oracle."""
    min_coverage: Fraction = 0.001
    """Least share of the unlabelled rows that a rule fires on, for the oracle."""
    beta: Fraction = 0.5
    """Weight of similarity against shared words."""
    sigma: float | None = None
    """Score at which a rule fires; null is the smallest that is precise enough, in each round."""
    label_model: Literal["votes", "generative", "snorkel"] = "votes"
    """What several rules say of a row: the class of the largest sum of scores, or of a model of who
    is right how often, ours or that of the package snorkel (baselines)."""
    patience: NonNegativeInt = 0
    """Rounds in which the ensemble gets no better on the weighed rows after which no more rules are
    asked about; 0 goes on through all."""
    self_training: Fraction = 0.2
    """Share of a classifier's steps that learn from its own predictions; 0 for none."""
    files: dict[str, str] = field(default_factory=dict)
    """`decisions`: the file of the judge `recorded`; `rules`: one whose accepted rules label rows
    before the first round."""
    fingerprint: str = ""
    """Content hash of these files; filled in when the config is composed."""

    def __post_init__(self) -> None:
        if unknown := self.files.keys() - {"decisions", "rules"}:
            raise UserError(
                f"method.files.{min(unknown)} is no file of {self.name}.",
                "Name decisions or rules.",
            )
        if self.judge == "recorded" and "decisions" not in self.files:
            raise UserError(
                "method.judge=recorded reads decisions from a file.",
                "Name it, it may not be there yet: method.files.decisions=RULES.jsonl",
            )

    def sealed(self) -> Self:
        """Return itself with the hash of its files; that of decisions may still be missing."""
        paths = {name: Path(path).expanduser() for name, path in sorted(self.files.items())}
        if "rules" in paths and not paths["rules"].is_file():
            raise UserError(f"method.files.rules={paths['rules']} is not a file.", "Correct it.")
        found = {name: hash_of(p) if p.is_file() else "" for name, p in paths.items()}
        return replace(self, fingerprint=digest(found, WHOLE) if found else "")

    @property
    def asks(self) -> bool:
        """Whether a model is asked for words."""
        return self.source == "prompt" and (self.rounds > 0 or "rules" in self.files)

    def resolve(self, shape: AnyShape) -> Self:
        """Let an encoder with a masked-LM head speak for itself; refuse one that has no words."""
        kind = find(ModelShape.of(shape).kind)
        if not self.asks or self.speaker not in ("", OWN):
            return self
        if not kind.fills:
            raise UserError(
                f"{self.name} asks a model for words, and this one, {kind.one}, has none.",
                "Name one that has: method.speaker=smollm2-135m, or a folder; or take the words of "
                "the texts: method.source=text",
            )
        return self if kind.caches else replace(self, speaker=OWN)

    def check_dataset(self, dataset: DatasetSpec) -> None:
        """Refuse rows without classes, and rows with weights: boosting has its own."""
        super().check_dataset(dataset)
        if "weight" in dataset.columns:
            raise UserError(
                f"{self.name} finds the weights of rows itself, and would not use those of "
                f"dataset.columns.weight={dataset.columns['weight']}.",
                "Leave them out: '~dataset.columns.weight'",
            )

    def check_others(self, shapes: Mapping[str, AnyShape]) -> None:
        """Refuse a speaker that has no words."""
        if self.asks and (shape := shapes.get(self.speaker)):
            _require_words(find(ModelShape.of(shape).kind))

    # -- data ----------------------------------------------------------------------------------

    def dataset(
        self, examples: Sequence[Example], model: torch.nn.Module, ctx: Context
    ) -> list[Example]:
        """Read the texts, and return rows that stand for what was read; they have no label.

        Raises:
            UserError: For another number of answers than classes, or files that have changed.
        """
        if self.sealed().fingerprint != self.fingerprint:
            raise UserError("Files of method.files have changed since.", "Give the command again.")
        dealt = pools.deal(len(examples), self.labelled, self.bought, self.rounds > 0, ctx.seed)
        read, prompts = partial(self._read, model, ctx), self.source == "prompt"
        pool = pools.read(examples, dealt, self.classes, read, ctx.tokenizer, prompts)
        ctx.state["pool"] = vars(pool)
        return [pools.stand_in(example, place) for place, example in enumerate(examples)]

    def _read(
        self,
        model: torch.nn.Module,
        ctx: Context,
        prompts: Sequence[list[int]],
        texts: Sequence[str],
    ) -> reading.Reading:
        """Return what the model makes of texts, with the words of whoever is asked for them."""
        asked = self.speaker if self.asks else ""
        if kind_of(model).caches and not asked:
            reader = reading.Reader(model, ctx.tokenizer, self.template, self.words)
            return reader.read_once(prompts)
        features = reading.States(model, ctx.tokenizer).read_once(prompts)
        if not asked:
            return reading.Reading(features, [[] for _ in prompts])
        own = asked == OWN
        speaker = model if own else ctx.load_model(asked).requires_grad_(False).eval()
        _require_words(kind_of(speaker))
        tokenizer = ctx.tokenizer if own else ctx.load_tokenizer(asked)
        said = reading.said(speaker, tokenizer, self.template, self.words, texts)
        return reading.Reading(features, said.words)

    def reads_first(self, rows: int) -> int:
        """Return all texts and one without content, read by the model and by who else speaks."""
        times = 2 if self.asks and self.speaker else 1
        return times * (rows + 1) if rows else 0

    def consults(self) -> tuple[str, ...]:
        """Return the speaker, where it is another model."""
        return (self.speaker,) if self.asks and self.speaker not in ("", OWN) else ()

    # -- structure and training ----------------------------------------------------------------

    @property
    def members(self) -> int:
        """Classifiers: one before the first round, one for each."""
        return self.rounds + 1

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return the boosting, where there are rows."""
        if "pool" not in ctx.state:
            return Evolution()
        pool = pools.Pool(**ctx.state["pool"])
        return boosting.Boosting(self._search(ctx.seed), pool, heads_of(model), ctx)

    def _search(self, seed: int) -> boosting.Settings:
        """Return how rules are looked for."""
        paths = {name: Path(path).expanduser() for name, path in self.files.items()}
        given = rules.read(paths["rules"]) if "rules" in paths else []
        rules.check_classes(given, self.classes)
        judge = judging.Judge(
            self.judge,
            self.min_precision,
            self.min_matches,
            self.min_coverage,
            self.noise,
            seed,
            paths.get("decisions"),
        )
        return boosting.Settings(
            self.anchors,
            self.words,
            self.pick,
            self.template if self.source == "prompt" else "",
            self.beta,
            self.sigma,
            self.min_precision,
            self.self_training,
            judge,
            [replace(rule, round=0) for rule in rules.accepted(given)],
            self.label_model,
            self.patience,
        )

    @property
    def loss_unit(self) -> str:
        """Losses are those of texts."""
        return "nats/row"

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the loss of the present classifier on rows that stand for texts, a scalar."""
        loss: torch.Tensor = ctx.evolution.loss(batch)
        return loss

    def finalize(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Give the last classifier its vote."""
        if isinstance(ctx.evolution, boosting.Boosting):
            ctx.evolution.finish()
        return model

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the tensors, and the rules beside them."""
        super().save(model, folder)
        rules.write(folder / RULES, heads_of(model).rules)


def _require_words(kind: ModelKind) -> None:
    """Refuse a kind of model that has no words, where one is named for them.

    Raises:
        UserError: Naming the setting.
    """
    if not kind.fills:
        raise UserError(
            f"method.speaker is to say words, and it is {kind.one}.",
            "Name a causal model, or an encoder with a masked-LM head.",
        )
