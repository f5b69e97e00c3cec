"""Simulated serving: requests that arrive, wait and are decoded together, on stated ceilings.

Continuous batching, Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative
Models", OSDI 2022. Requests arrive as a Poisson process, or all at once. Between any two steps,
those that wait join what is decoded, first come first served, as long as a slot is free: their
prompts are read in one pass, which holds up the others, and gives the first token of each.
Otherwise a step gives each running request one more token. A step takes what the roofline allows:

    seconds = max(FLOPs / (mfu * FLOP/s), bytes / (mbu * bytes/s))

with the weights read once a step, and the keys and values of all positions so far. The cache of a
whole request is reserved when it joins, so that slots = (memory - weights) / bytes of one request,
at most `max_batch`. With one slot it is the queue M/D/1. Ours: no network, scheduler or kernel
overhead; all requests have the same lengths.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.api.schema import Fraction, NonNegativeFloat, PositiveInt
from effbench.evaluators.base import Result
from effbench.evaluators.simulator import Scene, Simulator, quantile
from effbench.resources.roofline import prefill_flops
from effbench.util.errors import UserError

if TYPE_CHECKING:
    from effbench.api.shape import AnyShape
    from effbench.api.spec import Spec
    from effbench.methods.base import Method


@dataclass(frozen=True)
class Roofline:
    """What a step takes at the least."""

    scene: Scene
    flops: float
    """Reached, FLOP/s."""
    bandwidth: float
    """Reached, bytes/s."""
    prompt: int = 0
    """Tokens of each request's prompt."""

    def prefill(self, requests: int, prompt: int) -> float:
        """Return the seconds of reading prompts in one pass."""
        work = prefill_flops(self.scene.cost, self.scene.shape, requests, prompt)
        return max(work / self.flops, self.scene.cost.bytes_per_token / self.bandwidth)

    def decode(self, requests: int, positions: int) -> float:
        """Return the seconds of one more token for each request.

        Args:
            requests: How many there are.
            positions: That they attend to, the new ones included, all together.
        """
        cost, mean = self.scene.cost, positions / requests
        work = requests * (cost.flops_per_token + cost.attention(mean, self.prompt))
        read = cost.bytes_per_token + requests * cost.kv_bytes_per_sequence
        read += cost.cached(mean, requests, self.prompt)
        return max(work / self.flops, read / self.bandwidth)


@dataclass(frozen=True)
class Served:
    """When a request arrived, had its first token and its last one, in seconds."""

    arrived: float
    first: float
    last: float


@dataclass(frozen=True)
class Played:
    """A schedule that was played to its end."""

    requests: list[Served]
    busy: float
    """Seconds in which anything was computed."""
    steps: int
    """Decoding steps."""
    decoded: int
    """Tokens of all decoding steps."""

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return max(r.last for r in self.requests) - min(r.arrived for r in self.requests)


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Return when requests arrive, in seconds: a Poisson process; all at 0 when the rate is 0."""
    if not rate:
        return [0.0] * count
    draws, now = random.Random(seed), 0.0
    return [now := now + draws.expovariate(rate) for _ in range(count)]


def play(times: Sequence[float], prompt: int, new: int, slots: int, roofline: Roofline) -> Played:
    """Play continuous batching.

    Args:
        times: Arrivals, ascending.
        prompt: Tokens of each prompt.
        new: Steps of each request after its first token.
        slots: Requests that can be decoded at once.
        roofline: What steps take.
    """
    waiting, served = deque(times), list[Served]()
    running: list[tuple[float, float, int]] = []  # arrival, first token, its last step
    now = busy = 0.0
    steps = decoded = 0
    while waiting or running:
        joining: list[float] = []
        while waiting and waiting[0] <= now and len(running) + len(joining) < slots:
            joining.append(waiting.popleft())
        if joining:
            took = roofline.prefill(len(joining), prompt)
            running += [(arrived, now + took, steps + new) for arrived in joining]
        elif running:
            # All that run have the same prompt; of those steps, `end - steps` are still to come.
            positions = sum(prompt + new - (end - steps) + 1 for _, _, end in running)
            took = roofline.decode(len(running), positions)
            steps, decoded = steps + 1, decoded + len(running)
        else:
            now = waiting[0]
            continue
        now, busy = now + took, busy + took
        served += [Served(arrived, first, now) for arrived, first, end in running if end <= steps]
        running = [request for request in running if request[2] > steps]
    return Played(served, busy, steps, decoded)


@dataclass(frozen=True)
class Serving(Simulator):
    """Latencies and throughput of serving under load, simulated on stated ceilings."""

    headline: ClassVar[str] = "simulated_requests_per_second"
    gives: ClassVar[tuple[str, ...]] = ("simulated_tokens_per_second",)
    version: ClassVar[int] = 2
    trial: ClassVar[dict[str, Any]] = {
        "requests": 8,
        "prompt_tokens": 6,
        "new_tokens": 4,
        "tflops": 1.0,
        "bandwidth_gbs": 10.0,
    }

    rate: NonNegativeFloat = 1.0
    """Requests that arrive per second, as a Poisson process; 0: all are there at the start."""
    requests: PositiveInt = 500
    """How many arrive."""
    prompt_tokens: PositiveInt = 128
    """Tokens of each prompt."""
    new_tokens: PositiveInt = 32
    """Steps after the first token."""
    max_batch: PositiveInt = 64
    """Most requests that are decoded at once."""
    mfu: Fraction = 1.0
    """Share of the FLOP/s that is reached, for example as `evaluator=speed` measured it."""
    mbu: Fraction = 1.0
    """Share of the bytes/s that is reached."""
    tflops: NonNegativeFloat = 0.0
    """Ceiling of matrix products, 10^12 FLOP/s; a config takes that of the hardware."""
    bandwidth_gbs: NonNegativeFloat = 0.0
    """Memory bandwidth, 10^9 bytes/s; a config takes that of the hardware."""
    memory_gib: NonNegativeFloat = 0.0
    """Memory for weights and caches; 0 sets no limit. A config takes that of the hardware."""

    def check(self, spec: Spec, methods: Sequence[Method], shape: AnyShape | None) -> None:
        """Refuse a simulation without ceilings.

        Raises:
            UserError: Naming the setting.
        """
        if not self.tflops * self.mfu or not self.bandwidth_gbs * self.mbu:
            raise UserError(
                "evaluator.serving has no ceilings to simulate on.",
                "Choose hardware with stated ones (hardware=h200), or set "
                "evaluator.serving.tflops and evaluator.serving.bandwidth_gbs.",
            )

    def slots(self, scene: Scene) -> int:
        """Return how many requests can be decoded at once.

        Raises:
            UserError: When the weights leave no room for one.
        """
        if not self.memory_gib:
            return self.max_batch
        room = self.memory_gib * 2**30 - scene.whole.resident_bytes
        request = scene.cost.cached(self.prompt_tokens + self.new_tokens, prompt=self.prompt_tokens)
        found = min(self.max_batch, int(room / request)) if request else self.max_batch
        if room <= 0 or not found:
            raise UserError(
                f"{self.memory_gib:g} GiB do not hold the weights and the cache of one request.",
                "Raise evaluator.serving.memory_gib, or choose other hardware.",
            )
        return found

    def simulate(self, scene: Scene) -> Result:
        """Return throughput, quantiles of the latencies, and how full the batches were."""
        slots = self.slots(scene)
        flops, bandwidth = self.tflops * self.mfu * 1e12, self.bandwidth_gbs * self.mbu * 1e9
        roofline = Roofline(scene, flops, bandwidth, self.prompt_tokens)
        times = arrivals(self.requests, self.rate, scene.seed)
        played = play(times, self.prompt_tokens, self.new_tokens, slots, roofline)
        per_second, tokens = self.requests / played.seconds, self.new_tokens + 1
        latencies = {
            "ttft": [r.first - r.arrived for r in played.requests],
            "tpot": [(r.last - r.first) / self.new_tokens for r in played.requests],
            "latency": [r.last - r.arrived for r in played.requests],
        }
        metrics = [
            scene.metric("requests_per_second", per_second, "requests/s", self.requests),
            scene.metric("tokens_per_second", per_second * tokens, "tokens/s", self.requests),
            *(
                scene.metric(
                    f"{name}_p{percent}", quantile(seconds, percent / 100), "s", len(times)
                )
                for name, seconds in latencies.items()
                for percent in (50, 99)
            ),
            scene.metric("batch", played.decoded / played.steps, "requests", played.steps),
            scene.metric("slots", slots, "requests"),
            scene.metric("busy", played.busy / played.seconds, ""),
        ]
        return Result(metrics)
