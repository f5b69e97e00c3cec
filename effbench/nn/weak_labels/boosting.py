"""Boosting over rules: what is hard gives anchors, a judge keeps rules, and these give labels.

Source: Zhang et al., PRBoost, ACL 2022, arXiv 2203.09735; see `methods/data/prboost.py`. A round:

1. error, vote and weights of the classifier before (`samme`);
2. candidates from the rows of largest weight, decisions about them (`judging`);
3. labels of the rows that the kept rules fire on (`matching`);
4. a new classifier from these, then from its own predictions on the others (`self_training`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.method_types import Context
from effbench.nn.weak_labels import label_model, matching, rules, samme, self_training
from effbench.nn.weak_labels.ensemble import Ensemble
from effbench.nn.weak_labels.judging import Judge
from effbench.nn.weak_labels.pool import HIDDEN, Pool
from effbench.nn.weak_labels.rules import Evidence, Rule
from effbench.nn.weak_labels.schedule import Schedule

SHOWN = 3
"""Texts that a rule would label, shown to who judges it."""
PATIENCE = 2
"""Rounds without a kept rule after which no more candidates are made."""


@dataclass(frozen=True)
class Settings:
    """How rules are looked for."""

    anchors: int
    """Hard rows of a round."""
    words: int
    """Most words of such a row."""
    pick: Literal["boosting", "random"]
    template: str
    beta: float
    sigma: float | None
    """Threshold; None tunes it."""
    floor: float
    """Least precision at which it is tuned."""
    self_training: float
    judge: Judge
    given: Sequence[Rule] = field(default_factory=tuple)
    """Rules to start from."""
    combined_by: label_model.By = "votes"
    """What several rules that fire on a row say together."""
    patience: int = 0
    """Rounds without a better ensemble after which no more candidates are made; 0 goes on."""


class Boosting(Evolution):
    """The state of a boosting while its classifiers train.

    Args:
        settings: How rules are looked for.
        pool: The rows.
        ensemble: The classifiers, one for each round and one before the first.
        ctx: Of the run; its step says where the training is.
    """

    def __init__(self, settings: Settings, pool: Pool, ensemble: Ensemble, ctx: Context) -> None:
        self.settings, self.pool, self.ensemble, self.ctx = settings, pool, ensemble, ctx
        self.schedule = Schedule(ctx.total_steps, len(ensemble.heads), settings.self_training)
        self.matcher = matching.Matcher(pool, settings.beta)
        self.features = pool.features.to(ensemble.mean.device)
        ensemble.standardise_by(self.features)
        self.inputs = ensemble.standardised(self.features)
        self.judged: list[Rule] = []
        self.weights = torch.full((len(pool.weighed),), 1 / max(1, len(pool.weighed)))
        self.member = -1
        self.learns = False
        """Whether the present classifier has anything to learn that the one before had not."""
        self.targets = torch.full_like(pool.labels, HIDDEN)
        self.soft = torch.zeros(len(pool.texts), ensemble.classes)
        self.accuracies: list[float] = []
        """Of the ensemble on the weighed rows, after each classifier."""

    # -- the training's hooks ------------------------------------------------------------------

    def before_step(self) -> None:
        """Begin a round where a step is the first of its classifier, and refresh soft labels."""
        step = self.ctx.step
        if self.schedule.member(step) != self.member:
            self._begin_round(self.schedule.member(step))
        if self.schedule.refreshes(step):
            rows = self._unmatched.nonzero()[:, 0]
            with torch.no_grad():
                self.soft[rows] = self_training.sharpened(self._logits(rows).softmax(1)).cpu()

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the loss of a micro-batch's share of its window, a scalar.

        A row that is dealt stands for one of those that the step learns from, which may be few, so
        that all of a batch count; where there are none, nothing changes.
        """
        alone = self.schedule.alone(self.ctx.step)
        learning = (self._unmatched if alone else self.targets != HIDDEN) & self.learns
        rows = learning.nonzero()[:, 0]
        rows = rows[batch.columns["place"].cpu() % len(rows)] if len(rows) else rows
        logits = self._logits(rows)
        targets = (self.soft if alone else self.targets)[rows].to(logits.device)
        losses = (
            self_training.divergence(targets, logits)
            if alone
            else cross_entropy(logits, targets, reduction="none")
        )
        return losses.sum() / batch.window_examples

    def finish(self) -> None:
        """Give the last classifier its vote, and the ensemble the rules for its artefact."""
        self._end_round()
        self.ensemble.rules = list(self.judged)

    @property
    def final(self) -> bool:
        """Whether the last classifier trains."""
        return self.member == len(self.ensemble.heads) - 1

    def metrics(self) -> dict[str, float]:
        """Return the classifier, decisions and kept rules so far, and the share that they label."""
        matched = (self.targets != HIDDEN) & self.pool.unlabelled
        return {
            "member": self.member,
            "judgements": self._judgements,
            "rules": len(rules.accepted(self.judged)),
            "coverage": float(matched.sum() / max(1, int(self.pool.unlabelled.sum()))),
        }

    def costs(self) -> dict[str, tuple[float, str]]:
        """Return what people would have had to do: judge rules, and label rows."""
        labelled = len(self.pool.weighed) + len(self.pool.learnt)
        return {
            "judgements": (self._judgements, "decisions"),
            "kept_rules": (len(rules.accepted(self.judged)), "rules"),
            "labelled_rows": (labelled, "rows"),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values; rules as lines."""
        names = ("weights", "targets", "soft", "member", "learns", "accuracies")
        return {n: getattr(self, n) for n in names} | {"rules": [r.line() for r in self.judged]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        for name in ("weights", "targets", "soft"):
            setattr(self, name, state[name].cpu())
        self.member, self.learns = state["member"], state["learns"]
        self.accuracies = list(state.get("accuracies", []))
        self.judged = [rules.parse(line) for line in state["rules"]]

    # -- rounds --------------------------------------------------------------------------------

    @property
    def _judgements(self) -> int:
        return sum(rule.round > 0 for rule in self.judged)

    @property
    def _unmatched(self) -> torch.Tensor:
        """Whether a row has no label at all, true or weak, [N] bool."""
        return self.pool.unlabelled & (self.targets == HIDDEN)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        inputs = self.inputs[rows.to(self.inputs.device)]
        found: torch.Tensor = self.ensemble.heads[self.member](inputs)
        return found

    def _begin_round(self, member: int) -> None:
        self._end_round()
        fresh = self._discovered(member) if member else list(self.settings.given)
        self.judged += fresh
        self.member, self.learns = member, not member or bool(rules.accepted(fresh))
        self.targets = self._labels(rules.accepted(self.judged))

    @torch.no_grad()
    def _end_round(self) -> None:
        """Give the present classifier its vote; weigh what it gets wrong."""
        rows = torch.tensor(self.pool.weighed, dtype=torch.int64)
        if self.member < 0 or not self.learns:
            return
        if not len(rows):
            self.ensemble.votes[self.member] = 1.0
            return
        wrong = self._logits(rows).argmax(1).cpu() != self.pool.labels[rows]
        vote = samme.vote_of(samme.weighted_error(wrong, self.weights), self.soft.shape[1])
        if vote > 0:
            self.ensemble.votes[self.member] = vote
            self.weights = samme.reweighted(self.weights, wrong, vote)
        found = self.ensemble.probabilities(self.features[rows], "probability").argmax(1).cpu()
        self.accuracies.append(float((found == self.pool.labels[rows]).double().mean()))

    @property
    def _stalls(self) -> bool:
        """Whether the last `patience` classifiers made the ensemble no better than it was."""
        most = self.settings.patience
        lately, before = self.accuracies[-most:], self.accuracies[:-most]
        return bool(most and before) and max(lately) <= max(before)

    def _labels(self, kept: Sequence[Rule]) -> torch.Tensor:
        """Return the class of each row that is learnt from: true or weak; HIDDEN for others."""
        scores, labels = self.matcher.scores(kept), [r.label for r in kept]
        sigmas, classes = [r.sigma for r in kept], self.soft.shape[1]
        if self.settings.combined_by == "votes":
            weak = matching.weak_labels(scores, sigmas, labels, classes)
        else:
            known = torch.full_like(self.pool.labels, HIDDEN)
            known[self.pool.learnt] = self.pool.labels[self.pool.learnt]
            weak = label_model.weak_labels(
                scores >= torch.tensor(sigmas),
                labels,
                known,
                classes,
                self.settings.combined_by,
                self.ctx.seed,
            )
        weak[self.pool.weighed] = HIDDEN
        weak[self.pool.learnt] = self.pool.labels[self.pool.learnt]
        return weak

    # -- rules ---------------------------------------------------------------------------------

    def _discovered(self, member: int) -> list[Rule]:
        """Return the rules of a round, judged; those that were kept with their threshold."""
        lately = [r for r in self.judged if r.round >= member - PATIENCE]
        if self._stalls or (member > PATIENCE and not rules.accepted(lately)):
            return []
        candidates = self._with_evidence(list(self._candidates(member)))
        judged = self.settings.judge.decide(candidates)
        kept = rules.accepted(judged)
        if not kept or self.settings.sigma is not None:
            return judged
        learnt = self.pool.learnt
        sigma = matching.tuned(
            self.matcher.scores(kept)[learnt],
            [r.label for r in kept],
            self.pool.labels[learnt],
            self.settings.floor,
        )
        return [replace(r, sigma=sigma) if r.accepted else r for r in judged]

    def _candidates(self, member: int) -> Iterator[Rule]:
        """Yield a rule for each hard row and word; none that was judged before for another row."""
        known = {(r.words, r.label) for r in self.judged}
        for row in self._picked(member, known):
            for said, label in self._sayings(row):
                if (said, label) not in known:
                    known.add((said, label))
                    yield self._rule(member, row, label, said)

    def _sayings(self, row: int) -> list[tuple[tuple[str, ...], int]]:
        """Return the words of the rules that a labelled row gives, each with its class."""
        label = int(self.pool.labels[row])
        return [((word,), label) for word in self.pool.words[row][: self.settings.words]]

    def _rule(self, member: int, row: int, label: int, said: tuple[str, ...]) -> Rule:
        return Rule(
            words=said,
            label=label,
            anchor=self.pool.texts[row],
            template=self.settings.template,
            round=member,
            answer=self.pool.answers[label],
            sigma=self.settings.sigma or 0.0,
        )

    @torch.no_grad()
    def _picked(self, member: int, known: Collection[tuple[tuple[str, ...], int]]) -> list[int]:
        """Return the rows that give anchors, of those that have something new to ask."""
        weighed, count = self.pool.weighed, self.settings.anchors
        if self.settings.pick == "random":
            draws = torch.Generator().manual_seed((self.ctx.seed * 1_000_003 + member) % 2**63)
            order = torch.randperm(len(weighed), generator=draws).tolist()
        else:
            sure = self.ensemble.probabilities(self.features[weighed], "probability")
            order = samme.hardest(self.weights, sure.amax(1).cpu(), len(weighed))
        rows = (weighed[place] for place in order)
        return [row for row in rows if set(self._sayings(row)) - set(known)][:count]

    def _with_evidence(self, candidates: Sequence[Rule]) -> list[Rule]:
        scores = self.matcher.scores(candidates)
        return [
            replace(r, evidence=self._evidence(r, scores[:, j])) for j, r in enumerate(candidates)
        ]

    def _evidence(self, rule: Rule, scores: torch.Tensor) -> Evidence:
        """Return what a rule does where it has these scores, [N]."""
        fires, learnt = scores >= rule.sigma, self.pool.learnt
        right = self.pool.labels[learnt][fires[learnt]] == rule.label
        hidden = self.pool.unlabelled.nonzero()[:, 0]
        order = hidden[scores[hidden].argsort(descending=True, stable=True)].tolist()
        return Evidence(
            matches=len(right),
            precision=float(right.float().mean()) if len(right) else 0.0,
            coverage=float(fires[hidden].float().mean()) if len(hidden) else 0.0,
            examples=tuple(self.pool.texts[i] for i in order if fires[i])[:SHOWN],
        )
