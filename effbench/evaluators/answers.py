"""Answers to prompts of one length, decoded greedily, and what the cache held meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

from effbench.evaluators.subject import Subject
from effbench.nn.scoring import finite
from effbench.util.lazy import torch


def answers(subject: Subject, prompts: Sequence[list[int]], new: int) -> tuple[list[str], float]:
    """Return the most likely continuations, and the most bytes of cache of a sequence.

    Args:
        subject: What answers.
        prompts: Of one length.
        new: Tokens to decode.
    """
    ids = torch.tensor(list(prompts), device=subject.device)
    session, found, held = subject.session(), [], 0
    with torch.inference_mode():
        logits = session.prefill(ids)
        for step in range(new):
            finite.require_finite(subject.model, logits, lambda: _whole(subject, prompts))
            held = max(held, session.kv_bytes())
            found.append(logits.argmax(-1, keepdim=True))
            if step + 1 < new:
                logits = session.step(found[-1])
    rows = torch.cat(found, dim=1).tolist()
    texts = [str(subject.data.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    return texts, max(held, session.kv_bytes()) / len(prompts)


def _whole(subject: Subject, prompts: Sequence[list[int]]) -> torch.Tensor:
    batch = subject.batch([(list(p), list(p)) for p in prompts])
    return subject.method.logits(subject.model, batch, subject.point)
