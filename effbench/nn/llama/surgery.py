"""Finding and replacing the linear layers of a model's decoder blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from effbench.api.shape import LINEARS
from effbench.util.errors import UserError, did_you_mean


def decoder_linears(
    model: torch.nn.Module, targets: Iterable[str] = LINEARS
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield `(qualified name, module)` of the target linears, in the order they run.

    Any module that offers `in_features` and `out_features` counts as a linear, so replaced ones
    are found again.

    Raises:
        UserError: When a target names no layer of the model.
    """
    wanted = tuple(targets)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in wanted and hasattr(module, "in_features")
    ]
    seen = {name.rpartition(".")[2] for name, _ in found}
    for target in wanted:
        if target not in seen:
            raise UserError(
                f"The model has no linear layer called {target!r}.", did_you_mean(target, LINEARS)
            )
    yield from found


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
