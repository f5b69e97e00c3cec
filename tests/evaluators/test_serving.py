"""Simulated serving against queueing theory, closed forms and what a command says."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from helpers import SHAPE

from effbench.api import registry
from effbench.api.cost import cost_of
from effbench.api.shape import Shape
from effbench.evaluators.base import Result
from effbench.evaluators.serving import Roofline, Serving, arrivals, play
from effbench.evaluators.simulator import Scene, quantile
from effbench.methods.chain import chain_shapes, inference_cost
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

CEILINGS = ["evaluator.serving.tflops=1", "evaluator.serving.bandwidth_gbs=10"]
SCENE = Scene(SHAPE, cost_of(SHAPE, "float32"), cost_of(SHAPE, "float32"))


@dataclass(frozen=True)
class Fixed(Roofline):
    """Steps that take the same time whatever they work on."""

    def prefill(self, requests: int, prompt: int) -> float:
        return 1.0

    def decode(self, requests: int, positions: int) -> float:
        return 0.25


FIXED = Fixed(SCENE, 1.0, 1.0)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_slot_is_the_queue_m_d_1(load: float) -> None:
    """Pollaczek and Khinchine: the mean wait is load / (2 (1 - load)) services."""
    service, count = 1.0 + 4 * 0.25, 100_000
    played = play(arrivals(count, load / service, 0), 8, 4, 1, FIXED)
    waits = [r.last - r.arrived - service for r in played.requests]
    assert sum(waits) / count / service == pytest.approx(load / (2 * (1 - load)), rel=0.03)
    assert played.busy == pytest.approx(count * service)


def test_what_arrives_is_served_at_its_rate() -> None:
    serving = Serving(rate=2.0, requests=4000, tflops=1e3, bandwidth_gbs=1e6)
    found = {m.name: m.value for m in serving.simulate(SCENE).metrics}
    assert found["simulated_requests_per_second"] == pytest.approx(2.0, rel=0.05)
    assert found["simulated_tokens_per_second"] == pytest.approx(2.0 * 33, rel=0.05)


def test_all_at_once_are_served_in_full_batches() -> None:
    played = play([0.0] * 12, 8, 5, 4, FIXED)
    assert played.seconds == 3 * (1.0 + 5 * 0.25)
    assert (played.steps, played.decoded) == (15, 60)
    assert [r.first for r in played.requests] == [1.0] * 4 + [3.25] * 4 + [5.5] * 4


def test_a_request_joins_between_two_steps_and_holds_up_the_others() -> None:
    played = play([0.0, 1.1], 8, 2, 2, FIXED)
    first, second = played.requests
    assert (first.first, first.last) == (1.0, 1.25 + 1.0 + 0.25)
    assert (second.first, second.last) == (2.25, 2.75)


def test_a_step_takes_what_the_roofline_allows() -> None:
    cost, heads = SCENE.cost, 4 * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_dim
    slow_memory = Roofline(SCENE, 1e30, 100.0)
    read = cost.bytes_per_token + 70 * cost.kv_bytes_per_token
    assert slow_memory.decode(3, 70) == pytest.approx(read / 100)
    assert slow_memory.prefill(3, 10) == pytest.approx(cost.bytes_per_token / 100)
    slow_products = Roofline(SCENE, 100.0, 1e30)
    assert slow_products.decode(3, 70) == pytest.approx(
        (3 * cost.flops_per_token + 70 * heads) / 100
    )


def test_slots_are_what_the_memory_holds() -> None:
    one = SCENE.cost.kv_bytes_per_token * 160
    room = (SCENE.whole.resident_bytes + 3.5 * one) / 2**30
    assert Serving(memory_gib=room).slots(SCENE) == 3
    assert Serving(memory_gib=room, max_batch=2).slots(SCENE) == 2
    with pytest.raises(UserError, match="do not hold the weights"):
        Serving(memory_gib=room / 100).slots(SCENE)


def test_quantiles_are_values_that_were_there() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], q) for q in (0.25, 0.5, 0.51, 0.99)] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", registry.names("methods"))
def test_every_method_can_be_simulated_at_every_point(name: str) -> None:
    shape = Shape(**{**vars(SHAPE), "num_layers": 4})
    cls = registry.find("methods", name)
    method = cls(**cls.needs).resolve(shape)
    left = chain_shapes([method], shape)[-1]
    whole = inference_cost([method], shape, "float32", method.full_point(left))
    for point in method.points():
        cost = inference_cost([method], shape, "float32", point)
        result = Serving(requests=4, tflops=1, bandwidth_gbs=1).simulate(
            Scene(left, cost, whole, point)
        )
        assert all(m.obtained == "simulated" and m.value > 0 for m in result.metrics)


def test_a_simulation_loads_nothing_and_says_what_it_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effbench.models.load.load", None)
    words = ["method=lora_drop", "hardware.device=cuda", "hardware.dtype=bfloat16", *CEILINGS]
    record = bench.run("simulate", *words, "evaluator.serving.requests=5")
    simulated = {m.obtained for m in record.metrics if m.name.startswith("simulated_")}
    assert simulated == {"simulated"}
    assert {m.obtained for m in record.metrics} == {"simulated", "counted"}
    assert {m.point for m in record.metrics} == {"k0", "k1", "k2", "k3"}
    assert "no model was loaded" in record.notes[0]
    assert not record.plan and not record.outcomes
    assert not bench.folder(
        bench.job("simulate", *words, "evaluator.serving.requests=5")
    ).artefact.exists()


def test_a_simulation_that_was_interrupted_says_each_number_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["method=dylora", *CEILINGS, "evaluator.serving.requests=5"]
    simulate, points = Serving.simulate, []

    def watched(self: Serving, scene: Scene) -> Result:
        points.append(scene.point.name)
        if len(points) == 3:
            raise KeyboardInterrupt
        return simulate(self, scene)

    monkeypatch.setattr(Serving, "simulate", watched)
    with pytest.raises(KeyboardInterrupt):
        bench.run("simulate", *words)
    found = [(m.name, m.point) for m in bench.run("simulate", *words).metrics]
    assert len(set(found)) == len(found) > 0
    assert points == [*points[:3], "r1", "r2", "r4", "r8", "r16"]


def test_ceilings_are_those_of_the_hardware_and_in_the_key(bench: Bench) -> None:
    job = bench.job("simulate", "hardware=h200")
    assert job.spec.evaluators[0].settings["bandwidth_gbs"] == 4800
    assert job.spec.key != bench.job("simulate", "hardware=h200", "hardware.tflops=1").spec.key


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hardware=cpu"], "no ceilings"),
        ([*CEILINGS, "evaluator=[serving,perplexity]"], "perplexity asks a model"),
        ([*CEILINGS, "evaluator.serving.new_tokens=100000"], "more than the"),
    ],
)
def test_what_cannot_be_simulated_is_refused(words: list[str], message: str, bench: Bench) -> None:
    with pytest.raises(UserError, match=message):
        bench.job("simulate", *words)
