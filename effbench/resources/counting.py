"""Counting instead of measuring: parameters of a model, FLOPs of a computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Parameters(NamedTuple):
    """Parameters of a model, tied ones once."""

    total: int
    trainable: int


def parameters(model: torch.nn.Module) -> Parameters:
    """Return how many distinct parameters a model has, and how many of them train.

    Weights that share storage count once. 4-bit weights of bitsandbytes count as many as they
    stand for. Where a module has an integer `logical_params`, that number stands for its own frozen
    parameters and packed buffers; the modules inside it are counted as usual.
    """
    total = trainable = 0
    seen: set[Hashable] = set()
    for module in model.modules():
        logical = getattr(module, "logical_params", None)
        if isinstance(logical, int):
            total += logical
        for parameter in module.parameters(recurse=False):
            identity = _identity(parameter)
            if identity in seen:
                continue
            seen.add(identity)
            size = _logical_size(parameter)
            trainable += size if parameter.requires_grad else 0
            if parameter.requires_grad or not isinstance(logical, int):
                total += size
    return Parameters(total, trainable)


class LayerForwards:
    """Counts the positions that go through each decoder block of a model.

    Padding and recomputation are among them: it is the work that was done.

    Args:
        layers: The blocks.
    """

    def __init__(self, layers: Iterable[torch.nn.Module]) -> None:
        self.count = 0
        """Summed over blocks."""
        self._hooks = [layer.register_forward_pre_hook(self._add) for layer in layers]

    def _add(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.count += inputs[0].shape[:-1].numel()

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()


def flops(work: Callable[[], object]) -> int:
    """Return the FLOPs of the matrix products and attention inside `work`, backward included.

    A multiply-add counts as two. Custom kernels that PyTorch knows no formula for count nothing.
    """
    with _Products() as counter:
        work()
    return counter.flops


class _Products(TorchDispatchMode):
    """Adds up what torch's formulas state of each operation.

    torch's own `FlopCounterMode` also keeps them apart by module, which takes most of its time.
    """

    flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket)
        if formula is None and _is_made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        return out


@cache
def _is_made_of_others(func: Any) -> bool:
    """Whether an operation, like `linear` in inference mode, is a composition of others."""
    return bool(func._can_decompose())


def _identity(parameter: torch.nn.Parameter) -> Hashable:
    """Return what two parameters have in common when they are the same memory."""
    pointer = parameter.untyped_storage().data_ptr() if not parameter.is_meta else 0
    if pointer == 0:
        return id(parameter)
    return pointer, parameter.storage_offset(), parameter.numel()


def _logical_size(parameter: torch.nn.Parameter) -> int:
    """Return the weights in a parameter, before bitsandbytes packed two of them in a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()
