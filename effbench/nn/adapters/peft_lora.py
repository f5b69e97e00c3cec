"""The LoRA layers of peft: put into a model, found again, and written as its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from effbench.nn.adapters.lowrank import Factors, init_a

Adapters = Iterator[tuple[str, torch.nn.Linear, torch.nn.Linear]]
"""Qualified name, A and B of each adapted layer."""


def inject(
    model: torch.nn.Module,
    targets: Iterable[str],
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
) -> torch.nn.Module:
    """Freeze `model` and put peft's layers around its targets, in float32; A is ours, B zero.

    Args:
        model: The base; changed in place.
        targets: Names of the linears.
        rank: R.
        alpha: Numerator of the scale alpha / R.
        dropout: Probability of dropping an adapter input in training.
        seed: What A starts from, together with the layer's name.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(targets),
    )
    # peft draws a start of its own; the numbers that training draws must not depend on that.
    with torch.random.fork_rng(devices=[]):
        model = inject_adapter_in_model(config, model)
    for name, a, b in peft_adapters(model):
        a.float()
        b.float()
        init_a(a.weight, seed, name)
    return model


def peft_adapters(model: torch.nn.Module) -> Adapters:
    """Yield `(qualified name, A, B)` of every layer that peft put an adapter on."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A["default"], module.lora_B["default"]
            assert isinstance(a, torch.nn.Linear)
            assert isinstance(b, torch.nn.Linear)
            yield name, a, b


def holds(module: torch.nn.Module) -> bool:
    """Whether a module is a layer that peft put an adapter on."""
    return isinstance(module, LoraLayer)


def peft_update(linear: torch.nn.Module) -> tuple[torch.nn.Module, torch.Tensor] | None:
    """Return what peft's adapter is put on and its update [d_out, d_in]; None for other layers."""
    if not isinstance(linear, LoraLayer):
        return None
    factors: Any = [part["default"].weight for part in (linear.lora_A, linear.lora_B)]
    a, b = (factor.detach().float() for factor in factors)
    base: Any = linear.get_base_layer()
    return base, linear.scaling["default"] * (b @ a)


@dataclass(frozen=True)
class PeftAdapter:
    """What peft can hold: plain LoRA, or DoRA."""

    factors: Mapping[str, Factors]
    """By the qualified name of their layer; their ranks may differ."""
    alpha: float
    """The scale of every layer is alpha / r, with r the highest rank."""
    targets: tuple[str, ...]
    """Names of the adapted linears."""
    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Weights of modules that were trained in full, by the qualified name of the module."""
    magnitudes: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Norms [d_out] of the rows by the qualified name of their layer, for DoRA."""


def write_adapter(
    adapter: PeftAdapter, folder: Path, base_model: str, turned: bool = False
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads.

    Args:
        adapter: What is written.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` go.
        base_model: Hub id or folder of the base model.
        turned: Whether the base holds its weights as [d_in, d_out], as GPT-2 does.
    """
    factors, alpha = adapter.factors, adapter.alpha
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    rank = max(ranks.values())
    lower = {name: r for name, r in ranks.items() if r < rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=list(adapter.targets),
        fan_in_fan_out=turned,
        rank_pattern=lower,
        alpha_pattern={name: alpha * r / rank for name, r in lower.items()},
        use_dora=bool(adapter.magnitudes),
        modules_to_save=list(adapter.whole) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.detach().cpu().contiguous()
    for name, norms in adapter.magnitudes.items():
        key = f"base_model.model.{name}.lora_magnitude_vector"
        tensors[key] = norms.detach().cpu().contiguous()
    for name, weight in adapter.whole.items():
        tensors[f"base_model.model.{name}.weight"] = weight.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
