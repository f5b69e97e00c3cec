"""Linear layers whose weights lie in memory as packed low-bit codes, and frozen.

The dense weight exists only while it is multiplied: the forward pass expands it and drops it, and
the backward pass expands it again to pass the gradient on to the input. Gradients flow in the same
way in train and eval mode, after any number of changes between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F

from effbench.api.shape import LINEARS
from effbench.api.weights import Packed
from effbench.nn.llama.surgery import decoder_linears, replace_module
from effbench.nn.quant import groupwise, nf4, triton_products
from effbench.nn.quant.alternating import refuse_not_finite
from effbench.nn.quant.layout import ALIGNED, NF4_CODES, Layout
from effbench.util import pages
from effbench.util.c_library import give_back
from effbench.util.cpp import why_off
from effbench.util.errors import UserError
from effbench.util.hardware import has_triton

Backend = Literal["auto", "torch", "bitsandbytes"]
MOST_VECTORS = 8
"""Vectors that a CUDA kernel multiplies codes with; more are faster with the weight expanded."""

TWICE = 2**24
"""Bytes of codes that may be in memory twice while they are moved."""
LINE = 64
"""Bytes of a line of the cache."""


class QuantisedLinear(torch.nn.Linear):
    """Base of the packed layers: y = x W^T + b with a W that is made when it is needed.

    It is a `torch.nn.Linear` so that peft attaches its adapters to it. It has buffers and no weight
    parameter; `weight` is the packed codes, of another shape, so that what would change a dense
    weight in place (merging an adapter, for example) fails instead of being lost.

    Args:
        linear: The layer it stands for: sizes, bias and device are taken from it.
        compute_dtype: What W is expanded to and x is cast to; None takes the dtype of x.
    """

    codes: torch.Tensor
    changes: ClassVar[int] = 0
    """How often an attribute of such a layer was set: while it stays, layouts are as they were."""
    _kept: dict[torch.dtype, torch.Tensor] | None = None
    """The dense weight while it is kept."""

    def __init__(self, linear: torch.nn.Linear, compute_dtype: torch.dtype | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.compute_dtype = compute_dtype

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, and note that layouts may have changed."""
        super().__setattr__(name, value)
        QuantisedLinear.changes += 1

    @property
    def logical_params(self) -> int:
        """The weights that the packed codes stand for, and the bias."""
        return self.in_features * self.out_features + (
            0 if self.bias is None else self.out_features
        )

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The packed codes, uint8."""
        return self.codes

    @property
    def rounds_inputs(self) -> bool:
        """Whether x is rounded too, so that no dense weight says what a product is."""
        return False

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W expanded, [d_out, d_in] in `dtype`."""
        raise NotImplementedError

    def layout(self) -> Layout | None:
        """Return how the codes lie, where kernels can multiply them; None where they cannot."""
        return None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T, [..., d_out], without a gradient; of a few vectors on a GPU by a kernel."""
        layout = self.layout() if x.numel() <= MOST_VECTORS * self.in_features else None
        if layout is not None and self.streams(x.device):
            return triton_products.product(layout, self.weight, x, self.out_features)
        return F.linear(x, self._kept_weight(x.dtype))

    def streams(self, device: torch.device) -> bool:
        """Whether a few vectors are multiplied with the codes as they lie on this device.

        That is a CUDA device with Triton; EFFBENCH_NATIVE=0 turns it off.
        """
        return triton_runs(device) and triton_products.multiplies(self.layout(), self.weight)

    def _kept_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W expanded; inside `expanded_once` it stays."""
        if self._kept is None:
            return self.dense_weight(dtype)
        if dtype not in self._kept:
            self._kept[dtype] = self.dense_weight(dtype)
        return self._kept[dtype]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return [..., d_out] in the dtype of `input`, [..., d_in]."""
        out: torch.Tensor = _Product.apply(input.to(self.compute_dtype or input.dtype), self)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.to(input.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move to devices; keep the dtypes, for a cast of the scales would change the weights."""
        scales = {n: b for n, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        QuantisedLinear.changes += 1
        for name, scale in scales.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != scale.dtype:
                self._buffers[name] = scale.to(moved.device)
        return self

    def _set(self, stored: Iterable[tuple[str, torch.Tensor | None]]) -> Self:
        for name, tensor in stored:
            self.register_buffer(name, tensor)
        QuantisedLinear.changes += 1
        return self


def triton_runs(device: torch.device) -> bool:
    """Whether our Triton kernels are used there: on a CUDA device, unless EFFBENCH_NATIVE=0."""
    return device.type == "cuda" and has_triton() and not why_off()


class _Product(torch.autograd.Function):
    """x W^T of a quantised layer; the graph keeps the layer, not its dense weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dense_weight(grad.dtype), None


class NF4Linear(QuantisedLinear):
    """A linear with NF4 weights; its four buffers are those of `effbench.nn.quant.nf4.NF4`.

    The backend only says who expands them: PyTorch or bitsandbytes' kernels, from the same buffers
    and, on a CPU, to the same bits. `auto` is PyTorch on a CPU, where it is as fast, and
    bitsandbytes elsewhere, where a fused kernel multiplies without expanding.
    """

    absmax: torch.Tensor
    absmax_scales: torch.Tensor
    offset: torch.Tensor

    def __init__(
        self,
        linear: torch.nn.Linear,
        compute_dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(linear, compute_dtype)
        if backend == "bitsandbytes" and not nf4.bitsandbytes_available():
            raise UserError(
                "bitsandbytes cannot be imported here.", "Install it, or use the torch backend."
            )
        self.backend = backend

    @classmethod
    def quantise(
        cls,
        linear: torch.nn.Linear,
        compute_dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> Self:
        """Return `linear` with its weight rounded to NF4; the bias is shared."""
        stored = nf4.quantise(linear.weight)
        return cls(linear, compute_dtype, backend)._set(stored._asdict().items())

    @classmethod
    def empty(
        cls,
        linear: torch.nn.Linear,
        compute_dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> Self:
        """Return a layer in the place of `linear` that waits for a state dict."""
        stored = nf4.empty(linear.in_features * linear.out_features, linear.weight.device)
        return cls(linear, compute_dtype, backend)._set(stored._asdict().items())

    @property
    def stored(self) -> nf4.NF4:
        """The buffers as one value."""
        return nf4.NF4(self.codes, self.absmax, self.absmax_scales, self.offset)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W expanded, [d_out, d_in] in `dtype`."""
        expand = nf4.dequantise_bitsandbytes if self._fast() else nf4.dequantise
        return expand(self.stored, (self.out_features, self.in_features), dtype)

    def layout(self) -> Layout | None:
        """Return how the codes lie; None where rows do not end with whole halves of a block."""
        if self.in_features % ALIGNED:
            return None
        levels = nf4.dynamic_levels(self.codes.device)
        scales, second = self.absmax, self.absmax_scales
        return Layout(NF4_CODES, nf4.BLOCK, scales, second, levels, self.offset)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T, [..., d_out], without a gradient; fused on a GPU."""
        if x.is_cuda and self._fast() and self.in_features % nf4.BLOCK == 0:
            return nf4.product_bitsandbytes(x, self.stored, (self.out_features, self.in_features))
        return super().product(x)

    def _fast(self) -> bool:
        if self.backend == "auto":
            return self.codes.device.type != "cpu" and nf4.bitsandbytes_available()
        return self.backend == "bitsandbytes"


class PackedLinear(QuantisedLinear):
    """A linear with round-to-nearest weights of b bits; its buffers are those of `Groups`.

    Args:
        linear: The layer it stands for.
        bits: Bits per code, 2 to 8.
        group_size: Neighbouring weights of a row that share one scale.
        symmetric: Whether there is no zero point.
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __init__(
        self, linear: torch.nn.Linear, bits: int, group_size: int, symmetric: bool = False
    ) -> None:
        super().__init__(linear)
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric

    @classmethod
    def quantise(
        cls, linear: torch.nn.Linear, bits: int, group_size: int, symmetric: bool = False
    ) -> Self:
        """Return `linear` with its weight rounded to the nearest codes; the bias is shared.

        Raises:
            UserError: When the weight is not finite.
        """
        refuse_not_finite(linear.weight)
        stored = groupwise.quantise(linear.weight, bits, group_size, symmetric)
        return cls(linear, bits, group_size, symmetric)._set(stored._asdict().items())

    @classmethod
    def empty(
        cls, linear: torch.nn.Linear, bits: int, group_size: int, symmetric: bool = False
    ) -> Self:
        """Return a layer in the place of `linear` that waits for a state dict."""
        sizes = linear.in_features, linear.out_features
        stored = groupwise.empty(*sizes, bits, group_size, symmetric, linear.weight.device)
        return cls(linear, bits, group_size, symmetric)._set(stored._asdict().items())

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W expanded, [d_out, d_in] in `dtype`."""
        stored = groupwise.Groups(self.codes, self.scales, self.zeros)
        return groupwise.dequantise(stored, self.in_features, self.bits, self.group_size, dtype)

    def dense_rows(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of W expanded, [R, d_in] in `dtype`, by their numbers [R]."""
        stored = groupwise.Groups(self.codes, self.scales, self.zeros)
        sizes = self.in_features, self.bits, self.group_size
        return groupwise.dequantise_rows(stored, rows, *sizes, dtype)

    def layout(self) -> Layout | None:
        """Return how the codes lie; None for ragged groups."""
        group = min(self.group_size, self.in_features)
        if self.in_features % ALIGNED or group % ALIGNED:
            return None
        return Layout(self.bits, group, self.scales, self.zeros)

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}, {kind}"


def dense_linears(
    model: torch.nn.Module, targets: Iterable[str] = LINEARS
) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Yield the target linears, and hold none of them, so that replaced ones are freed at once.

    Raises:
        UserError: When one of them does not have a dense weight any more.
    """
    for name in [name for name, _ in decoder_linears(model, targets)]:
        linear = model.get_submodule(name)
        if not isinstance(linear, torch.nn.Linear) or isinstance(linear, QuantisedLinear):
            raise UserError(
                f"{name} is a {type(linear).__name__}, not a dense linear layer.",
                "Quantise the base model, before any other method has changed its layers.",
            )
        yield name, linear


def pack_linears(
    model: torch.nn.Module,
    weights: Packed,
    compute_dtype: torch.dtype,
    targets: Iterable[str] = LINEARS,
) -> list[str]:
    """Replace the decoder's linears by packed ones, in place, and return their names.

    Embeddings, norms and head stay as they are.

    Args:
        model: What is changed.
        weights: The packed format.
        compute_dtype: What weights are expanded to.
        targets: Linears by the last part of their names.
    """
    names = []
    for name, linear in dense_linears(model, targets):
        replace_module(model, name, weights.quantise(linear, compute_dtype))
        names.append(name)
    return names


@contextmanager
def expanded_once(module: torch.nn.Module) -> Iterator[None]:
    """Keep the dense weight of each packed layer of `module`, once it is expanded, to the end.

    For several forward passes over the same weights, without gradients. A kernel that multiplies
    without expanding is left to do so.
    """
    layers = [m for m in module.modules() if isinstance(m, QuantisedLinear)]
    for layer in layers:
        layer._kept = {}
    try:
        yield
    finally:
        for layer in layers:
            layer._kept = None


def lay_together(layers: Iterable[QuantisedLinear]) -> None:
    """Move the buffers of packed layers on a CPU into one piece of memory, in their order.

    It begins with a huge page, and each buffer with a line of the cache; more than `pages.MOST`
    bytes stay where they are. Codes that were made one by one lie where dense weights lay before
    them, far from each other.
    """
    layers = dict.fromkeys(layers)  # blocks may share some
    places = [(x, n) for x in layers for n, b in x._buffers.items() if b is not None]
    held = [layer.get_buffer(name) for layer, name in places]
    total = sum(_in_lines(b.nbytes) for b in held)
    together = len({b.untyped_storage()._cdata for b in held}) <= 1
    if together or total > pages.MOST or any(b.device.type != "cpu" for b in held):
        return
    held.clear()
    with torch.inference_mode(False), torch.no_grad():
        room = torch.empty(total + pages.HUGE, dtype=torch.uint8)
        begin = kept = -room.data_ptr() % pages.HUGE
        for layer, name in places:
            old = layer.get_buffer(name)
            new = room[begin : begin + old.nbytes].view(old.dtype).view(old.shape)
            setattr(layer, name, new.copy_(old))
            begin += _in_lines(old.nbytes)
            del old
            if begin - kept > TWICE:
                kept = begin
                give_back()
    give_back()


def _in_lines(size: int) -> int:
    return -(size // -LINE) * LINE


def storage_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters and persistent buffers, each storage counted once.

    Tied weights are one storage. What a model makes anew when it is built (rotary angles) and
    constants of a format (code books) are not counted; the scales and the offset that bitsandbytes'
    own 4-bit layers keep beside their parameter are.
    """
    sizes = {
        (t.untyped_storage()._cdata, t.storage_offset()): t.numel() * t.element_size()
        for t in _stored_tensors(model)
    }
    return sum(sizes.values())


def persistent_buffers(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield what a model holds beside its parameters and writes with them."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def _stored_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from persistent_buffers(model)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            yield parameter
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                yield from (state.absmax, state.state2.absmax, state.offset)
