"""Text after prompts: greedy or sampled, until a stop, a whole batch at a time.

Prompts are padded on the left and share one decoding session; a row that is finished leaves the
batch. Random numbers belong to a prompt, not to its batch: a prompt's own seed gives one uniform
number per token, which picks from the cumulated probabilities, so that what else is decoded at the
same time changes nothing beyond the rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from effbench.api.session import Session
from effbench.nn.decode.native import most_likely


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """What the logits are divided by; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability, the one that reaches it
    included."""


@dataclass(frozen=True)
class Prompt:
    """What to go on from, and until when."""

    ids: list[int]
    """At least one token."""
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    """Tokens after which nothing more is decoded."""
    stop: tuple[str, ...] = ()
    """Strings after which nothing more is decoded."""
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """What came after a prompt."""

    ids: list[int]
    """Every decoded token, the stop included."""
    text: str
    """The text up to where it stops, without what stopped it."""
    ended: bool
    """Whether a stop ended it, rather than the number of tokens."""


def generate(
    session: Session,
    prompts: Sequence[Prompt],
    decode: Callable[[list[int]], str],
    *,
    device: torch.device,
    pad_token_id: int = 0,
    sampling: Sampling | None = None,
    check: Callable[[torch.Tensor], None] = lambda logits: None,
) -> list[Generated]:
    """Return what follows each prompt.

    Args:
        session: A fresh decoding session.
        prompts: Decoded together.
        decode: Turns tokens into text, special tokens left out.
        device: Where the session computes.
        pad_token_id: Any token; the mask covers it.
        sampling: How tokens are chosen; None is greedy.
        check: Called with the logits of every step, [B, V], before a token is taken from them.
    """
    choose = _Choice(sampling or Sampling(), [p.seed for p in prompts])
    made: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompt of each row of the session
    width = max(len(p.ids) for p in prompts)
    if reserve := getattr(session, "reserve", None):  # a cache that grows is there twice meanwhile
        reserve(len(prompts), width + max(p.max_new_tokens for p in prompts), width)
    logits = session.prefill(*left_padded([p.ids for p in prompts], pad_token_id, device))
    while True:
        check(logits)
        tokens = choose(logits, rows)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            made[row].append(token)
        kept = [i for i, row in enumerate(rows) if not _finished(prompts[row], made[row], decode)]
        if not kept:
            break
        if len(kept) < len(rows):
            places = torch.tensor(kept, device=device)
            session.reorder(places)
            tokens, rows = tokens[places], [rows[i] for i in kept]
        logits = session.step(tokens[:, None])
    return [_generated(p, ids, decode) for p, ids in zip(prompts, made, strict=True)]


def left_padded(
    rows: Sequence[list[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return token rows as [B, P], padded on the left, and their mask; None when nothing is padded.

    Args:
        rows: Tokens.
        pad_token_id: What stands before a short row.
        device: Where the tensors are made.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (width - len(r)) + r for r in rows], device=device)
    if all(len(r) == width for r in rows):
        return ids, None
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


def _finished(prompt: Prompt, ids: list[int], decode: Callable[[list[int]], str]) -> bool:
    if ids[-1] in prompt.stop_ids or len(ids) >= prompt.max_new_tokens:
        return True
    if not prompt.stop:
        return False
    # A token adds a byte at least, so a stop that ends here begins within so many tokens. Two more,
    # because a decoder may drop the space at the start of what it is given.
    longest = max(len(s.encode()) for s in prompt.stop) + 2
    tail = decode(ids[-longest:])
    return any(s in tail for s in prompt.stop)


def _generated(prompt: Prompt, ids: list[int], decode: Callable[[list[int]], str]) -> Generated:
    ended = ids[-1] in prompt.stop_ids
    text = decode(ids[:-1] if ended else ids)
    stops = [text.index(s) for s in prompt.stop if s in text]
    return Generated(ids, text[: min(stops, default=len(text))], ended or bool(stops))


class _Choice:
    """Takes the next token of each row from its logits."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self.sampling = sampling
        self.draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return one token per row, [B]; `rows` says whose random numbers each row takes."""
        if self.sampling.temperature == 0:
            return most_likely(logits)
        drawn = [torch.rand((), generator=self.draws[r], dtype=torch.float64) for r in rows]
        return sample(logits, torch.stack(drawn).to(logits.device), self.sampling)


def sample(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the token at which the cumulated probability passes a uniform number, [B].

    Temperature comes first, then `top_k`, then `top_p` on what that leaves; tokens are cumulated
    from the most likely one on.

    Args:
        logits: [B, V].
        uniform: [B] float64 in [0, 1).
        sampling: With a temperature above 0.
    """
    scaled = logits.double() / sampling.temperature
    scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    if 0 < sampling.top_k < scaled.shape[-1]:
        scaled[:, sampling.top_k :] = -torch.inf
    p = scaled.softmax(-1)
    before = p.cumsum(-1) - p
    p = p * (before < sampling.top_p)
    passed = p.cumsum(-1)
    place = torch.searchsorted(passed, (uniform * passed[:, -1])[:, None], right=True)
    last = (p > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, place.minimum(last))[:, 0]
