"""Prefill and decode speed of the method's own decoding session, first version.

Prompts are random tokens, so the speed does not depend on the data. The first repeat warms up and
is dropped; medians with bootstrap intervals over the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from effbench.evaluators.base import Evaluator, Result, Subject
from effbench.lazy import torch
from effbench.records import Metric
from effbench.schema import PositiveInt


@dataclass(frozen=True)
class Speed(Evaluator):
    """Tokens per second of prefill and decode, and bytes of the cache."""

    itemwise: ClassVar[bool] = False
    headline: ClassVar[str] = "decode_tokens_per_second"
    trial: ClassVar[dict[str, Any]] = {"prompt_tokens": 6, "new_tokens": 5, "repeats": 1}

    batch_size: PositiveInt = 1
    """Sequences decoded at once."""
    prompt_tokens: PositiveInt = 128
    """Tokens of each prompt."""
    new_tokens: PositiveInt = 32
    """Tokens decoded after it."""
    repeats: PositiveInt = 5
    """Timed repeats."""

    def run(self, subject: Subject) -> Result:
        """Return prefill and decode tokens per second, the cache's bytes, and what was counted."""
        from effbench.measure.timing import Clock
        from effbench.nn.decoding import Counting
        from effbench.stats import median_interval

        vocabulary = subject.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        draws = torch.Generator().manual_seed(subject.seed)
        prompt = torch.randint(
            vocabulary, (self.batch_size, self.prompt_tokens), generator=draws
        ).to(subject.device)
        prefill, decode, kv_bytes = [], [], 0
        counts: dict[str, float] = {}
        clock = Clock(subject.device)
        for repeat in range(self.repeats + 1):
            session = subject.method.session(subject.model)
            start = clock.now()
            token = session.prefill(prompt).argmax(-1, keepdim=True)
            middle = clock.now()
            for _ in range(self.new_tokens):
                token = session.step(token).argmax(-1, keepdim=True)
            end = clock.now()
            kv_bytes = session.kv_bytes()
            counts = session.counts() if isinstance(session, Counting) else {}
            if repeat:
                prefill.append(self.batch_size * self.prompt_tokens / (middle - start))
                decode.append(self.batch_size * self.new_tokens / (end - middle))
            subject.progress("speed", repeat, self.repeats)

        def rate(name: str, values: list[float], phase: str) -> Metric:
            median, low, high = median_interval(values, seed=subject.seed)
            return Metric(
                name, median, "tokens/s", subject.point, "", len(values), low, high, phase=phase
            )

        return Result(
            [
                rate("prefill_tokens_per_second", prefill, "prefill"),
                rate("decode_tokens_per_second", decode, "decode"),
                Metric(
                    "kv_bytes", kv_bytes, "bytes", subject.point, obtained="counted", phase="decode"
                ),
                *(
                    Metric(name, value, "", subject.point, obtained="counted", phase="decode")
                    for name, value in counts.items()
                ),
            ]
        )
