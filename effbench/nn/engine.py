"""Our own decode engine: a static key/value cache, and steps without the cost of a forward pass.

A session reads the prompt through the model as it is, into buffers with room to spare. Each step
then takes the shortest way that there is:

- `native`: one call of a C++ kernel that reads the weights where they lie (on a CPU, where every
  linear is plain; `effbench.nn.native_step`);
- `graph`: one replay of a captured CUDA graph (on a CUDA device, where every linear is plain;
  `effbench.nn.graph`);
- `walk`: block by block, every linear called as the module that it is, so that adapters and packed
  weights work as ever.

No weight is copied or changed, so that a session holds no memory but its cache, never works with
old weights, and leaves nothing on the model. It applies to models laid out as Llama is;
`session_for` takes a `CachedSession` for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from effbench.kernels import native
from effbench.nn.decoding import CachedSession, Session
from effbench.nn.graph import StepGraph
from effbench.nn.layout import blocks_of, plain, untouched, why_not
from effbench.nn.native_step import NativeStep
from effbench.nn.pointwise import EAGER, Pointwise

BLOCK = 128
"""Positions by which the cache is larger than the prompt."""

Store = Callable[["StaticLayer", torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Puts the new key and value of a layer away and returns all that the query may look at."""


def session_for(model: torch.nn.Module) -> Session:
    """Return the fastest session that decodes `model` as its own forward pass would."""
    from effbench.nn.shared_session import SharedSession
    from effbench.nn.sharing import map_of

    if isinstance(model, LlamaForCausalLM) and map_of(model):
        return SharedSession(model)
    return CachedSession(model) if why_not(model) else StaticSession(model)


class StaticLayer(DynamicLayer):
    """Keys and values of one layer in buffers [B, H_kv, capacity, D] of which a part is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, the room to spare included."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def reserve(self, like: torch.Tensor, capacity: int) -> None:
        """Make room for `capacity` positions of keys like [B, H_kv, *, D], keeping what is there.

        What is not in use is zero, so that a masked product with it is not NaN.
        """
        batch, heads, _, width = like.shape
        fresh = [like.new_zeros(batch, heads, capacity, width) for _ in range(2)]
        if self.length:
            for new, old in zip(fresh, self.buffers, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        self.keys, self.values = fresh
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put a prompt's keys and values [B, H_kv, P, D] away, and return them."""
        batch, length = key_states.shape[0], key_states.shape[2]
        keys = self.keys
        if keys is None or keys.shape[0] != batch or keys.shape[2] < length:
            self.reserve(key_states, length + BLOCK)
        self.length = length
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, :length] = states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the positions in use."""
        return self.length


class StaticSession:
    """Decodes one prompt batch with a static cache.

    Args:
        model: Laid out as Llama is, in evaluation mode.
        use_native: Whether the C++ kernel may be used.

    Raises:
        ValueError: When the engine does not apply to `model`.
    """

    def __init__(self, model: Any, use_native: bool = True) -> None:
        if reason := why_not(model):
            raise ValueError(f"the engine does not apply: {reason}")
        self.model = model
        self.blocks = blocks_of(model)
        self.layers = [StaticLayer() for _ in self.blocks]
        embedding = self.model.model.embed_tokens.weight
        self.device, self.dtype = embedding.device, embedding.dtype
        self.head_dim = int(self.model.model.layers[0].self_attn.head_dim)
        self.length = 0
        """Cached positions, padding included."""
        self.starts = torch.empty(0)
        """Padding on the left of each sequence, [B] int64."""
        self.positions = torch.empty(0)
        """Position of the next token of each sequence, [B] int64."""
        self.padded = False
        self.cos = self.sin = torch.empty(0)
        linears = [m for block in self.blocks for m in block.linears()]
        self._plain = all(plain(m, self.dtype) for m in (*linears, self.model.lm_head))
        self._plain &= untouched(self.model.model.norm)
        self._native = NativeStep.of(self) if use_native and self._plain else None
        self._graph: StepGraph | None = None

    @property
    def batch(self) -> int:
        """Sequences in the cache."""
        keys = self.layers[0].keys
        return 0 if keys is None else int(keys.shape[0])

    @property
    def capacity(self) -> int:
        """Positions that the cache has room for."""
        keys = self.layers[0].keys
        return 0 if keys is None else int(keys.shape[2])

    @property
    def engine(self) -> str:
        """How the next step is made: `native`, `graph` or `walk`."""
        if self._native is not None and self.batch <= native.LARGEST_BATCH:
            return "native"
        return "graph" if self._plain and self.device.type == "cuda" else "walk"

    # -- the protocol --------------------------------------------------------------------------

    @torch.inference_mode()
    def reserve(self, batch: int, length: int) -> None:
        """Make what a batch of `length` positions in all will need, before any clock runs.

        This is optional: without it, the cache grows when it has to.
        """
        if self.length:
            raise RuntimeError("a session is made ready before it reads its prompt")
        heads = self.model.config.num_key_value_heads
        like = torch.empty(batch, heads, 0, self.head_dim, dtype=self.dtype, device=self.device)
        for layer in self.layers:
            layer.reserve(like, -(-length // BLOCK) * BLOCK)
        self._tables()
        self._place(torch.zeros(batch, dtype=torch.long, device=self.device))
        if self.engine == "graph":
            self._graph = StepGraph(self)

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
        logits: torch.Tensor = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=Cache(layers=list(self.layers)),
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.length = length
        if self._graph is not None and not self._graph.holds(self.layers):
            self._graph = None
        self._tables()
        self._place(starts)
        return logits

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
        if self.length == self.capacity:
            self._grow()
        if self.engine == "native":
            assert self._native is not None
            logits = self._native.run(self, input_ids)
        elif self.engine == "graph":
            self._graph = self._graph or StepGraph(self)
            logits = self._graph.run(input_ids)
        else:
            logits = self._walked(input_ids)
        self.length += 1
        self.positions += 1
        return logits

    def _grow(self) -> None:
        """Make room for half as many positions again."""
        capacity = self.capacity + max(BLOCK, self.capacity // 2)
        for layer in self.layers:
            layer.length = self.length
            layer.reserve(layer.buffers[0], capacity)
        self._tables()
        self._graph = None

    def _tables(self) -> None:
        """Compute cosine and sine of every position that there is room for, [capacity, D]."""
        if self.cos.shape[0] == self.capacity:
            return
        positions = torch.arange(self.capacity, device=self.device)[None]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self.model.model.rotary_emb(like, position_ids=positions)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()

    @torch.inference_mode()
    def reorder(self, rows: torch.Tensor) -> None:
        """Keep the sequences `rows`, in this order."""
        rows = rows.to(self.device).long()
        for layer in self.layers:
            layer.keys, layer.values = (buffer[rows] for buffer in layer.buffers)
        self._graph = None
        self._place(self.starts[rows])

    def kv_bytes(self) -> int:
        """Return the bytes of the key/value entries in use."""
        return self.length * self._position_bytes()

    def reserved_bytes(self) -> int:
        """Return the bytes of the key/value buffers, the room to spare included."""
        return self.capacity * self._position_bytes()

    def _position_bytes(self) -> int:
        keys = self.layers[0].keys
        if keys is None:
            return 0
        return 2 * len(self.layers) * keys[:, :, :1].numel() * keys.element_size()

    # -- the walk ------------------------------------------------------------------------------

    def _walked(self, input_ids: torch.Tensor) -> torch.Tensor:
        end = self.length + 1
        mask = None
        if self.padded:
            columns = torch.arange(end, device=self.device)
            mask = (columns >= self.starts[:, None])[:, None, None]

        def store(
            layer: StaticLayer, key: torch.Tensor, value: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = layer.buffers
            keys[:, :, self.length : end] = key
            values[:, :, self.length : end] = value
            return keys[:, :, :end], values[:, :, :end]

        return self.walk(input_ids, self.positions, mask, store, EAGER)

    def walk(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        store: Store,
        pointwise: Pointwise,
    ) -> torch.Tensor:
        """Return logits [B, V] for one token per sequence, block by block.

        Args:
            input_ids: [B, 1].
            positions: Rotary position of each token, [B].
            mask: Which cached positions each token sees, [B, 1, 1, T] bool; None for all.
            store: Puts keys and values away and returns those to look at.
            pointwise: What lies between two products.
        """
        cos, sin = (table[positions][:, None, None] for table in (self.cos, self.sin))
        hidden, added = self.model.model.embed_tokens(input_ids), None
        heads = self.model.config.num_key_value_heads
        for block, layer in zip(self.blocks, self.layers, strict=True):
            hidden, x = pointwise.norm(block.attention_norm, hidden, added)
            q, k, v = (m(x).view(len(x), heads, -1, self.head_dim) for m in block.linears()[:3])
            keys, values = store(layer, pointwise.turn(k, cos, sin), v)
            # The query heads of one key head are queries at one place: nothing is repeated.
            q = pointwise.turn(q, cos, sin)
            mixed = F.scaled_dot_product_attention(q, keys, values, mask)
            hidden, x = pointwise.norm(
                block.mlp_norm, hidden, block.o(mixed.reshape(len(x), 1, -1))
            )
            added = block.down(pointwise.gate(block.gate(x), block.up(x)))
        logits: torch.Tensor = self.model.lm_head(
            pointwise.norm(self.model.model.norm, hidden, added)[1]
        )
        return logits[:, -1]
