"""Finds the layer at which numbers stop being finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from effbench.util.errors import UserError


def require_finite(model: torch.nn.Module, values: torch.Tensor, run: Callable[[], Any]) -> None:
    """Refuse values that are not finite, and say in which layer such numbers come up first.

    Args:
        model: The model that gave them.
        values: Any shape.
        run: Repeats the computation that gave them; called only when they are not finite.

    Raises:
        UserError: When a value is NaN or infinite.
    """
    if bool(torch.isfinite(values).all()):
        return
    layer = first_not_finite(model, run)
    where = (
        f"the first layer with such numbers is {layer}" if layer else "no single layer gave them"
    )
    raise UserError(
        f"The model's outputs are NaN or infinite: {where}.",
        "Its weights are damaged, or the dtype is too narrow: try hardware.dtype=float32.",
    )


@torch.no_grad()
def first_not_finite(model: torch.nn.Module, run: Callable[[], Any]) -> str:
    """Return the name of the first module, in the order they run, whose output is not finite.

    Inner modules are done before the ones around them, so the innermost one is named.
    """
    found: list[str] = []
    hooks = []
    for name, module in model.named_modules():

        def look(_: Any, __: Any, output: Any, name: str = name) -> None:
            if not found and any(not bool(torch.isfinite(t).all()) for t in _floats(output)):
                found.append(name or type(model).__name__)

        hooks.append(module.register_forward_hook(look))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def _floats(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _floats(part)
    elif isinstance(output, dict):
        for part in output.values():
            yield from _floats(part)
