"""What a model answers: by the likelihood of each choice, or by what it generates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from effbench.data.tokens import chat_prompt
from effbench.evaluators.trustworthiness.base import Item, find
from effbench.evaluators.trustworthiness.replies import Reply
from effbench.nn.decode import session as sessions
from effbench.nn.scoring import prefix_tree
from effbench.util.errors import UserError
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.shape import AnyShape
    from effbench.evaluators.subject import Subject


@dataclass(frozen=True)
class Asked:
    """A question that belongs to a dimension."""

    dimension: str
    seed: int
    item: Item


@dataclass(frozen=True)
class Asking:
    """How questions are put."""

    batch_tokens: int
    chat: bool
    generate: bool
    new_tokens: int


@dataclass(frozen=True)
class Answers:
    """What one model answered, in the order of the questions."""

    log_p: list[list[float]]
    """Log-probability of each choice among the choices."""
    replies: list[Reply]


def ask(subject: Subject, questions: Sequence[Asked], how: Asking, name: str) -> Answers:
    """Return what the model of `subject` answers.

    Args:
        subject: The model.
        questions: What to ask.
        how: How to ask.
        name: Names the journals.

    Raises:
        UserError: When a question is longer than the model's positions.
    """
    prompts = [_rendered(q.item, subject.tokenizer, how.chat) for q in questions]
    requests = _requests(prompts, questions, how, subject.tokenizer)
    _refuse_long(requests, how, subject.shape)
    scores = iter(subject.score(requests, name, how.batch_tokens))
    log_p = [log_softmax([next(scores).loglikelihood for _ in q.item.choices]) for q in questions]
    if how.generate:
        contexts = [_tokens(subject.tokenizer, p, how.chat) for p in prompts]
        return Answers(log_p, _generated(subject, questions, contexts, how, f"{name}-texts"))
    return Answers(log_p, [Reply("answer", p.index(max(p))) for p in log_p])


def refuse_long(
    questions: Sequence[Asked], how: Asking, tokenizer: Any, shape: AnyShape | None
) -> None:
    """Refuse questions that are longer than a model's positions.

    Args:
        questions: What is to be asked.
        how: How.
        tokenizer: The model's.
        shape: The model's; None when it is not known.

    Raises:
        UserError: With what to leave out.
    """
    prompts = [_rendered(q.item, tokenizer, how.chat) for q in questions]
    _refuse_long(_requests(prompts, questions, how, tokenizer), how, shape)


def log_softmax(values: Sequence[float]) -> list[float]:
    """Return log-likelihoods as log-probabilities that belong together."""
    top = max(values)
    total = top + math.log(sum(math.exp(v - top) for v in values))
    return [v - total for v in values]


def divergence(log_p: Sequence[float], log_q: Sequence[float]) -> float:
    """Return KL(p || q) in nats; exactly 0 for equal distributions, never below."""
    return max(0.0, sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))


def _requests(
    prompts: Sequence[str], questions: Sequence[Asked], how: Asking, tokenizer: Any
) -> list[prefix_tree.Request]:
    """Return each choice of each question, as tokens."""
    space = "" if how.chat else " "
    return [
        _request(tokenizer, prompt, space + choice, how.chat)
        for prompt, q in zip(prompts, questions, strict=True)
        for choice in q.item.choices
    ]


def _rendered(item: Item, tokenizer: Any, chat: bool) -> str:
    if not chat:
        return f"{item.system}\n\n{item.prompt}" if item.system else item.prompt
    roles = {"system": item.system, "user": item.prompt}
    return chat_prompt([(role, text) for role, text in roles.items() if text], tokenizer)


def _tokens(tokenizer: Any, text: str, chat: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    return ids


def _request(tokenizer: Any, prompt: str, answer: str, chat: bool) -> prefix_tree.Request:
    """Tokenise prompt and answer together where that leaves the prompt's tokens as they are."""
    start = _tokens(tokenizer, prompt, chat)
    whole = _tokens(tokenizer, prompt + answer, chat)
    if whole[: len(start)] != start or len(whole) == len(start):
        return prefix_tree.Request(start, tokenizer(answer, add_special_tokens=False)["input_ids"])
    return prefix_tree.Request(start, whole[len(start) :])


def _refuse_long(
    requests: Sequence[prefix_tree.Request], how: Asking, shape: AnyShape | None
) -> None:
    new_tokens = how.new_tokens if how.generate else 0
    longest = max(len(r.context) + max(len(r.continuation), new_tokens) for r in requests)
    if shape is not None and longest > shape.max_positions:
        raise UserError(
            f"A question of evaluator trust has {longest} tokens; the model has "
            f"{shape.max_positions} positions.",
            "Leave out the dimension with the longest ones: "
            "evaluator.trust.dimensions=[stereotype,toxicity,ethics]",
        )


def _generated(
    subject: Subject,
    questions: Sequence[Asked],
    contexts: Sequence[list[int]],
    how: Asking,
    name: str,
) -> list[Reply]:
    """Let the model write an answer to each question, greedily, and return what it says."""
    journal = subject.journal(name, [q.item.id for q in questions])
    for (index,) in journal.pending([[i] for i in range(len(questions))]):
        ids = torch.tensor([contexts[index]], device=subject.device)
        session = subject.session()
        text = _first_line(
            subject.tokenizer, sessions.greedy(session, ids, how.new_tokens)[0].tolist()
        )
        reply = find(questions[index].dimension).reply(questions[index].item, text)
        journal.add({index: asdict(reply)})
        subject.progress(name, len(journal), len(questions))
    return [Reply(**value) for value in journal.values()]


def _first_line(tokenizer: Any, ids: list[int]) -> str:
    end = tokenizer.eos_token_id
    if end in ids:
        ids = ids[: ids.index(end)]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip().partition("\n")[0]
