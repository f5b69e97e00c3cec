"""Peak memory of reading a prompt and of decoding after it, predicted beside measured.

On a CPU the peak is the process's largest resident size, set back before each part; on CUDA it is
the allocator's. What the process itself holds (Python, libraries, data) was measured before the
model was loaded and is on both sides: `planned_peak_bytes` is that base plus the predicted tensors.
`smallest_cap` looks for the least memory under which the same work succeeds, each trial in a
process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from effbench.api.footprint import Pass
from effbench.api.schema import PositiveInt
from effbench.evaluators.base import Evaluator, Result
from effbench.evaluators.subject import Subject
from effbench.nn.decode.native import most_likely
from effbench.nn.quant import linears
from effbench.results.records import Metric
from effbench.util.errors import UserError
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.session import Session
    from effbench.resources.memory import Peak

MIB = 2**20
LARGEST_CAP = 2**44
"""Bytes above which no cap is tried."""


@dataclass(frozen=True)
class Memory(Evaluator):
    """Peaks of prefill and decode, what they are made of, and the smallest cap."""

    itemwise: ClassVar[bool] = False
    headline: ClassVar[str] = "kv_cache_bytes"
    gives: ClassVar[tuple[str, ...]] = ("added_bytes", "planned_peak_bytes", "smallest_cap_bytes")
    trial: ClassVar[dict[str, Any]] = {"prompt_tokens": 6, "new_tokens": 4}

    batch_size: PositiveInt = 1
    """Sequences decoded at once."""
    prompt_tokens: PositiveInt = 480
    """Tokens of each prompt."""
    new_tokens: PositiveInt = 32
    """Tokens decoded after it."""
    smallest_cap: bool = False
    """Whether to look for the smallest memory under which this succeeds; takes minutes."""
    tolerance_mib: PositiveInt = 32
    """How near the smallest cap is found, in MiB."""

    def run(self, subject: Subject) -> Result:
        """Return peaks and components of both phases, and the smallest cap if it is asked for.

        Raises:
            UserError: When the cache does not hold what the method's cost says, or a trial of the
                smallest cap fails for another reason than memory.
        """
        from effbench.resources.memory import PeakMemory, release

        session = subject.session()
        sizes = self.batch_size, self.prompt_tokens
        prompt = random_tokens(subject.model, subject.seed, *sizes).to(subject.device)
        result = Result()
        release()
        with PeakMemory(subject.device, "prefill") as prefill:
            token = most_likely(session.prefill(prompt))[:, None]
        self._add(subject, result, prefill.peak, self.prompt_tokens)
        with PeakMemory(subject.device, "decode") as decode:
            for _ in range(self.new_tokens):
                token = most_likely(session.step(token))[:, None]
        self._add(subject, result, decode.peak, self.prompt_tokens + self.new_tokens)
        self._count(subject, result, session)
        if self.smallest_cap:
            result.metrics += self._cap(subject, decode.peak)
        return result

    def _add(self, subject: Subject, result: Result, peak: Peak, tokens: int) -> None:
        """Add a phase's peak, the predicted one and its components."""
        assert subject.cost is not None
        components = self._predicted(subject, peak.phase, tokens)
        planned = subject.base_bytes + sum(components.values())

        def modelled(name: str, value: float, unit: str = "bytes") -> Metric:
            return Metric(
                name, value, unit, subject.point.name, phase=peak.phase, obtained="modelled"
            )

        result.metrics += [
            Metric("peak_bytes", peak.peak_bytes, "bytes", subject.point.name, phase=peak.phase),
            Metric("added_bytes", peak.added_bytes, "bytes", subject.point.name, phase=peak.phase),
            modelled("planned_peak_bytes", planned),
            modelled("plan_error", planned / peak.peak_bytes - 1 if peak.peak_bytes else 0.0, ""),
            *(
                modelled(f"planned_{name.replace(' ', '_')}_bytes", value)
                for name, value in components.items()
                if value
            ),
        ]

    def _predicted(self, subject: Subject, phase: str, tokens: int) -> dict[str, float]:
        from effbench.api.shape import DTYPE_BYTES
        from effbench.resources.peaks import Caching, Peaks

        assert subject.cost is not None
        assert subject.shape is not None
        kind: Literal["prefill", "decode"] = "prefill" if phase == "prefill" else "decode"
        one = Pass(kind, self.batch_size, tokens, self.batch_size)
        on_cpu = not str(subject.device).startswith("cuda")
        peaks = Peaks(subject.shape, DTYPE_BYTES[subject.dtype], on_cpu)
        trained = subject.job.get("spec", {}).get("stage") == "train"
        expands = on_cpu or not all(x.fused for x in subject.shape.formats)
        decoder = subject.method.decoder(subject.point)
        caching = [Caching.of(subject.used, decoder)] if subject.used else ()
        return peaks.inference(subject.cost, one, trained=trained, expands=expands, caching=caching)

    def _count(self, subject: Subject, result: Result, session: Session) -> None:
        """Count weights and cache from their tensors."""
        for name, value in (
            ("weights_bytes", linears.storage_bytes(subject.model)),
            ("kv_cache_bytes", session.kv_bytes()),
        ):
            result.metrics.append(
                Metric(name, value, "bytes", subject.point.name, phase="decode", obtained="counted")
            )

    # -- the smallest cap ----------------------------------------------------------------------

    def _cap(self, subject: Subject, peak: Peak) -> list[Metric]:
        """Return the smallest cap that succeeds and how near it was found."""
        from effbench.evaluators.memory_cap import succeeds_under

        if not subject.job:
            raise UserError("evaluator.memory.smallest_cap needs a run of its own.")
        trials = 0

        def succeeds(cap: int) -> bool:
            nonlocal trials
            trials += 1
            subject.progress("smallest cap, trial", trials, 12)
            return succeeds_under(cap, self._work(subject), str(subject.device))

        cap = bisect(succeeds, peak.peak_bytes, self.tolerance_mib * MIB)
        return [
            Metric("smallest_cap_bytes", cap, "bytes", subject.point.name, n=trials),
            Metric(
                "smallest_cap_resolution_bytes",
                self.tolerance_mib * MIB,
                "bytes",
                subject.point.name,
                obtained="counted",
            ),
        ]

    def _work(self, subject: Subject) -> dict[str, Any]:
        """Return what a trial has to do, as plain values."""
        return {
            "job": subject.job,
            "point": subject.point.name,
            "seed": subject.seed,
            "batch_size": self.batch_size,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
        }


def random_tokens(model: torch.nn.Module, seed: int, rows: int, tokens: int) -> torch.Tensor:
    """Return random prompts [rows, tokens] on the CPU; they depend on the seed alone."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (rows, tokens), generator=draws)


def bisect(succeeds: Callable[[int], bool], start: int, tolerance: int) -> int:
    """Return a cap that succeeds, at most `tolerance` above one that does not.

    Args:
        succeeds: Whether the work succeeds under a cap, in bytes.
        start: A first guess.
        tolerance: In bytes.

    Raises:
        UserError: When no cap is large enough.
    """
    low, high = 0, max(start, tolerance)
    while not succeeds(high):
        low, high = high, 2 * high
        if high > LARGEST_CAP:
            raise UserError("The work does not succeed under any cap.", "Make it smaller.")
    while high - low > tolerance:
        middle = (low + high) // 2
        low, high = (low, middle) if succeeds(middle) else (middle, high)
    return high
