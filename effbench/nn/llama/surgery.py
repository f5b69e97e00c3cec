"""Finding and replacing the linear layers of a model's decoder blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from effbench.api.parts import ROUTERS
from effbench.api.shape import LINEARS
from effbench.nn.llama.experts import has_experts
from effbench.nn.llama.stack import decoder_layers
from effbench.util.errors import UserError, did_you_mean


def decoder_linears(
    model: torch.nn.Module, targets: Iterable[str] = LINEARS
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield `(qualified name, module)` of the target linears, in the order they run.

    Any module that offers `in_features` and `out_features` counts as a linear, so replaced ones
    are found again. `LINEARS` means all linears of the blocks where these have other names, or
    experts.

    Raises:
        UserError: When a target names no layer of the model.
    """
    wanted = tuple(targets)
    if set(wanted) == set(LINEARS):
        known = linear_names(model)
        wanted = wanted if set(LINEARS) <= {*known} and not has_experts(model) else known
    inside = {id(module) for module in decoder_layers(model).modules()}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in wanted
        and hasattr(module, "in_features")
        and id(module) in inside
    ]
    seen = {name.rpartition(".")[2] for name, _ in found}
    for target in wanted:
        if target not in seen:
            raise UserError(
                f"The model has no linear layer called {target!r}.",
                did_you_mean(target, linear_names(model)),
            )
    yield from found


def linear_names(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the linears of a model's blocks, not of what is inside of them.

    What chooses among experts is none of them.
    """
    found: dict[str, None] = {}
    routers = ROUTERS if has_experts(model) else ()
    for block in decoder_layers(model):
        inside = ""
        for name, module in block.named_modules():
            if hasattr(module, "in_features") and not (inside and name.startswith(inside)):
                found[name.rpartition(".")[2]] = None
                inside = f"{name}."
    return tuple(name for name in found if name not in routers)


def replace_module(model: torch.nn.Module, name: str, new: torch.nn.Module) -> None:
    """Put `new` where the submodule `name` is."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def replace_linears(
    model: torch.nn.Module,
    make: Callable[[str, torch.nn.Module], torch.nn.Module],
    targets: Iterable[str] = LINEARS,
) -> list[str]:
    """Replace every target linear by `make(name, linear)`; return their names."""
    names = []
    for name, linear in list(decoder_linears(model, targets)):
        replace_module(model, name, make(name, linear))
        names.append(name)
    return names
