"""A prediction as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from effbench.api.spec import Machine, Spec
from effbench.api.stages.base import trains
from effbench.resources.predict import Phase, Prediction
from effbench.resources.usage import format_bytes


def render(prediction: Prediction, spec: Spec, machine: Machine, rows: int = 0) -> str:
    """Return the prediction as text for a terminal; training rows are 0 where not known."""
    lines = [f"{spec.label} (key {spec.key})", "", *_table(prediction.phases), ""]
    cost = prediction.cost
    lines.append(f"  parameters       {cost.params:,} ({prediction.trained:,} trained)")
    lines.append(f"  saving           {cost.saving}")
    decodes = cost.kv_bytes_per_token or cost.kv_bytes_per_sequence
    if cost.per_token and decodes:
        lines.append(f"  weights read     {format_bytes(cost.bytes_per_token)} per decoded token")
        grows = f"{cost.kv_bytes_per_token / 1024:.1f} KiB per token"
        lines.append(f"  KV cache         {', '.join([grows, *cost.kept])}")
    if cost.kv_bytes_per_sequence:
        kib = cost.kv_bytes_per_sequence / 1024
        lines.append(f"  state            {kib:.1f} KiB per sequence, however long it is")
    if prediction.reads:
        lines.append(
            f"  before training  {prediction.reads:,} sequences read, "
            f"{prediction.read_flops:.3g} FLOPs at most"
        )
    if trains(spec.stage):
        lines.append(f"  training         {spec.train.told(rows)}")
    if prediction.flops:
        lines.append(
            f"                   {prediction.tokens:,} tokens at most, {prediction.flops:.3g} FLOPs"
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


def _table(phases: Sequence[Phase]) -> list[str]:
    """Return one column per phase and one row per component."""
    rows = list(dict.fromkeys(k for p in phases for k in p.memory))
    width = max(map(len, [*rows, "peak"]))
    lines = [f"  {'':<{width}}" + "".join(f"  {p.name:>12}" for p in phases)]
    for row in rows:
        cells = (format_bytes(p.memory[row]) if row in p.memory else "" for p in phases)
        lines.append((f"  {row:<{width}}" + "".join(f"  {c:>12}" for c in cells)).rstrip())
    peaks = "".join(f"  {format_bytes(p.peak):>12}" for p in phases)
    note = "  Beside Python and its libraries. Workspace and allocator are modelled."
    return [*lines, f"  {'peak':<{width}}{peaks}", "", note]


def _verdict(prediction: Prediction, machine: Machine) -> str:
    if prediction.fits is None:
        return f"Whether it fits is open: the memory of {machine.name} is not known here."
    have = format_bytes(prediction.available)
    if prediction.fits:
        return f"It fits: {format_bytes(prediction.peak)} of {have} on {machine.name}."
    worst = max(prediction.memory, key=lambda k: prediction.memory[k])
    advice = {
        "weights": "choose a quantised method (method=qlora) or a smaller model",
        "gradients": "train fewer weights (method=lora)",
        "optimiser": "train fewer weights (method=lora) or train.optimizer=adamw8bit",
        "activations": "train.gradient_checkpointing=true or a smaller train.batch_size",
        "logits": "a smaller batch or dataset.max_length",
        "kv cache": "a smaller batch or fewer tokens",
        "other points": "fewer operating points or a smaller batch",
    }.get(worst, "a smaller model")
    return (
        f"It does not fit: {format_bytes(prediction.peak)} of {have} on {machine.name}. "
        f"Most of it is {worst}: {advice}."
    )
