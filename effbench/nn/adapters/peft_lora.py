"""The LoRA layers of peft: put into a model, found again, and written as its files."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import save_file

from effbench.nn.adapters.lowrank import Factors, init_a
from effbench.nn.llama.experts import OUT, has_experts, layers_of
from effbench.nn.llama.stack import base_name, decoder_layers, turned_in_files
from effbench.nn.model_kinds.base import CAUSAL, ModelKind, freeze, kind_of
from effbench.util.errors import UserError

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
    # Given a model with experts, peft would look for the tensors that transformers holds them in.
    # Around other kinds' blocks stand linears whose names are those of some inside.
    freeze(model)
    alone = has_experts(model) or kind_of(model).name != CAUSAL
    place = decoder_layers(model) if alone else model
    # peft draws a start of its own; the numbers that training draws must not depend on that.
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, place)
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


@dataclass(frozen=True)
class Base:
    """What an adapter is loaded onto."""

    name: str = ""
    """Hub id or folder."""
    turned: bool = False
    """Whether it holds its weights as [d_in, d_out], as GPT-2 does."""
    experts: tuple[str, ...] = ()
    """Where its experts are, each layer's a module of transformers with single tensors."""
    config: Any = None
    """Of transformers."""
    task: str = ModelKind.task
    """What peft calls its work."""
    heads: Mapping[str, torch.nn.Module] = field(default_factory=dict)
    """What learns beside any adapter, by qualified name."""


def base_of(model: torch.nn.Module) -> Base:
    """Return what adapters of a model are loaded onto."""
    places, kind = tuple(name for name, _ in layers_of(model)), kind_of(model)
    config = getattr(model, "config", None)
    turned, heads = turned_in_files(model), dict(kind.heads(model))
    return Base(base_name(model), turned, places, config, kind.task, heads)


def write_adapter(adapter: PeftAdapter, folder: Path, base: Base) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads.

    Args:
        adapter: What is written.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` go.
        base: What it is for.

    Raises:
        UserError: When peft has no place for adapters on experts like these.
    """
    rank = max(len(a) for a, _ in adapter.factors.values())
    inside = tuple(f"{place}." for place in base.experts)
    own = {n: f for n, f in adapter.factors.items() if not (inside and n.startswith(inside))}
    experts = {n: f for n, f in adapter.factors.items() if n not in own}
    config = _config(adapter, own, rank, base)
    tensors = {f"{name}.{key}": t for name, pair in own.items() for key, t in _named(pair)}
    if experts:
        stacks = _stacks(experts, base.experts, rank)
        config.target_parameters = sorted({_ends(place, name) for place, name in stacks})
        _require_room(adapter, config, base)
        for (place, name), pair in stacks.items():
            # peft puts one layer around the other, outside that of the tensor defined last.
            path = f"{place}.base_layer" if name != OUT and (place, OUT) in stacks else place
            tensors |= {f"{path}.{key}": t for key, t in _named(pair)}
    tensors |= {f"{n}.lora_magnitude_vector": norms for n, norms in adapter.magnitudes.items()}
    tensors |= {f"{n}.weight": weight for n, weight in adapter.whole.items()}
    for name, head in base.heads.items():
        tensors |= {f"{name}.{part}": weight for part, weight in head.named_parameters()}
    config.save_pretrained(str(folder))
    save_file(
        {f"base_model.model.{n}": t.detach().cpu().contiguous() for n, t in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def _config(
    adapter: PeftAdapter, factors: Mapping[str, Factors], rank: int, base: Base
) -> LoraConfig:
    """Return the settings of an adapter whose modules are those of `factors`."""
    lower = {name: len(a) for name, (a, _) in factors.items() if len(a) < rank}
    targets = [t for t in adapter.targets if any(f".{n}".endswith(f".{t}") for n in factors)]
    if base.task != ModelKind.task:  # where a name inside a block may stand outside of them too
        targets = list(factors)
    return LoraConfig(
        r=rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        fan_in_fan_out=base.turned,
        rank_pattern=lower,
        alpha_pattern={name: adapter.alpha * r / rank for name, r in lower.items()},
        use_dora=bool(adapter.magnitudes),
        modules_to_save=[*adapter.whole, *base.heads] or None,
        task_type=base.task,
        base_model_name_or_path=base.name,
        inference_mode=True,
    )


def _named(factors: Factors) -> Iterator[tuple[str, torch.Tensor]]:
    yield from zip(("lora_A.weight", "lora_B.weight"), factors, strict=True)


def _stacks(
    factors: Mapping[str, Factors], places: Iterable[str], rank: int
) -> dict[tuple[str, str], Factors]:
    """Return all experts' factors in one pair, A [E r, d_in] and B [d_out, r E], r outside of E.

    Keys are where a layer's experts are and the name of their linear. Lower ranks are filled up
    with zeros, which changes no product.
    """
    found: dict[tuple[str, str], list[Factors]] = {}
    for place in places:
        for name, (a, b) in factors.items():
            if name.startswith(f"{place}."):
                last = name.rpartition(".")[2]
                more = rank - len(a)
                pair = F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))
                found.setdefault((place, last), []).append(pair)
    return {
        key: (torch.cat([a for a, _ in pairs]), torch.stack([b for _, b in pairs], -1).flatten(1))
        for key, pairs in found.items()
    }


def _ends(place: str, name: str) -> str:
    """Return the end of a tensor's name that is the same in every layer."""
    return f"{place.rpartition('.')[2]}.{name}"


def _require_room(adapter: PeftAdapter, config: LoraConfig, base: Base) -> None:
    """Refuse what peft would load in another way.

    Raises:
        UserError: For DoRA, and where peft takes names of linears for those of experts.
    """
    read = copy.deepcopy(config)
    holder: Any = SimpleNamespace(config=base.config)
    convert_peft_config_for_transformers(read, holder, None)
    if adapter.magnitudes:
        reason = "it has no DoRA on experts"
    elif set(read.target_modules or ()) != set(config.target_modules or ()):
        odd = sorted({*(config.target_modules or ())} - {*(read.target_modules or ())})
        reason = f"it takes {odd[0]} for a name of the experts' alone"
    else:
        return
    raise UserError(
        f"peft has no place for this adapter: {reason}.", "Write a whole model: --to transformers."
    )
