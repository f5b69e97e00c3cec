"""Each of several processes holds a part of every decoder block: fully sharded data parallelism.

Zhao et al., PyTorch FSDP, VLDB 2023, arXiv 2304.11277; the layers are `torch.distributed.fsdp`'s
`fully_shard`. A block's parameters are gathered while it is computed, forward and backward, and its
gradients are summed into the part of each process. Our choice: embedding, last norm and head stay
whole everywhere, because losses multiply by the head without a forward pass of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from effbench.nn.llama.stack import decoder_layers

T = TypeVar("T")


def shard(model: torch.nn.Module, device: torch.device, processes: int) -> None:
    """Leave each process its part of the decoder blocks, in place.

    Args:
        model: A causal language model, whole in every process, with what trains marked.
        device: Where it is.
        processes: How many share it.
    """
    mesh, layers = init_device_mesh(device.type, (processes,)), decoder_layers(model)
    blocks = {parameter for layer in layers for parameter in layer.parameters()}
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    decoder: Any = model.get_submodule(model.base_model_prefix)  # type: ignore[arg-type]
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()) - blocks)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums, as losses are divided by the tokens of all
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def whole(tree: T, keep: bool = True) -> T:
    """Return nested values with whole tensors, in main memory, in the place of parts.

    All processes must ask at the same time; one part is gathered after the other.

    Args:
        tree: Mappings and sequences of values.
        keep: Whether this process wants them; it has empty ones otherwise.
    """

    def gathered(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if keep else full.new_empty(0)

    found: T = tree_map(gathered, tree)
    return found


def like(target: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a whole tensor, if it is a part that `target` is."""
    if not isinstance(target, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh, placements = target.device_mesh, target.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


KERNELS = ("foreach", "fused")
"""Settings of an optimiser that say how it is computed, which depends on what is sharded."""


def parts_of_states(optimizer: torch.optim.Optimizer, states: dict[str, Any]) -> dict[str, Any]:
    """Return an optimiser's whole state dictionary with the parts that its parameters are.

    How updates are computed stays as it is.
    """
    members = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        place: {k: like(members[place], v) if _fits(members[place], v) else v for k, v in s.items()}
        for place, s in states["state"].items()
    }
    groups = [
        {**saved, **{k: now[k] for k in KERNELS if k in now}}
        for saved, now in zip(states["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**states, "state": parts, "param_groups": groups}


def _fits(parameter: torch.Tensor, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def is_sharded(parameters: Sequence[torch.Tensor]) -> bool:
    """Return whether some parameters are parts."""
    return any(isinstance(p, DTensor) for p in parameters)


def clip(parameters: Sequence[torch.Tensor], most: float) -> float:
    """Scale gradients so that the norm of all, parts and whole ones, is at most `most`.

    Returns:
        Their norm before, the same in each process.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds = [[g for g in gradients if isinstance(g, DTensor) is part] for part in (True, False)]
    norms = [float(whole(torch.nn.utils.get_total_norm(k))) for k in kinds if k]
    norm = math.hypot(*norms)
    if norm > most:
        for gradient in gradients:
            gradient.mul_(most / (norm + 1e-6))
    return norm
