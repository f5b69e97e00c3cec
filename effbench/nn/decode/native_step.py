"""Decoding on a CPU as one call of the C++ kernel a step, over the weights where they lie."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, Self

import torch

from effbench.nn.decode import native
from effbench.nn.llama.parts import MLP, Attention, Block
from effbench.nn.llama.walk import plain, untouched
from effbench.nn.quant.embedding import PackedEmbedding
from effbench.nn.quant.linears import QuantisedLinear, lay_together
from effbench.util.pages import use_huge_pages

if TYPE_CHECKING:
    from effbench.nn.decode.step import Runs, StandIn, StepSession


class NativeStep:
    """Addresses of a model's weights, and of a session's cache as it is at each step."""

    def __init__(self, session: StepSession, kernels: native.Kernels) -> None:
        self.kernels = kernels
        self.blocks = (native.Layer * len(session.blocks))()
        self.sizes = _sizes(session)
        self.sizes.layer = ctypes.cast(self.blocks, ctypes.POINTER(native.Layer))
        self.scratch = torch.empty(0)
        self._rows = 0
        """Rows that the scratch has room for."""
        self.weights: list[torch.Tensor] = []
        """Kept, so that no address outlives its storage, whatever becomes of the model."""
        self._changes = 0
        """Of packed linears, when their weights were noted."""
        self._take_weights(session)
        self._seen: list[torch.Tensor] = []
        self._runs: dict[Runs, Any] = {}

    @classmethod
    def of(cls, session: StepSession) -> Self | None:
        """Return the step of a session whose linears can be read as they lie; None otherwise."""
        inner, head = session.model.model, session.model.lm_head
        parts = [part for block in session.blocks for part in block.parts()]
        norms = [inner.norm, *(part.norm for part in parts)]
        linears = [head, *(linear for part in parts for linear in part.linears())]
        fits = (
            session.device.type == "cpu"
            and untouched(inner.norm)
            and all(readable(linear, session.dtype) for linear in linears)
            and str(session.dtype) in native.SUFFIXES
            and untouched(inner.embed_tokens)
            and _looked_up(inner.embed_tokens, session.dtype)
            and all(n.weight.dtype == session.dtype for n in norms)
            and all(_fits(block, session) for block in session.blocks)
            and _queries_last(session.blocks)
            and session.head_dim % 2 == 0
            and session.head_dim <= native.LARGEST_HEAD
            and all(_stand_in_fits(s, session) for s in session.stand_ins.items())
        )
        kernels = native.kernels() if fits else None
        return None if kernels is None else cls(session, kernels)

    def settle(self, session: StepSession) -> None:
        """Move what each step reads together and onto huge pages, before any clock runs."""
        self.weights = []  # else all would be there twice until the last has moved
        lay_together(session.packed)
        self._take_weights(session)
        use_huge_pages(self.weights)

    def run(self, session: StepSession, input_ids: torch.Tensor, runs: Runs) -> torch.Tensor:
        """Return logits [B, V] for one token per sequence, [B, 1]; the cache takes the token.

        Blocks that do not run are left out, or have their stand-ins.
        """
        if input_ids.shape != (session.batch, 1):
            raise ValueError(f"a step takes one token for each of {session.batch} sequences")
        tokens = input_ids.reshape(-1).long().contiguous()
        if tokens.amin() < 0 or tokens.amax() >= session.model.model.embed_tokens.num_embeddings:
            raise IndexError("a token is not in the vocabulary")
        logits = torch.empty(session.batch, self.sizes.vocab, dtype=session.dtype)
        step = native.Step(
            session.batch,
            tokens.data_ptr(),
            session.positions.data_ptr(),
            session.starts.data_ptr(),
            logits=logits.data_ptr(),
            width=1,
            last=len(session.blocks),
        )
        self._call(session, self.sizes, step, runs)
        return logits

    def run_blocks(
        self,
        session: StepSession,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        starts: torch.Tensor,
        blocks: range,
    ) -> torch.Tensor:
        """Return what blocks make of hidden states [B, W, d]; their caches take the positions.

        Args:
            session: Has room for them in its caches.
            hidden: Of W positions of each sequence, which follow those in the caches.
            positions: Rotary position of each, [B, W].
            starts: Padding on the left of each sequence, [B].
            blocks: Those that run, one after the other.
        """
        batch, width, _ = hidden.shape
        given, out = (
            hidden.contiguous(),
            torch.empty_like(hidden, memory_format=torch.contiguous_format),
        )
        places, padding = positions.contiguous(), starts.repeat_interleave(width)
        step = native.Step(
            batch * width,
            positions=places.data_ptr(),
            starts=padding.data_ptr(),
            width=width,
            first=blocks.start,
            last=blocks.stop,
            inputs=given.data_ptr(),
            outputs=out.data_ptr(),
        )
        self._call(session, self.sizes, step, session.every)
        return out

    def readout(
        self, session: StepSession, hidden: torch.Tensor, norm: Any, head: Any
    ) -> torch.Tensor:
        """Return the logits [N, V] of hidden states [N, d] after a norm and a plain head."""
        given, vocab = hidden.contiguous(), head.out_features
        logits = torch.empty(len(given), vocab, dtype=session.dtype)
        sizes = native.Model.from_buffer_copy(self.sizes)
        sizes.norm, sizes.eps = norm.weight.data_ptr(), norm.variance_epsilon
        sizes.head, sizes.vocab = matrix_of(head), vocab
        step = native.Step(len(given), logits=logits.data_ptr(), width=1, inputs=given.data_ptr())
        self._call(session, sizes, step, session.every)
        return logits

    def _call(
        self, session: StepSession, sizes: native.Model, step: native.Step, runs: Runs
    ) -> None:
        """Run the kernel; fill in what all calls have in common."""
        self._follow(session, step.batch)
        lengths = [0 if cache is None else cache.length for cache in session.caches]
        places = (ctypes.c_int64 * len(lengths))(*lengths)
        if runs not in self._runs:
            self._runs[runs] = (ctypes.c_uint8 * len(runs))(*runs)
        step.lengths, step.runs = ctypes.addressof(places), ctypes.addressof(self._runs[runs])
        step.scratch, step.threads = self.scratch.data_ptr(), torch.get_num_threads()
        self.kernels.decode(sizes, step, session.dtype)

    def _follow(self, session: StepSession, rows: int) -> None:
        """Take over the addresses of what has moved since the last call, and make room for rows."""
        self.follow_packed(session)
        buffers = session.buffers()
        if len(buffers) != len(self._seen) or not all(map(is_, buffers, self._seen)):
            self._seen, self._rows = buffers, 0
            self._point(session)
        if rows > self._rows:
            self._rows = rows
            need = self.kernels.scratch_floats(self.sizes, rows, session.capacity)
            self.scratch = torch.empty(need, dtype=torch.float32)

    def forget(self) -> None:
        """Let go of a cache that is about to be made anew, so that it is not there twice."""
        self._seen = []

    def follow_packed(self, session: StepSession) -> None:
        """Take over where packed weights lie, and at which width they are read, if any changed."""
        if session.packed and self._changes != QuantisedLinear.changes:
            self._take_weights(session)

    def _take_weights(self, session: StepSession) -> None:
        """Note where the weights lie, and at which width they are read."""
        self._changes = QuantisedLinear.changes
        model = session.model
        self.weights = [t.detach() for t in (*model.parameters(), *model.buffers())]
        for pointers, block in zip(self.blocks, session.blocks, strict=True):
            _fill(pointers, block)
        embed = model.model.embed_tokens
        if isinstance(embed, PackedEmbedding):
            self.sizes.embedding, self.sizes.table = None, matrix_of(embed.table)
        else:
            self.sizes.embedding = embed.weight.data_ptr()
        self.sizes.norm = model.model.norm.weight.data_ptr()
        self.sizes.head = matrix_of(model.lm_head)

    def _point(self, session: StepSession) -> None:
        """Note where caches, stand-ins and tables lie."""
        places = zip(self.blocks, session.blocks, session.caches, strict=True)
        for pointers, block, cache in places:
            if cache is not None:
                keys, values = cache.buffers
                source = block.attention.source if block.attention else None
                other = None if source is None else session.caches[source]
                keys = keys if other is None else other.buffers[0]
                pointers.keys, pointers.values = keys.data_ptr(), values.data_ptr()
                pointers.capacity = cache.capacity
        for index, stand_in in session.stand_ins.items():
            _fill_stand_in(self.blocks[index], stand_in)
        self.sizes.cos, self.sizes.sin = session.cos.data_ptr(), session.sin.data_ptr()


def product(kernels: native.Kernels, linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return x W^T, [B, N], for a linear that is `readable` and x [B, K]; the bias is left out."""
    size = linear.out_features, linear.in_features
    return kernels.product(matrix_of(linear), x.contiguous(), *size)


def readable(linear: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether the kernels read a linear as it lies: dense in `dtype`, or packed in some formats."""
    if plain(linear, dtype):
        return linear.weight.device.type == "cpu"
    if not isinstance(linear, QuantisedLinear) or not untouched(linear):
        return False
    codes = linear.layout()
    return (
        codes is not None
        and linear.weight.device.type == "cpu"
        and linear.compute_dtype in (None, dtype)
        and linear.in_features <= native.LARGEST_WIDTH
        and (linear.bias is None or linear.bias.dtype == dtype)
    )


def matrix_of(linear: torch.nn.Linear) -> native.Matrix:
    """Return where the numbers of a linear lie that is `readable`."""
    found = native.Matrix(weight=linear.weight.data_ptr(), bias=native.address(linear.bias))
    if isinstance(linear, QuantisedLinear) and (codes := linear.layout()) is not None:
        found.bits, found.group, found.groups = codes.bits, codes.group, codes.scales.numel()
        found.scales, found.zeros = codes.scales.data_ptr(), native.address(codes.zeros)
        found.levels, found.offset = native.address(codes.levels), native.address(codes.offset)
        found.planes, found.stride = codes.planes, codes.stride
    return found


def _fits(block: Block, session: StepSession) -> bool:
    """Whether the matrices of a block fit each other and the width of the model."""
    return all(_part_fits(part, session) for part in block.parts())


def _looked_up(embedding: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether the kernels read the vectors of tokens as they lie."""
    if type(embedding) is PackedEmbedding:
        return readable(embedding.table, dtype)
    return type(embedding) is torch.nn.Embedding and embedding.weight.is_contiguous()


def _queries_last(blocks: Sequence[Block]) -> bool:
    """Whether queries that are taken are those of the last block that made some."""
    last = None
    for index, block in enumerate(blocks):
        if own := block.attention:
            if own.q is None and own.source != last:
                return False
            last = index if own.q is not None else last
    return True


def _stand_in_fits(item: tuple[int, StandIn], session: StepSession) -> bool:
    """Whether a stand-in's map is small and float32, and its block has a part to give an anchor."""
    index, stand_in = item
    maps = [m for m in (stand_in.a, stand_in.b) if m is not None]
    small = all(min(m.shape) <= native.LARGEST_RANK for m in maps)
    dense = all(m.dtype == torch.float32 and m.is_contiguous() for m in maps)
    return small and dense and bool(session.blocks[index].parts())


def _part_fits(part: Attention | MLP, session: StepSession) -> bool:
    d, width = session.model.config.hidden_size, session.head_dim
    if isinstance(part, MLP):
        sizes = [(part.inner, d), (part.inner, d), (d, part.inner)]
    else:
        q, kv = part.heads * width, part.kv_heads * width
        if part.head_dim != width or part.scaling != session.scaling:
            return False
        every = ((part.q, q), (part.k, kv), (part.v, kv))
        sizes = [*((rows, d) for m, rows in every if m is not None), (d, q)]
    return [_shape(linear) for linear in part.linears()] == sizes


def _shape(linear: Any) -> tuple[int, int]:
    if isinstance(linear, QuantisedLinear):
        return linear.out_features, linear.in_features
    rows, columns = linear.weight.shape
    return rows, columns


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
        if linear is not None:
            setattr(pointers, name, matrix_of(linear))


def _fill_stand_in(pointers: native.Layer, stand_in: StandIn) -> None:
    if stand_in.a is not None and stand_in.b is not None:
        pointers.a, pointers.b = stand_in.a.data_ptr(), stand_in.b.data_ptr()
        pointers.rank = len(stand_in.a)
    pointers.scale, pointers.running = stand_in.scale, int(stand_in.running)
    pointers.anchor = native.address(stand_in.anchor)


def _sizes(session: StepSession) -> native.Model:
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
    )
