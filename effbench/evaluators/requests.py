"""One decoding request, timed from token to token: by a session, or by transformers' own loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from effbench.nn.decode import cache
from effbench.nn.decode.native import most_likely
from effbench.resources.timing import Clock
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.session import Session


class Times(NamedTuple):
    """One greedy request of a batch; times in seconds."""

    first: float
    """From the prompt to the first token."""
    gaps: list[float]
    """Between one token and the next."""
    kv_bytes: int
    """Bytes of the cache at the end."""
    tokens: torch.Tensor
    """[B, 1 + gaps] int64."""
    counts: Mapping[str, float] = {}
    """What the session counted, by name; empty where its work does not depend on the text."""
    kinds: Sequence[str] = ()
    """What each step after the first token did; empty where all steps do the same."""
    passes: float = 0.0
    """Layers that ran per step, where steps differ by a schedule."""
    cycle: int = 1
    """Steps after which such a schedule begins anew."""


def timed_session(
    session: Session,
    prompt: torch.Tensor,
    new: int,
    device: Any,
    around: Callable[[str], AbstractContextManager[Any]] = lambda phase: nullcontext(),
) -> Times:
    """Decode a prompt [B, P] and `new` more tokens after the first one.

    A session that can be made ready before its prompt is (`reserve`), before the clock runs.
    `around` gives what is entered around `prefill` and `decode`, while the clock does not run.
    """
    from effbench.api.session import Counting, Cyclic

    cycle = session.cycle if isinstance(session, Cyclic) else None
    kinds: list[str] = []
    clock = Clock(device)
    reserve = getattr(session, "reserve", None)
    if reserve is not None:
        reserve(prompt.shape[0], prompt.shape[1] + new, prompt.shape[1])
    with around("prefill"):
        start = clock.now()
        tokens = [most_likely(session.prefill(prompt))[:, None]]
        first = clock.now() - start
    with around("decode"):
        marks = [clock.now()]
        for _ in range(new):
            tokens.append(most_likely(session.step(tokens[-1]))[:, None])
            marks.append(clock.now())
            if cycle is not None:
                kinds.append(cycle.kind)
    counts = session.counts() if isinstance(session, Counting) else {}
    gaps = [b - a for a, b in pairwise(marks)]
    times = Times(first, gaps, session.kv_bytes(), torch.cat(tokens, dim=1))
    if cycle is not None:
        passes = cycle.passes / max(1, cycle.tokens)
        times = times._replace(kinds=kinds, passes=passes, cycle=cycle.window + 1)
    return times._replace(counts=counts)


def timed_generate(model: Any, prompt: torch.Tensor, new: int, device: Any) -> Times:
    """Do the same with transformers' `generate`, greedy and with its default cache.

    The times are those at which it hands its tokens out.
    """
    from transformers import DynamicCache
    from transformers.generation.streamers import BaseStreamer

    clock = Clock(device)

    class Watch(BaseStreamer):
        def __init__(self) -> None:
            self.marks = [clock.now()]
            self.begun = False

        def put(self, value: Any) -> None:
            if self.begun:  # what comes first is the prompt
                self.marks.append(clock.now())
            self.begun = True

        def end(self) -> None:
            pass

    held, watch = DynamicCache(), Watch()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new + 1,
        min_new_tokens=new + 1,
        do_sample=False,
        pad_token_id=0,
        past_key_values=held,
        streamer=watch,
    )
    first, *gaps = (b - a for a, b in pairwise(watch.marks))
    return Times(first, gaps, cache.held_bytes(held), out[:, prompt.shape[1] :])
