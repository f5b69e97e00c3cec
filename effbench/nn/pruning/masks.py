"""Masks on the blocks of a Llama-style model: what pruning would leave, before anything is cut.

A mask of a group or neuron multiplies the input of `o_proj` or `down_proj`; a mask of a dimension
multiplies all that is written into the residual stream: embeddings, and the outputs of `o_proj` and
`down_proj`. Norms take the mean of squares over the sum of the masks, not over the width. With
masks of 0 and 1 the model computes what its slice does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from effbench.nn.llama.attention import NoAttention, NoMLP
from effbench.nn.pruning.blocks import step_masks
from effbench.nn.pruning.slicing import layout_of

NORMS = ("input_layernorm", "post_attention_layernorm")


class Masks(nn.Module):
    """The masks of a model, as its submodule `masks`; all 1 at first.

    `values` [N] float32 and `wanted` [N] bool are what a checkpoint keeps.

    Args:
        model: A `LlamaForCausalLM`, with its adapters if it has any.
    """

    values: torch.Tensor
    wanted: torch.Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layout = layout_of(model)
        device = model.model.embed_tokens.weight.device
        self.register_buffer("values", torch.ones(self.layout.size, device=device))
        self.register_buffer("wanted", torch.ones(self.layout.size, device=device).bool())
        self.on = True
        """Whether the masks are in force; a teacher works without them."""
        self._hooks: list[RemovableHandle] = []
        self._put_in(model)

    @property
    def active(self) -> bool:
        """Whether any mask changes anything."""
        if self._version != self.values._version:
            self._take_note()
        return self.on and self._any_below_one

    def _take_note(self) -> None:
        """Compute anew what follows from the values, whoever has changed them."""
        self._version = self.values._version
        self._any_below_one = bool((self.values < 1).any())
        views = list(self.layout.views(self.values))
        self._parts = []
        for size, view in zip(self.layout.layers, views, strict=True):
            ratio = size.num_heads // max(1, size.num_kv_heads) * self.layout.head_dim
            self._parts.append((view.groups.repeat_interleave(ratio), view.neurons))
        self._dims = self.layout.dims(self.values)
        self._share = self.layout.hidden_size / max(1e-6, float(self._dims.sum()))

    def move(self, rate: float) -> None:
        """Move each mask towards its target by at most `rate`."""
        step_masks(self.values, self.wanted, rate)

    @property
    def hard(self) -> bool:
        """Whether each mask has reached its target."""
        return bool((self.values == self.wanted.float()).all())

    @contextmanager
    def off(self) -> Iterator[None]:
        """Work without masks inside the context."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def remove(self, model: Any) -> None:
        """Take the masks and all that they needed out of the model."""
        for hook in self._hooks:
            hook.remove()
        for owner, name in _norms(model):
            norm = getattr(owner, name)
            if isinstance(norm, MaskedNorm):
                setattr(owner, name, norm.plain)
        del model.masks

    # -- how they are put in -------------------------------------------------------------------

    def _put_in(self, model: Any) -> None:
        self._take_note()
        inner = model.model
        self._hooks.append(inner.embed_tokens.register_forward_hook(self._mask_dims))
        for index, layer in enumerate(inner.layers):
            if not isinstance(layer.self_attn, NoAttention):
                self._around(layer.self_attn.o_proj, index, 0)
            if not isinstance(layer.mlp, NoMLP):
                self._around(layer.mlp.down_proj, index, 1)
        for owner, name in _norms(model):
            setattr(owner, name, MaskedNorm(getattr(owner, name), self))
        model.add_module("masks", self)

    def _around(self, linear: nn.Module, index: int, part: int) -> None:
        def mask_input(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
            if not self.active:
                return None
            x = inputs[0]
            return (x * self._parts[index][part].to(x.dtype),)

        self._hooks.append(linear.register_forward_pre_hook(mask_input))
        self._hooks.append(linear.register_forward_hook(self._mask_dims))

    def _mask_dims(self, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output * self._dims.to(output.dtype) if self.active else None

    @property
    def share(self) -> float:
        """d / d', what a mean over all dimensions is multiplied by to be one over those kept."""
        return self._share if self.active else 1.0


class MaskedNorm(nn.Module):
    """An RMS norm whose mean of squares is taken over the dimensions that masks leave.

    Args:
        norm: The norm it stands for; its weight is shared.
        masks: The masks of the model.
    """

    def __init__(self, norm: Any, masks: Masks) -> None:
        super().__init__()
        self.weight = norm.weight
        # Straight in __dict__ they are no submodules: neither saved nor counted twice.
        vars(self).update(plain=norm, masks=masks)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [B, T, d] for [B, T, d]."""
        masks: Masks = vars(self)["masks"]
        if not masks.active:
            out: torch.Tensor = self.plain(hidden)
            return out
        x = hidden.float()
        square = x.pow(2).mean(-1, keepdim=True) * masks.share
        x = x * torch.rsqrt(square + self.plain.variance_epsilon)
        return self.weight * x.to(hidden.dtype)

    @property
    def plain(self) -> Any:
        """The norm without masks."""
        return vars(self)["plain"]


def _norms(model: Any) -> Iterator[tuple[nn.Module, str]]:
    for layer in model.model.layers:
        yield from ((layer, name) for name in NORMS)
    yield model.model, "norm"


def masks_of(model: nn.Module) -> Masks | None:
    """Return the masks of a model, if it has any."""
    found = getattr(model, "masks", None)
    return found if isinstance(found, Masks) else None
