"""Answers to prompts of one length, decoded greedily, and what the cache held meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

from effbench.evaluators.subject import Subject
from effbench.nn.decode import generate
from effbench.nn.scoring import finite
from effbench.util.lazy import torch


def answers(subject: Subject, prompts: Sequence[list[int]], new: int) -> tuple[list[str], float]:
    """Return the most likely continuations, and the most bytes of cache of a sequence.

    Args:
        subject: What answers.
        prompts: Of one length.
        new: Tokens to decode.
    """
    session, held, tokenizer = subject.session(), list[int](), subject.data.tokenizer

    def watch(logits: torch.Tensor) -> None:
        finite.require_finite(subject.model, logits, lambda: _whole(subject, prompts))
        held.append(session.kv_bytes())

    with torch.inference_mode():
        made = generate.generate(
            session,
            [generate.Prompt(list(ids), new) for ids in prompts],
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            device=subject.device,
            check=watch,
        )
    return [one.text for one in made], max(held) / len(prompts)


def _whole(subject: Subject, prompts: Sequence[list[int]]) -> torch.Tensor:
    batch = subject.batch([(list(p), list(p)) for p in prompts])
    return subject.method.logits(subject.model, batch, subject.point)
