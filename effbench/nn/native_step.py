"""A decoding step on a CPU as one call of the C++ kernel, over the weights where they lie."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Self

import torch

from effbench.kernels import native
from effbench.nn.layout import MLP, Attention, Block, untouched

if TYPE_CHECKING:
    from effbench.nn.engine import StaticSession


class NativeStep:
    """Addresses of a model's weights, and of a session's cache as it is at each step."""

    def __init__(self, session: StaticSession, kernels: native.Kernels) -> None:
        self.kernels = kernels
        self.blocks = (native.Layer * len(session.blocks))()
        for pointers, block in zip(self.blocks, session.blocks, strict=True):
            _fill(pointers, block)
        self.sizes = _sizes(session)
        self.sizes.layer = ctypes.cast(self.blocks, ctypes.POINTER(native.Layer))
        self.scratch = torch.empty(0)
        # Kept, so that no address outlives its storage, whatever becomes of the model's parameters.
        self._weights = [p.detach() for p in session.model.parameters()]
        self._seen: torch.Tensor | None = None

    @classmethod
    def of(cls, session: StaticSession) -> Self | None:
        """Return the step of a session whose linears are all plain; None where there is none."""
        inner = session.model.model
        norms = [inner.norm, *(part.norm for b in session.blocks for part in b.parts())]
        fits = (
            session.device.type == "cpu"
            and str(session.dtype) in native.SUFFIXES
            and type(inner.embed_tokens) is torch.nn.Embedding
            and untouched(inner.embed_tokens)
            and inner.embed_tokens.weight.is_contiguous()
            and all(n.weight.dtype == session.dtype for n in norms)
            and all(_fits(block, session) for block in session.blocks)
            and session.head_dim % 2 == 0
            and session.head_dim <= native.LARGEST_HEAD
        )
        kernels = native.kernels() if fits else None
        return None if kernels is None else cls(session, kernels)

    def run(self, session: StaticSession, input_ids: torch.Tensor) -> torch.Tensor:
        """Return logits [B, V] for one token per sequence, [B, 1]; the cache takes the token."""
        self._follow(session)
        if input_ids.shape != (session.batch, 1):
            raise ValueError(f"a step takes one token for each of {session.batch} sequences")
        tokens = input_ids.reshape(-1).long().contiguous()
        if tokens.amin() < 0 or tokens.amax() >= session.model.model.embed_tokens.num_embeddings:
            raise IndexError("a token is not in the vocabulary")
        logits = torch.empty(session.batch, self.sizes.vocab, dtype=session.dtype)
        step = native.Step(
            session.batch,
            session.length,
            session.capacity,
            tokens.data_ptr(),
            session.positions.data_ptr(),
            session.starts.data_ptr(),
            logits.data_ptr(),
            self.scratch.data_ptr(),
            torch.get_num_threads(),
        )
        self.kernels.decode(self.sizes, step, session.dtype)
        return logits

    def _follow(self, session: StaticSession) -> None:
        """Take over the addresses of the cache when it has moved."""
        buffers = [layer.buffers for layer in session.layers]
        if buffers[0][0] is self._seen:  # all layers' buffers are made anew together
            return
        attending = [pointers for pointers in self.blocks if pointers.heads]
        for pointers, (keys, values) in zip(attending, buffers, strict=True):
            pointers.keys, pointers.values = keys.data_ptr(), values.data_ptr()
        self.sizes.cos, self.sizes.sin = session.cos.data_ptr(), session.sin.data_ptr()
        need = self.kernels.scratch_floats(self.sizes, session.batch, session.capacity)
        self.scratch = torch.empty(need, dtype=torch.float32)
        self._seen = buffers[0][0]


def _fits(block: Block, session: StaticSession) -> bool:
    """Whether the matrices of a block fit each other and the width of the model."""
    return all(_part_fits(part, session) for part in block.parts())


def _part_fits(part: Attention | MLP, session: StaticSession) -> bool:
    d, width = session.model.config.hidden_size, session.head_dim
    if isinstance(part, MLP):
        sizes = [(part.inner, d), (part.inner, d), (d, part.inner)]
    else:
        q, kv = part.heads * width, part.kv_heads * width
        if part.head_dim != width or part.scaling != session.scaling:
            return False
        sizes = [(q, d), (kv, d), (kv, d), (d, q)]
    linears: Any = part.linears()
    return [tuple(m.weight.shape) for m in linears] == sizes


def _fill(pointers: native.Layer, block: Block) -> None:
    """Hand over a block; what it lacks has no heads or neurons, and its pointers stay null."""
    if own := block.attention:
        _fill_linears(pointers, own, ("q", "k", "v", "o"))
        pointers.attention_norm = own.norm.weight.data_ptr()
        pointers.heads, pointers.kv_heads = own.heads, own.kv_heads
    if mlp := block.mlp:
        _fill_linears(pointers, mlp, ("gate", "up", "down"))
        pointers.mlp_norm = mlp.norm.weight.data_ptr()
        pointers.inner = mlp.inner


def _fill_linears(pointers: native.Layer, part: Attention | MLP, names: tuple[str, ...]) -> None:
    for name in names:
        linear = getattr(part, name)
        setattr(pointers, name, linear.weight.data_ptr())
        setattr(pointers, f"{name}_bias", _address(linear.bias))


def _sizes(session: StaticSession) -> native.Model:
    model = session.model
    return native.Model(
        hidden=model.config.hidden_size,
        inner=max((b.mlp.inner for b in session.blocks if b.mlp), default=0),
        heads=max(b.attention.heads for b in session.blocks if b.attention),
        head_dim=session.head_dim,
        vocab=model.lm_head.out_features,
        layers=len(session.blocks),
        eps=model.model.norm.variance_epsilon,
        scale=session.scaling,
        embedding=model.model.embed_tokens.weight.data_ptr(),
        norm=model.model.norm.weight.data_ptr(),
        head=model.lm_head.weight.data_ptr(),
        head_bias=_address(model.lm_head.bias),
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
