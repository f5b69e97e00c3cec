"""What the events of a run amount to: the metrics and notes of its record.

The event log is the one source of a run's numbers; a better estimator here gives better numbers for
old run folders too. Metrics stand in the order of what they come from:

- a `metric` event is a metric;
- a `phase` event is three, its peak of memory, seconds and energy; the last phase of a name counts;
- a `made` event ends a training: the `step` events before it become its losses and speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from effbench.results.records import Metric, Obtained

WARMUP_STEPS = 3
"""Steps left out of the steady-state speed, where there are more."""


@dataclass
class Folded:
    """What events amount to."""

    metrics: list[Metric] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Facts of the finished phases by name."""
    interrupted: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Facts of phases that were stopped and not finished since, earlier parts included."""
    evaluated: list[str] = field(default_factory=list)
    """Names of the files with evaluators' results, in order."""
    plan: dict[str, Any] = field(default_factory=dict)


def fold(events: Iterable[dict[str, Any]], seed: int) -> Folded:
    """Return what the events of a run amount to.

    Args:
        events: All events, in order.
        seed: Of the run, for the resampling of intervals.
    """
    found, places, steps = Folded(), dict[str, int](), list[dict[str, Any]]()
    for event in events:
        facts = {k: v for k, v in event.items() if k not in ("time", "event")}
        kind = event["event"]
        if kind == "metric":
            found.metrics.append(Metric(**facts))
        elif kind == "phase":
            name = facts["name"]
            found.interrupted.pop(name, None)
            found.phases[name] = facts
            place = places.setdefault(name, len(found.metrics))
            found.metrics[place : place + 3 * (len(found.metrics) > place)] = phase_metrics(facts)
        elif kind == "interrupted":
            found.interrupted[facts["name"]] = facts
        elif kind == "step":
            steps.append(facts)
        elif kind == "made" and steps:
            found.metrics += training_metrics(steps, seed, facts.get("loss_unit", "nats/token"))
        elif kind == "note":
            found.notes.append(facts["text"])
        elif kind == "evaluated":
            found.evaluated.append(facts["name"])
        elif kind == "plan":
            found.plan = facts
    return found


def energy_name(obtained: Obtained) -> str:
    """Return the name of an energy's metric: measured and modelled ones never share a column."""
    return "energy_j" if obtained == "measured" else "energy_modelled_j"


def phase_metrics(facts: dict[str, Any]) -> list[Metric]:
    """Return the three metrics of a finished phase."""
    name, obtained = facts["name"], facts["energy"]
    return [
        Metric("peak_bytes", facts["peak_bytes"], "bytes", phase=name),
        Metric("phase_seconds", facts["seconds"], "s", phase=name),
        Metric(energy_name(obtained), facts["joules"], "J", phase=name, obtained=obtained),
    ]


def training_metrics(
    steps: Sequence[dict[str, Any]], seed: int, unit: str = "nats/token"
) -> list[Metric]:
    """Return what the steps of a training amount to.

    Args:
        steps: Facts of the `step` events, in order.
        seed: Of the resampling.
        unit: Of their losses.
    """
    from effbench.stats import median_interval

    losses = [s["loss"] for s in steps]
    tail = max(1, len(losses) // 10)
    steady = steps[WARMUP_STEPS:] or steps
    seconds = [s["seconds"] for s in steady]
    rates = [s["tokens"] / s["seconds"] for s in steady]
    step, low, high = median_interval(seconds, seed=seed)
    speed, slow, fast = median_interval(rates, seed=seed)
    tokens, forwards = (sum(s[name] for s in steps) for name in ("tokens", "layer_forwards"))
    counted: dict[str, Any] = {"phase": "train", "obtained": "counted"}
    rate: dict[str, Any] = {"n": len(rates), "low": slow, "high": fast, "phase": "train"}
    return [
        Metric("train_loss_first", _mean(losses[:tail]), unit, n=tail, phase="train"),
        Metric("train_loss_last", _mean(losses[-tail:]), unit, n=tail, phase="train"),
        Metric("train_steps", steps[-1]["step"], "steps", **counted),
        Metric("train_tokens", tokens, "tokens", **counted),
        Metric("train_layer_forwards", forwards, "positions x layers", **counted),
        Metric("step_seconds", step, "s", n=len(seconds), low=low, high=high, phase="train"),
        Metric("train_tokens_per_second", speed, "tokens/s", **rate),
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
