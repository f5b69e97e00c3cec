"""A model that a run made, or a base model, tried out: text after a prompt, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effbench.api import registry
from effbench.api.points import Point, find_point
from effbench.api.shape import ModelShape
from effbench.api.spec import Job
from effbench.data.render import Turn
from effbench.data.tokens import Encoder, chat_prompt
from effbench.methods.base import Method
from effbench.models.load import known_shape
from effbench.nn.decode.generate import Sampling, sample
from effbench.nn.decode.not_followed import not_followed
from effbench.nn.model_kinds.base import find, kind_of
from effbench.results.store import RunFolder, Store
from effbench.runner.open import open_model
from effbench.runner.run import open_run
from effbench.util.errors import UserError, require_unicode

UNFINISHED = "�"
"""What a decoder says of bytes that are no character yet."""


def _require_decoding(job: Job) -> None:
    """Refuse a model that writes no text, before it is loaded."""
    shape = known_shape(job.spec.model)
    kind = find(ModelShape.of(shape).kind) if shape else None
    if kind and not kind.writes:
        raise UserError(
            f"{job.spec.model.called} is {kind.one}, which writes no text here.",
            f"Ask it with an evaluator: effbench eval evaluator={kind.evaluator or 'choices'}",
        )
    name = job.spec.method.name
    if answers := registry.find("methods", name).answers_with:
        made = f"Run {job.spec.parent}" if job.spec.parent else "The model"
        raise UserError(
            f"{made} answers with {answers} ({name}), which writes no text.",
            "Try another run, or the model that it started from.",
        )


def _require_unicode(text: str) -> str:
    return require_unicode(text, "The text", "Convert it: iconv -f latin1 -t utf-8 FILE")


@dataclass
class Speaker:
    """A model at one of its operating points, ready to go on from texts."""

    method: Method
    model: Any
    tokenizer: Any
    point: Point
    positions: int
    """Most tokens that the model reads and writes."""
    device: torch.device

    @classmethod
    def of(cls, job: Job, point: str, scratch: Path) -> Speaker:
        """Return what a job of the stage `eval` would evaluate.

        Args:
            job: It is not run.
            point: Name of an operating point; empty for the one that stands for all.
            scratch: An empty folder for logs that nobody reads.

        Raises:
            UserError: When there is no such point, or the model cannot be loaded or writes nothing.
        """
        _require_decoding(job)
        run = open_run(job, RunFolder(scratch), Store(Path(job.runtime.results)))
        opened = open_model(run)
        run.events.close()
        own, name = opened.method, f"Run {job.spec.parent}" if job.spec.parent else "The model"
        at = find_point(own.points(), point, name) if point else own.default_point()
        opened.model.eval().requires_grad_(False)
        positions = opened.base.max_positions
        return cls(own, opened.model, run.tokenizer, at, positions, run.device)

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def not_followed(self, greedy: bool) -> list[str]:
        """Return a sentence on the model's own settings that are not followed, if there are any.

        Args:
            greedy: Whether the most likely token is taken, however the model would draw.
        """
        return not_followed(self.model, greedy)

    def rendered(self, turns: Sequence[Turn]) -> list[int]:
        """Return the tokens of a conversation, ready for an answer; plain text has no template.

        Raises:
            UserError: As `plain`.
        """
        if self.chats:
            text = _require_unicode(chat_prompt(turns, self.tokenizer))
            ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
            return kind_of(self.model).prompt(ids, Encoder(self.tokenizer).end)
        return self.plain("\n".join(what for _, what in turns))

    def plain(self, text: str) -> list[int]:
        """Return the tokens of a text as it is.

        Raises:
            UserError: When it has none, or was no UTF-8 where it was read.
        """
        ids = list(self.tokenizer(_require_unicode(text)).input_ids)
        if not ids:
            raise UserError("There is no text to go on from.", "Give some: --prompt TEXT.")
        return ids

    def answer(
        self, ids: list[int], most: int, sampling: Sampling, seed: int, told: Telling
    ) -> Iterator[str]:
        """Yield the text that comes after some tokens, piece by piece.

        Args:
            ids: At least one.
            most: Tokens at most.
            sampling: How they are chosen.
            seed: What the choice starts from.
            told: Filled in on the way.

        Raises:
            UserError: When the model has no room for them.
        """
        if len(ids) + most > self.positions:
            raise UserError(
                f"{len(ids)} tokens and {most} new ones are more than the model's "
                f"{self.positions} positions.",
                "Give less text, or lower --max-new-tokens.",
            )
        draws = torch.Generator().manual_seed(seed)

        def choose(logits: torch.Tensor) -> int:
            if sampling.temperature == 0:
                return int(logits.argmax(-1))
            drawn = torch.rand(1, generator=draws, dtype=torch.float64)
            return int(sample(logits, drawn.to(logits.device), sampling))

        with torch.no_grad(), self.method.at(self.model, self.point):
            yield from _pieces(self._tokens(ids, most, choose, told), self._text)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _tokens(
        self, ids: list[int], most: int, choose: Callable[[torch.Tensor], int], told: Telling
    ) -> Iterator[int]:
        """Yield tokens until one ends the text."""
        ends, session = self._ends(), self.method.session(self.model, self.point)
        begun = time.perf_counter()
        logits = session.prefill(torch.tensor([ids], device=self.device))
        told.prompt, told.read_seconds = len(ids), time.perf_counter() - begun
        begun = time.perf_counter()
        for number in range(most):
            token = choose(logits)
            told.tokens, told.seconds = number + 1, time.perf_counter() - begun
            if token in ends:
                return
            yield token
            if number + 1 < most:
                logits = session.step(torch.tensor([[token]], device=self.device))

    def _ends(self) -> set[int]:
        """Return the tokens that end a text."""
        stated = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        listed = stated if isinstance(stated, list) else [stated]
        return {x for x in (self.tokenizer.eos_token_id, *listed) if x is not None}


@dataclass
class Telling:
    """What is told of an answer."""

    prompt: int = 0
    tokens: int = 0
    read_seconds: float = 0.0
    seconds: float = 0.0
    """From the first new token to the last."""

    def line(self) -> str:
        """Return it in words."""
        rate = (self.tokens - 1) / self.seconds if self.seconds and self.tokens > 1 else 0.0
        speed = f", {rate:,.1f} tokens/s" if rate else ""
        tokens = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        return f"{tokens}{speed} after a prompt of {self.prompt}, read in {self.read_seconds:.2f} s"


def _pieces(tokens: Iterator[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Yield text as it grows, and never half a character."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if not text.endswith(UNFINISHED):
            yield text[len(shown) :]
            shown = text
    if len(rest := decode(ids)) > len(shown):
        yield rest[len(shown) :]
