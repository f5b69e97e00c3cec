"""What an evaluator is given: the model at one point, and ways to ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from effbench.api.batch import Batch, by_length, make_batch
from effbench.api.cost import Cost
from effbench.api.points import UNNAMED, Point
from effbench.api.schema import digest
from effbench.api.spec import Machine
from effbench.methods.base import Method
from effbench.methods.caches import Caches
from effbench.nn.model_kinds.base import kind_of
from effbench.nn.scoring import finite, multi_point, prefix_tree
from effbench.util.errors import UserError
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.session import Session
    from effbench.api.shape import ModelShape
    from effbench.api.spec import ModelSpec
    from effbench.data.dataset import Data
    from effbench.nn.decode.decoder import Engine
    from effbench.results.journal import Journal


def _no_journal(name: str, items: Sequence[str]) -> Journal:
    from effbench.results.journal import Journal

    return Journal(None, items)


def _no_model(name: str) -> torch.nn.Module:
    raise UserError(f"There is no way to load {name!r} here.")


def _no_base() -> torch.nn.Module:
    raise UserError("There is no way to load the base model here.")


@dataclass
class Subject:
    """A model at one operating point, ready to be evaluated."""

    model: torch.nn.Module
    method: Method
    point: Point
    data: Data
    device: torch.device
    seed: int
    pad_token_id: int
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    """Called with what is done, how many and of how many."""
    tokenizer: Any = None
    shape: ModelShape | None = None
    """Sizes of the base model."""
    used: ModelShape | None = None
    """Sizes of the model as it is used at this point."""
    dtype: str = "float32"
    """Compute dtype, a key of `shape.DTYPE_BYTES`."""
    cost: Cost | None = None
    """What the model needs at this point, counted from shapes."""
    whole: Cost | None = None
    """What all of the model needs, of which the point may be a part."""
    machine: Machine = field(default_factory=Machine)
    """Stated ceilings of the hardware; zeros where nothing is stated."""
    journal: Callable[[str, Sequence[str]], Journal] = _no_journal
    """Opens the journal `name` of an evaluation over some items: what an interrupted evaluation had
    finished is in it. Kept in memory when there is no run folder."""
    beside: Mapping[Point, Callable[[str, Sequence[str]], Journal]] = field(default_factory=dict)
    """Operating points still to be evaluated, each with what opens its journals: where the method
    lets a batch go through the model at several points at once, they are filled beside this one's.
    """
    keep: Callable[[str, Sequence[Mapping[str, Any]]], None] = lambda name, rows: None
    """Writes rows that are too much for the record into the run folder, one JSON line each."""
    load_model: Callable[[str], torch.nn.Module] = _no_model
    """Loads another model by its config name, frozen, on the device."""
    others: Sequence[ModelSpec] = ()
    """The models that it can load, as the key of the run knows them."""
    load_base: Callable[[], torch.nn.Module] = _no_base
    """Loads the dense model that the run started from, whatever made `model` of it; frozen, on the
    device."""
    base_bytes: int = 0
    """Memory of the process before the model was loaded."""
    job: dict[str, Any] = field(default_factory=dict)
    """The job of the run as plain values, for an evaluator that repeats it in another process."""

    @property
    def speaks(self) -> bool:
        """Whether what the model answers is text."""
        return kind_of(self.model).speaks

    def dense(self) -> Subject:
        """Return the dense model that the run started from, whose cache keeps everything.

        It is the same model where nothing but the cache is another one, else it is loaded.
        """
        same = isinstance(self.method, Caches) and not self.job.get("spec", {}).get("parent")
        model = self.model if same else self.load_base()
        return replace(self, model=model, method=Method(), point=UNNAMED)

    def batch(self, sequences: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """Return `(ids, labels)` pairs as one padded batch on the device."""
        return make_batch(sequences, self.pad_token_id).to(self.device)

    def session(self, engine: Engine = "auto") -> Session:
        """Return a fresh decoding session of the method's own.

        Raises:
            ValueError: When the engine does not apply.
        """
        return self.method.session(self.model, self.point, engine)

    def token_nll(self, batch: Batch) -> torch.Tensor:
        """Return each predicted token's negative log-likelihood, [B, T - 1], in nats.

        Raises:
            UserError: When one is not a finite number; it names the first layer that gave such a
                number.
        """

        def run() -> torch.Tensor:
            return self.method.token_nll(self.model, batch, self.point)

        nll = run()
        finite.require_finite(self.model, nll, run)
        return nll

    def token_nlls(self, batch: Batch, points: Sequence[Point]) -> list[torch.Tensor]:
        """Return `token_nll` at each of some points of `journals`, in one pass.

        Raises:
            UserError: As `token_nll` does.
        """
        if list(points) == [self.point]:
            return [self.token_nll(batch)]

        def run(some: Sequence[Point]) -> list[torch.Tensor]:
            inputs = batch.input_ids, batch.attention_mask, batch.labels
            return multi_point.nll_at(self.model, self._at(some), *inputs)

        found = run(points)
        for point, nll in zip(points, found, strict=True):
            finite.require_finite(self.model, nll, partial(run, [point]))
        return found

    def journals(self, name: str, items: Sequence[str]) -> dict[Point, Journal]:
        """Return this point's journal, and after it those of the points that go in one pass."""
        opened = {self.point: self.journal(name, items)}
        if self.beside and self._in_one_pass():
            opened |= {point: opening(name, items) for point, opening in self.beside.items()}
        return opened

    def _in_one_pass(self) -> bool:

        points = (self.point, *self.beside)
        plain = all(self.method.forward(point).shares_prefixes for point in points)
        return self.method.in_one_pass and plain and multi_point.can_walk(self.model)

    def _at(self, points: Sequence[Point]) -> list[Callable[[], AbstractContextManager[Any]]]:
        return [partial(self.method.at, self.model, point) for point in points]

    def score(
        self, requests: Sequence[prefix_tree.Request], name: str, batch_tokens: int = 2048
    ) -> list[prefix_tree.Score]:
        """Return the log-likelihood of each continuation after its context.

        What requests share is computed once, unless the method has logits of its own or the model
        takes no mask of ours; then each request is a padded row.

        Args:
            requests: What to score.
            name: Names the journal and the progress line; unique within one evaluator.
            batch_tokens: Largest batch, padding included, in tokens.

        Raises:
            UserError: When a result is not a finite number; it names the first layer that gave
                such a number.
        """
        ids = [digest([r.context, r.continuation]) for r in requests]
        if self.method.forward(self.point).shares_prefixes and prefix_tree.has_trees(self.model):
            return self._score_trees(requests, ids, name, batch_tokens)
        journal = self.journal(name, ids)
        lengths = [len(r.context) + len(r.continuation) for r in requests]
        pending = journal.pending(list(by_length(lengths, batch_tokens)))
        for scores in prefix_tree.padded_scores(self.logits, self.batch, requests, pending):
            journal.add(_plain_scores(scores))
            self.progress(name, len(journal), len(requests))
        return [prefix_tree.Score(*value) for value in journal.values()]

    def _score_trees(
        self,
        requests: Sequence[prefix_tree.Request],
        ids: Sequence[str],
        name: str,
        batch_tokens: int,
    ) -> list[prefix_tree.Score]:

        plan = prefix_tree.Plan(requests, batch_tokens)
        stems = any(g.stem for g in plan.groups)  # whose caches would be there once for each point
        journals = {self.point: self.journal(name, ids)} if stems else self.journals(name, ids)
        own = journals[self.point]
        for found in self._tree_passes(plan, journals):
            for point, scores in found.items():
                journals[point].add(_plain_scores(scores))
            self.progress(name, len(own), len(requests))
        return [prefix_tree.Score(*value) for value in own.values()]

    def _tree_passes(
        self, plan: prefix_tree.Plan, journals: Mapping[Point, Journal]
    ) -> Iterator[dict[Point, dict[int, prefix_tree.Score]]]:
        """Yield the scores of each group of a plan, by the points whose journals lack it."""
        from effbench.results.journal import pending

        todo = pending(journals, [g.requests for g in plan.groups])
        if len(journals) == 1:
            groups = plan.of(asked for asked, _ in todo)
            for scores in prefix_tree.tree_scores(self.model, plan, groups, self.device):
                yield {self.point: scores}
            return
        for asked, points in todo:
            [group] = plan.of([asked])
            with torch.inference_mode():
                found = multi_point.scores_at(
                    self.model, self._at(points), plan, group, self.device
                )
            yield dict(zip(points, found, strict=True))

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return teacher-forced logits, [B, T, V].

        Raises:
            UserError: When one is not a finite number, as `token_nll` does.
        """

        def run() -> torch.Tensor:
            return self.method.logits(self.model, batch, self.point)

        logits = run()
        finite.require_finite(self.model, logits, run)
        return logits


def _plain_scores(scores: Mapping[int, prefix_tree.Score]) -> dict[int, list[Any]]:
    return {i: [s.loglikelihood, s.greedy] for i, s in scores.items()}
