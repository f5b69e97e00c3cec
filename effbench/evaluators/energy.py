"""Energy of prefill and of decoding per token, and what it comes to in carbon, water and money.

Prompts are random tokens. Each part is repeated until its window is long enough for a counter.
Where there is a counter (RAPL, NVML) the metric is `j_per_token`; where there is none it is
`j_per_token_modelled`, processor time at a share of the thermal design power. Carbon, water and
money follow from the factors in the settings, which their units repeat, and are always modelled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Interval

from effbench.api.schema import NonNegativeFloat, PositiveFloat, PositiveInt
from effbench.evaluators.base import Evaluator, Result
from effbench.evaluators.subject import Subject
from effbench.nn.decode.native import most_likely
from effbench.results.records import Metric
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.resources.energy import Energy

JOULES_PER_KWH = 3.6e6
PER = 1000
"""Decoded tokens that carbon, water and money are stated for."""


@dataclass(frozen=True)
class EnergyPerToken(Evaluator):
    """Joules per token of prefill and decode, and their cost."""

    itemwise: ClassVar[bool] = False
    headline: ClassVar[str] = "co2_g"
    gives: ClassVar[tuple[str, ...]] = ("j_per_token", "water_l", "cost_usd")
    trial: ClassVar[dict[str, Any]] = {
        "prompt_tokens": 6,
        "new_tokens": 4,
        "window_seconds": 0.01,
    }

    batch_size: PositiveInt = 1
    """Sequences at once."""
    prompt_tokens: PositiveInt = 128
    """Tokens of each prompt."""
    new_tokens: PositiveInt = 32
    """Tokens decoded after it."""
    window_seconds: PositiveFloat = 2.5
    """Least time over which each part is measured; NVML's counter needs 2 s."""
    grams_per_kwh: NonNegativeFloat = 400.0
    """Carbon intensity of the grid, g CO2-equivalent per kWh."""
    pue: Annotated[float, Interval(ge=1)] = 1.2
    """Power usage effectiveness: energy of the data centre over that of its computers."""
    litres_per_kwh: NonNegativeFloat = 1.8
    """Water for cooling, litres per kWh of the computers."""
    usd_per_kwh: NonNegativeFloat = 0.15
    """Price of energy."""
    usd_per_hour: NonNegativeFloat = 0.0
    """Price of the machine's time."""

    def run(self, subject: Subject) -> Result:
        """Return joules per token of both parts, and the cost of 1,000 decoded tokens."""
        from effbench.evaluators.memory import random_tokens

        sizes = self.batch_size, self.prompt_tokens
        prompt = random_tokens(subject.model, subject.seed, *sizes).to(subject.device)
        subject.session().prefill(prompt)  # warms up

        def prefill() -> None:
            subject.session().prefill(prompt)

        result = Result()
        read = self.batch_size * self.prompt_tokens
        energy, times = self._window(subject, prefill)
        result.metrics += self._joules(subject, "prefill", energy, times * read)
        energy, tokens = self._decode(subject, prompt)
        result.metrics += self._joules(subject, "decode", energy, tokens)
        result.metrics += self._costs(subject, energy, tokens)
        return result

    def _window(self, subject: Subject, work: Callable[[], None]) -> tuple[Energy, int]:
        """Return the energy of enough repeats of `work`, and how many they were."""
        from effbench.resources.energy import Meter
        from effbench.resources.timing import Clock

        clock, times = Clock(subject.device), 0
        meter = Meter(subject.device, subject.machine.tdp_watts)
        with meter:
            begun = clock.now()
            while not times or clock.now() - begun < self.window_seconds:
                work()
                times += 1
        return meter.energy, times

    def _decode(self, subject: Subject, prompt: torch.Tensor) -> tuple[Energy, int]:
        """Return the energy of decoding alone, prompts left out, and the tokens decoded."""
        from effbench.resources.energy import total

        parts: list[Energy] = []
        seconds = 0.0
        while not parts or seconds < self.window_seconds:
            session = subject.session()
            token = most_likely(session.prefill(prompt))[:, None]
            parts.append(self._steps(subject, session, token))
            seconds += parts[-1].seconds
            subject.progress("energy", min(int(seconds), 9), 10)
        return total(parts), len(parts) * self.batch_size * self.new_tokens

    def _steps(self, subject: Subject, session: Any, token: torch.Tensor) -> Energy:
        from effbench.resources.energy import Meter
        from effbench.resources.timing import Clock

        clock = Clock(subject.device)
        meter = Meter(subject.device, subject.machine.tdp_watts, least_seconds=0)
        with meter:
            for _ in range(self.new_tokens):
                token = most_likely(session.step(token))[:, None]
            clock.now()
        return meter.energy

    def _joules(self, subject: Subject, phase: str, energy: Energy, tokens: int) -> list[Metric]:
        name = "j_per_token" if energy.obtained == "measured" else "j_per_token_modelled"
        value = energy.joules / tokens
        return [
            Metric(
                name, value, "J/token", subject.point.name, phase=phase, obtained=energy.obtained
            )
        ]

    def _costs(self, subject: Subject, energy: Energy, tokens: int) -> list[Metric]:
        """Return carbon, water and money per 1,000 decoded tokens."""
        share = PER / tokens
        kwh = energy.joules * share / JOULES_PER_KWH
        hours = energy.seconds * share / 3600
        figures = {
            "co2_g": (
                kwh * self.pue * self.grams_per_kwh,
                f"g/{PER} tokens at {self.grams_per_kwh:g} g/kWh, PUE {self.pue:g}",
            ),
            "water_l": (
                kwh * self.litres_per_kwh,
                f"l/{PER} tokens at {self.litres_per_kwh:g} l/kWh",
            ),
            "cost_usd": (
                kwh * self.pue * self.usd_per_kwh + hours * self.usd_per_hour,
                f"USD/{PER} tokens at {self.usd_per_kwh:g} USD/kWh, PUE {self.pue:g}, "
                f"{self.usd_per_hour:g} USD/h",
            ),
        }
        return [
            Metric(name, value, unit, subject.point.name, phase="decode", obtained="modelled")
            for name, (value, unit) in figures.items()
        ]
