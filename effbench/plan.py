"""What a run will need before it runs: memory by component, work, and the least time it can take.

Counts are exact; activations and time are models, and are labelled so. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from effbench.config import make_method
from effbench.measure.hardware import memory_bytes
from effbench.methods.base import Cost, Method, chain_cost, chain_shapes
from effbench.shapes import DTYPE_BYTES, Shape
from effbench.spec import Machine, Spec

GRADIENT_BYTES = 4
"""Gradients of trained weights are float32."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "sgd": 0}
"""Bytes of optimiser state per trained weight."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one run. Bytes, FLOPs and seconds."""

    cost: Cost
    memory: dict[str, int]
    """Bytes by component at the peak of the stage's main phase."""
    flops: float
    """FLOPs of all training steps (0 when nothing is trained)."""
    tokens: int
    """Most tokens that training can see."""
    seconds: float | None
    """Least time at the machine's ceilings; None when they are not known."""
    available: int
    """Bytes that the machine has."""
    notes: list[str] = field(default_factory=list)
    trained: int = 0
    """Parameters that train at the most; what is left of them is in `cost`."""

    @property
    def peak(self) -> int:
        """Predicted peak in bytes."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits; None when the machine's memory is not known."""
        return self.peak <= self.available if self.available else None

    def summary(self) -> dict[str, Any]:
        """Return the prediction as plain values, for the record."""
        return {
            "peak_bytes": self.peak,
            "memory": self.memory,
            "flops": self.flops,
            "seconds": self.seconds,
            "cost": asdict(self.cost),
        }


def predict(
    spec: Spec,
    shape: Shape,
    machine: Machine,
    earlier: Sequence[Method] = (),
    folders: Sequence[Path] = (),
) -> Prediction:
    """Return what a run will need.

    Args:
        spec: The run.
        shape: Its model's shape.
        machine: Stated ceilings; zeros are left open.
        earlier: The methods that made what the run starts from, first to last.
        folders: Their artefacts.
    """
    methods, dtype = chain(spec, earlier), spec.hardware.dtype
    cost = chain_cost(methods, shape, dtype, methods[-1].points()[-1], folders)
    train = spec.stage == "train"
    working = cost
    if train:
        start = chain_shapes(earlier, shape, folders)[-1] if earlier else shape
        made = None
        if earlier:
            made = chain_cost(earlier, shape, dtype, earlier[-1].points()[-1], folders)
        working, shape = methods[-1].training_cost(start, dtype, made), start
    else:
        shape = chain_shapes(methods, shape, folders)[-1]
    sequences = spec.train.batch_size if train else 1
    tokens = sequences * spec.dataset.max_length
    element = DTYPE_BYTES[spec.hardware.dtype]
    memory = {"weights": working.resident_bytes}
    flops, total = 0.0, 0
    if train:
        memory |= {
            "gradients": working.trainable * GRADIENT_BYTES,
            "optimiser": working.trainable * OPTIMIZER_BYTES[spec.train.optimizer],
            "activations": _activations(spec, shape, tokens, element),
            "logits": tokens * shape.vocab_size * (2 * element + 8),
        }
        total = spec.train.max_steps * spec.train.accumulation * tokens
        flops = float(total) * _flops_per_trained_token(spec, working, shape)
    else:
        memory |= {
            "kv cache": int(tokens * cost.kv_bytes_per_token),
            "logits": tokens * shape.vocab_size * (element + 4),
        }
    seconds = flops / (machine.tflops * 1e12) if machine.tflops and flops else None
    available = int(machine.memory_gib * 2**30) or free_memory(spec.hardware.device)
    notes = _notes(spec, methods, cost)
    return Prediction(
        cost, memory, flops, total, seconds, available, notes, trained=working.trainable
    )


def chain(spec: Spec, earlier: Sequence[Method]) -> list[Method]:
    """Return all methods that a run's model goes through; an evaluation adds none of its own."""
    own: Method = make_method(spec.method)
    return [*earlier] if spec.stage == "eval" and earlier else [*earlier, own]


def _activations(spec: Spec, shape: Shape, tokens: int, element: int) -> int:
    """Return the bytes that one forward pass keeps for the backward pass.

    Per token and layer: the float32 inputs of both norms, the inputs of the seven linears (in
    float32 where an adapter stands beside them), queries, keys, values, and the four tensors of
    the gated MLP.
    """
    d, inner = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if spec.train.gradient_checkpointing:
        return tokens * d * element * shape.num_layers + _layer(d, inner, q, kv, element) * tokens
    return tokens * shape.num_layers * _layer(d, inner, q, kv, element)


def _layer(d: int, inner: int, q: int, kv: int, element: int) -> int:
    norms = 2 * (4 * d + 2 * element * d)
    linears = 4 * (5 * d + q + inner)
    attention = element * (2 * q + 2 * kv)
    mlp = element * 4 * inner
    return norms + linears + attention + mlp


def _flops_per_trained_token(spec: Spec, cost: Cost, shape: Shape) -> float:
    """Forward, gradients of inputs, gradients of what is trained, and recomputation if any."""
    context = spec.dataset.max_length / 2
    forward = cost.flops_per_token + shape.flops_per_token(int(context)) - shape.flops_per_token()
    recompute = forward if spec.train.gradient_checkpointing else 0.0
    return 2 * forward + 2.0 * cost.trainable + recompute


def _notes(spec: Spec, methods: Sequence[Method], cost: Cost) -> list[str]:
    notes = []
    if cost.saving == "simulated":
        notes.append("The saving is simulated: it is computed, but not held, in fewer bytes.")
    if spec.hardware.device == "cpu" and any(m.weights == "nf4" for m in methods):
        notes.append("On a CPU, 4-bit weights save memory, not time.")
    return notes


def free_memory(device: str) -> int:
    """Return the bytes that are free on this machine's CPU side; 0 where that is not known."""
    return memory_bytes()[1] if device == "cpu" else 0


def render(prediction: Prediction, spec: Spec, machine: Machine) -> str:
    """Return the prediction as text for a terminal."""
    lines = [f"{spec.label} (key {spec.key})", ""]
    width = max(len(k) for k in prediction.memory)
    lines += [f"  {k:<{width}}  {gib(v):>12}" for k, v in prediction.memory.items()]
    lines += [f"  {'peak':<{width}}  {gib(prediction.peak):>12}  (activations are modelled)", ""]
    cost = prediction.cost
    lines.append(f"  parameters       {cost.params:,} ({prediction.trained:,} trained)")
    lines.append(f"  saving           {cost.saving}")
    lines.append(f"  weights read     {gib(cost.bytes_per_token)} per decoded token")
    lines.append(f"  KV cache         {cost.kv_bytes_per_token / 1024:.1f} KiB per token")
    if prediction.flops:
        lines.append(
            f"  training         {prediction.tokens:,} tokens at most, {prediction.flops:.3g} FLOPs"
        )
    if prediction.seconds is not None:
        lines.append(
            f"  least time       {prediction.seconds:,.0f} s at the {machine.tflops:g} TFLOP/s "
            f"of {machine.name} (modelled)"
        )
    lines.append("")
    lines.append("  " + _verdict(prediction, machine))
    lines += [f"  {note}" for note in prediction.notes]
    return "\n".join(lines)


def _verdict(prediction: Prediction, machine: Machine) -> str:
    if prediction.fits is None:
        return f"Whether it fits is open: the memory of {machine.name} is not known here."
    have = gib(prediction.available)
    if prediction.fits:
        return f"It fits: {gib(prediction.peak)} of {have} on {machine.name}."
    worst = max(prediction.memory, key=lambda k: prediction.memory[k])
    advice = {
        "weights": "choose a quantised method (method=qlora) or a smaller model",
        "gradients": "train fewer weights (method=lora)",
        "optimiser": "train fewer weights (method=lora) or train.optimizer=adamw8bit",
        "activations": "train.gradient_checkpointing=true or a smaller train.batch_size",
        "logits": "a smaller train.batch_size or dataset.max_length",
    }.get(worst, "a smaller dataset.max_length")
    return (
        f"It does not fit: {gib(prediction.peak)} of {have} on {machine.name}. "
        f"Most of it is {worst}: {advice}."
    )


def gib(size: float) -> str:
    """Return bytes as GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
