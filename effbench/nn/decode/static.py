"""Our own decode engine: a static key/value cache, and steps without the cost of a forward pass.

A session reads the prompt through the model as it is, into buffers with room to spare; on a CPU a
short or slow one by the kernel below (`effbench.nn.decode.prompts`). Each step then takes the
shortest way that there is:

- `native`: one call of a C++ kernel that reads the weights where they lie (on a CPU, where every
  linear is plain or packed in a format that it knows; `effbench.nn.decode.native_step`);
- `graph`: one replay of a captured CUDA graph (on a CUDA device, where every linear is plain or has
  a kernel for its codes; `effbench.nn.decode.cuda_graph`);
- `walk`: block by block, every linear called as the module that it is, so that adapters and packed
  weights work as ever.

Layers may differ in their heads and neurons, or lack attention or MLP, as a slice's do, or take
states of another layer (`effbench.nn.llama.shared_attention`), whose cache then is theirs too. Each
cache has a length of its own: a step may leave blocks out (`StaticSession.advance`), and then their
caches do not grow. What is left out changes nothing, unless a `StandIn` takes its place.

No weight is copied or changed, so that a session holds no memory but its cache, never works with
old weights, and leaves nothing on the model. It applies to models laid out as Llama is;
`sessions.session_for` has others for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from effbench.nn.decode import native, prompts
from effbench.nn.decode.cache import StaticLayer, StaticValues, Store, Stored
from effbench.nn.decode.cuda_graph import StepGraph
from effbench.nn.decode.native_step import NativeStep, product
from effbench.nn.decode.pointwise import EAGER, Pointwise
from effbench.nn.decode.scratch import BLOCK
from effbench.nn.decode.step import Runs, StandIn
from effbench.nn.llama.head import rows_together
from effbench.nn.llama.parts import Attention
from effbench.nn.llama.shared_attention import last_logits, tail_of
from effbench.nn.llama.walk import blocks_of, plain, untouched, why_not
from effbench.nn.quant.embedding import embedding_dtype
from effbench.nn.quant.linears import MOST_VECTORS, QuantisedLinear


class StaticSession:
    """Decodes one prompt batch with a static cache.

    Args:
        model: Laid out as Llama is, in evaluation mode.
        use_native: Whether the C++ kernel may be used.
        stand_ins: What takes the place of a block, by its index, where `advance` leaves it out;
            nothing takes that of the others.
        mixers: Whether blocks may mix otherwise than by a softmax; a subclass then runs them.

    Raises:
        ValueError: When the engine does not apply to `model`.
    """

    def __init__(
        self,
        model: Any,
        use_native: bool = True,
        stand_ins: Mapping[int, StandIn] | None = None,
        mixers: bool = False,
    ) -> None:
        if reason := why_not(model, mixers):
            raise ValueError(f"the engine does not apply: {reason}")
        self.model = model
        self.blocks = blocks_of(model)
        attending = [b.attention for b in self.blocks if b.attention is not None]
        self.kv_heads = [a.kv_heads for a in attending if a.v is not None]
        """Key/value heads of each cache."""
        self.caches: list[StaticLayer | None] = []
        """The cache of each block: its own, its source's, or none."""
        for block in self.blocks:
            self.caches.append(self._cache_of(block.attention))
        self.layers = list(dict.fromkeys(c for c in self.caches if c is not None))
        """All caches."""
        attentions = (block.attention for block in self.blocks)
        self._givers = {a.source for a in attentions if a is not None and a.source is not None}
        """Blocks whose states others take."""
        self.every: Runs = (True,) * len(self.blocks)
        """A step that leaves nothing out."""
        self.stand_ins = dict(stand_ins or {})
        self.dtype = embedding_dtype(model)
        self.device = next(model.parameters()).device
        self.head_dim, self.scaling = attending[0].head_dim, attending[0].scaling
        self.length = 0
        """Positions read, padding included; a cache may hold fewer."""
        self.starts = torch.empty(0)
        """Padding on the left of each sequence, [B] int64."""
        self.positions = torch.empty(0)
        """Position of the next token of each sequence, [B] int64."""
        self.padded = False
        self.cos = self.sin = torch.empty(0)
        inside = (m for block in self.blocks for part in block.parts() for m in part.linears())
        linears = [*inside, self.model.lm_head]
        self.packed = [m for m in linears if isinstance(m, QuantisedLinear)]
        """Linears that are read as codes, in the order they run."""
        self._tables_read: list[torch.Tensor] = []
        self._seen_changes = -1
        dense = [m for m in linears if not isinstance(m, QuantisedLinear)]
        self._plain = all(plain(m, self.dtype) for m in dense)
        self._plain &= all(untouched(m) and m.streams(self.device) for m in self.packed)
        self._plain &= untouched(self.model.model.norm)
        self._native = NativeStep.of(self) if use_native else None
        self._graph: StepGraph | None = None

    def _cache_of(self, attention: Attention | None) -> StaticLayer | None:
        if attention is None:
            return None
        if attention.v is None:
            assert attention.source is not None
            return self.caches[attention.source]
        return StaticLayer() if attention.k is not None else StaticValues()

    @property
    def batch(self) -> int:
        """Sequences in the cache."""
        keys = self.layers[0].keys
        return 0 if keys is None else int(keys.shape[0])

    @property
    def capacity(self) -> int:
        """Positions that the largest cache has room for."""
        return max(layer.capacity for layer in self.layers)

    def buffers(self) -> list[torch.Tensor]:
        """Return the tensors on whose addresses a step depends, those of dense weights left out.

        Packed ones may be read at another width than before, by another table.
        """
        caches = [t for layer in self.layers for t in layer.buffers]
        anchors = [s.anchor for s in self.stand_ins.values() if s.anchor is not None]
        return [*caches, *anchors, *self._packed_tables(), self.cos]

    def _packed_tables(self) -> list[torch.Tensor]:
        """Return the tables by which packed linears are read, looked up where one has changed."""
        if self._packed_changed():
            self._seen_changes = QuantisedLinear.changes
            layouts = (m.layout() for m in self.packed)
            self._tables_read = [found.scales for found in layouts if found is not None]
        return self._tables_read

    def _packed_changed(self) -> bool:
        """Whether a packed linear, of any model, has changed since the tables were looked up."""
        return self._seen_changes != QuantisedLinear.changes

    def running(self, runs: Runs) -> list[StaticLayer]:
        """Return the caches of the blocks that run, each once."""
        used = (c for c, on in zip(self.caches, runs, strict=True) if on and c is not None)
        return list(dict.fromkeys(used))

    @property
    def engine(self) -> str:
        """How the next step is made: `native`, `graph` or `walk`."""
        if self._native is not None and self.batch <= native.LARGEST_BATCH:
            return "native"
        fits = self._plain and not (self.packed and self.batch > MOST_VECTORS)
        return "graph" if fits and self.device.type == "cuda" else "walk"

    # -- the protocol --------------------------------------------------------------------------

    @torch.inference_mode()
    def reserve(self, batch: int, length: int, prompt: int = 0) -> None:
        """Make what a batch of `length` positions in all will need, before any clock runs.

        Weights that the C++ kernel reads move to huge pages, where the system has them, and packed
        ones together before that. This is optional: without it, the cache grows when it has to.

        Args:
            batch: Sequences.
            length: Positions of each, prompt included.
            prompt: Positions of the prompt; 0 when it is not known.
        """
        if self.length:
            raise RuntimeError("a session is made ready before it reads its prompt")
        for layer, heads in zip(self.layers, self.kv_heads, strict=True):
            like = torch.empty(batch, heads, 0, self.head_dim, dtype=self.dtype, device=self.device)
            room = self.room(layer, length, prompt)
            layer.reserve(like, -(-room // BLOCK) * BLOCK)
        width = self.model.config.hidden_size
        for stand_in in self.stand_ins.values():
            stand_in.note(torch.zeros(batch, 1, width, dtype=self.dtype, device=self.device))
        if self.engine == "native" and self._native is not None:
            self._native.settle(self)
        self._tables()
        self._place(torch.zeros(batch, dtype=torch.long, device=self.device))
        if self.engine == "graph":
            self._graph = StepGraph(self)
            for runs in self.routes():
                self._graph.capture(self, runs)

    def make_ready(
        self, batch: int, length: int, layers: Sequence[StaticLayer] | None = None
    ) -> None:
        """Give caches that nothing has entered their buffers, and make room for what comes.

        Args:
            batch: Sequences.
            length: Positions of each that come.
            layers: The caches that take them; None for all.
        """
        for layer, heads in zip(self.layers, self.kv_heads, strict=True):
            if layer.keys is None or (layer.length == 0 and layer.keys.shape[0] != batch):
                like = torch.empty(batch, heads, 0, self.head_dim, dtype=self.dtype)
                layer.reserve(like, BLOCK)
        self._make_room(self.layers if layers is None else layers, length)
        self._tables()

    def room(self, layer: StaticLayer, length: int, prompt: int) -> int:
        """Return how many of `length` positions a layer will hold; a prompt of 0 is not known."""
        return length

    def routes(self) -> Sequence[Runs]:
        """Return all that a step may run."""
        return [self.every]

    @torch.inference_mode()
    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read prompts [B, P]; return the logits after the last position, [B, V].

        Raises:
            ValueError: When padding stands anywhere but on the left.
        """
        if self.length:
            raise RuntimeError("a session reads one prompt; start another session")
        batch, length = input_ids.shape
        starts = torch.zeros(batch, dtype=torch.long, device=self.device)
        positions = None
        if attention_mask is not None:
            real = attention_mask.long()
            starts = length - real.sum(1)
            if (real.diff(dim=1) < 0).any():
                raise ValueError("prompts must be padded on the left")
            positions = (real.cumsum(1) - 1).clamp(min=0)
        logits = self._read(input_ids, attention_mask, positions)
        self.length = length
        self._tables()
        if self._graph is not None and not self._graph.holds(self):
            self._graph = None
        self._place(starts)
        return logits

    def _read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        padded = attention_mask is not None and not bool(attention_mask.all())
        if self._native is not None and prompts.takes(self, input_ids, padded):
            return prompts.read(self, self._native, input_ids)
        cache = Cache(layers=list(self.layers))
        if tail_of(self.model):
            return last_logits(self.model, input_ids, attention_mask, positions, cache)
        head, few = self.model.lm_head, len(input_ids) <= native.LARGEST_BATCH
        if self._native is not None and few and isinstance(head, QuantisedLinear):
            # The kernel multiplies the last positions with codes, which a module would expand.
            states = self.model.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            last = product(self._native.kernels, head, states)
            return last if head.bias is None else last + head.bias
        with rows_together(self.model):
            logits: torch.Tensor = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits[:, -1]

    def _place(self, starts: torch.Tensor) -> None:
        """Note where the next token stands, given the padding on the left."""
        self.padded = bool(starts.any())
        self.starts = starts
        self.positions = self.length - starts
        if self._graph is not None:
            self._graph.place(self)

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read one token per sequence, [B, 1]; return logits [B, V]."""
        return self.advance(input_ids, self.every)

    @torch.inference_mode()
    def advance(self, input_ids: torch.Tensor, runs: Runs) -> torch.Tensor:
        """Read one token per sequence, [B, 1], through the blocks that run; return logits [B, V].

        Layers of one lane have to run together.
        """
        running = self.running(runs)
        self._make_room(running)
        if self.engine == "native":
            assert self._native is not None
            logits = self._native.run(self, input_ids, runs)
        elif self.engine == "graph":
            if self._graph is not None and self._packed_changed() and not self._graph.holds(self):
                self._graph = None
            self._graph = self._graph or StepGraph(self)
            logits = self._graph.run(self, input_ids, runs)
        else:
            logits = self._walked(input_ids, runs)
        for layer in running:
            layer.length += 1
        self.length += 1
        self.positions += 1
        return logits

    def _make_room(self, layers: Sequence[StaticLayer], more: int = 1) -> None:
        """Make room for half as many positions again, in each of the layers that lacks some."""
        full = [layer for layer in layers if layer.length + more > layer.capacity]
        if full:
            self._forget()
        for layer in full:
            layer.reserve(layer.buffers[1], layer.capacity + max(BLOCK, more, layer.capacity // 2))
        if full:
            self._tables()

    def _forget(self) -> None:
        """Let go of caches that are made anew one by one, so that all are not there twice."""
        self._graph = None
        if self._native is not None:
            self._native.forget()

    def _tables(self) -> None:
        """Compute cosine and sine of every position that there is room for, [capacity, D]."""
        if self.cos.shape[0] >= self.capacity:
            return
        positions = torch.arange(self.capacity, device=self.device)[None]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self.model.model.rotary_emb(like, position_ids=positions)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()

    @torch.inference_mode()
    def reorder(self, rows: torch.Tensor) -> None:
        """Keep the sequences `rows`, in this order."""
        rows = rows.to(self.device).long()
        self._forget()
        for layer in self.layers:
            layer.keys, layer.values = (buffer[rows] for buffer in layer.buffers)
        for stand_in in self.stand_ins.values():
            stand_in.anchor = None if stand_in.anchor is None else stand_in.anchor[rows]
        self._place(self.starts[rows])

    def kv_bytes(self) -> int:
        """Return the bytes of the key/value entries in use."""
        return sum(layer.length * _position_bytes(layer) for layer in self.layers)

    def kv_lengths(self) -> list[int]:
        """Return the cached positions of each layer that attends, padding included."""
        return [layer.length for layer in self.layers]

    def reserved_bytes(self) -> int:
        """Return the bytes of the key/value buffers, the room to spare included."""
        return sum(layer.capacity * _position_bytes(layer) for layer in self.layers)

    # -- the walk ------------------------------------------------------------------------------

    def _walked(self, input_ids: torch.Tensor, runs: Runs) -> torch.Tensor:
        masks: dict[int, torch.Tensor] = {}

        def store(layer: StaticLayer, key: torch.Tensor, value: torch.Tensor) -> Stored:
            end = layer.length + 1
            if self.padded and end not in masks:
                columns = torch.arange(end, device=self.device)
                masks[end] = (columns >= self.starts[:, None])[:, None, None]
            keys, values = layer.buffers
            keys[:, :, layer.length : end] = key
            values[:, :, layer.length : end] = value
            return keys[:, :, :end], values[:, :, :end], masks.get(end)

        return self.walk(input_ids, self.positions, store, EAGER, runs)

    def walk(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        store: Store,
        pointwise: Pointwise,
        runs: Runs,
    ) -> torch.Tensor:
        """Return logits [B, V] for one token per sequence, block by block.

        Args:
            input_ids: [B, 1].
            positions: Rotary position of each token, [B].
            store: Puts keys and values away and returns those to look at.
            pointwise: What lies between two products.
            runs: Whether each block runs, or is left out.
        """
        cos, sin = (table[positions][:, None, None] for table in (self.cos, self.sin))
        hidden, added = self.model.model.embed_tokens(input_ids), None
        made: dict[int, tuple[torch.Tensor, Stored]] = {}
        for index, block in enumerate(self.blocks):
            stand_in, cache = self.stand_ins.get(index), self.caches[index]
            if not runs[index]:
                if stand_in is not None:
                    hidden, added = stand_in(_sum(hidden, added), pointwise), None
                continue
            if (own := block.attention) and cache is not None:
                there = [m for m in (own.q, own.k, own.v) if m is not None]
                hidden, outs = pointwise.project(own.norm, hidden, added, there)
                mixed = self._attended(index, outs, (cos, sin), store, pointwise, made)
                added = pointwise.product(own.o, mixed)
            if mlp := block.mlp:
                hidden, inner = pointwise.gated(mlp, hidden, added)
                added = pointwise.product(mlp.down, inner)
            if stand_in is not None and stand_in.anchored:
                hidden, added = _sum(hidden, added), None
                stand_in.note(hidden)
        head = [self.model.lm_head]
        logits: torch.Tensor = pointwise.project(self.model.model.norm, hidden, added, head)[1][0]
        return logits[:, -1]

    def _attended(
        self,
        index: int,
        outs: Sequence[torch.Tensor],
        angles: tuple[torch.Tensor, torch.Tensor],
        store: Store,
        pointwise: Pointwise,
        made: dict[int, tuple[torch.Tensor, Stored]],
    ) -> torch.Tensor:
        """Return what the heads of one block attend to, [B, 1, H D].

        Args:
            index: Of the block.
            outs: The products that it makes: queries, keys and values, as far as it makes them.
            angles: Cosine and sine of each token's rotary position, [B, 1, 1, D].
            store: Puts keys and values away and returns those to look at.
            pointwise: Has the functions.
            made: Turned queries and stored states of blocks so far; this one's are added.
        """
        own, cache = self.blocks[index].attention, self.caches[index]
        assert own is not None and cache is not None
        if len(outs) == 3 and index not in self._givers:
            at_once = pointwise.attend(outs, angles, cache, store, own.scaling)
            if at_once is not None:
                return at_once
        # The query heads of one key head are queries at one place: nothing is repeated.
        heads = len(outs[0]) if outs else self.batch, own.kv_heads, -1, self.head_dim
        each = iter(outs)
        q, k, v = (None if m is None else next(each).view(heads) for m in (own.q, own.k, own.v))
        q, k = (None if t is None else pointwise.turn(t, *angles) for t in (q, k))
        given = made.get(-1 if own.source is None else own.source)
        made[index] = q, stored = _taken(q, k, v, given, partial(store, cache))
        keys, values, mask = stored
        mixed = F.scaled_dot_product_attention(q, keys, values, mask, scale=own.scaling)
        return mixed.reshape(heads[0], 1, -1)


def _taken(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    given: tuple[torch.Tensor, Stored] | None,
    store: Callable[[torch.Tensor, torch.Tensor], Stored],
) -> tuple[torch.Tensor, Stored]:
    """Return the queries of a block, and keys, values and mask; `given` is what its source had."""
    if q is None:
        assert given is not None
        q = given[0]
    if v is None:
        assert given is not None
        return q, given[1]
    if k is not None:
        return q, store(k, v)
    assert given is not None
    _, values, mask = store(v[..., :0], v)
    return q, (given[1][0], values, mask)


def _sum(hidden: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
    return hidden if added is None else hidden + added


def _position_bytes(layer: StaticLayer) -> int:
    """Return the bytes that one position takes in a layer's keys and values, over the batch."""
    if layer.keys is None:
        return 0
    return sum(t[:, :, :1].numel() * t.element_size() for t in layer.buffers)
