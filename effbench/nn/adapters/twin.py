"""A second set of the trained weights beside the first, over one frozen base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

TWIN = "twin"
"""Name of the second set in the model."""


def add_twin(model: nn.Module, owners: Sequence[nn.Module]) -> None:
    """Copy the weights of some modules into a second set, which trains too.

    Args:
        model: Gets the set.
        owners: Modules with a `weight` that trains, in a fixed order.
    """
    copies = [nn.Parameter(_weight(m).detach().clone()) for m in owners]
    model.add_module(TWIN, nn.ParameterList(copies))


def remove_twin(model: nn.Module) -> None:
    """Leave the first set alone."""
    delattr(model, TWIN)


def has_twin(model: nn.Module) -> bool:
    """Whether there is a second set."""
    return TWIN in model._modules


def twin_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the second set."""
    return list(model.get_submodule(TWIN).parameters())


@contextmanager
def twin_in_place(model: nn.Module, owners: Sequence[nn.Module]) -> Iterator[None]:
    """Let the model compute with the second set inside the context, and its gradients go there.

    Args:
        model: With a twin.
        owners: As in `add_twin`.
    """
    first = [_weight(m) for m in owners]
    try:
        _put(owners, twin_of(model))
        yield
    finally:
        _put(owners, first)


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _put(owners: Sequence[nn.Module], weights: Sequence[nn.Parameter]) -> None:
    for module, weight in zip(owners, weights, strict=True):
        module.weight = weight


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Drop nothing inside the context, so that losses of both sets can be compared."""
    dropping = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training]
    for module in dropping:
        module.eval()
    yield
    for module in dropping:
        module.train()
