"""A tiny random Llama, batches, a context and a bare training loop for the method tests."""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.api.batch import Batch
from effbench.api.examples import Example, Tokens
from effbench.api.method_types import Context
from effbench.api.points import UNNAMED, Point
from effbench.api.shape import Shape
from effbench.api.weights import find, is_packed
from effbench.methods.base import Method
from effbench.methods.chain import chain_cost
from effbench.nn.quant.linears import NF4Linear, pack_linears, storage_bytes
from effbench.results.journal import Journal
from effbench.testing.models import begun

SHAPE = Shape(
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=128,
)

BYTES_SHAPE = Shape(
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=272,
)
"""Of a model that reads bytes."""


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, shape: Shape = SHAPE
) -> LlamaForCausalLM:
    """Return a Llama of `shape` with random weights, in train mode."""
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype).train()


def batch_of(seed: int = 0, rows: int = 2, length: int = 12, window_tokens: int = 0) -> Batch:
    """Return random tokens whose last row is padded; prompts of three tokens carry no loss."""
    ids = torch.randint(3, SHAPE.vocab_size, (rows, length), generator=generator(seed))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    labels = ids.clone()
    labels[:, :3] = -100
    labels[mask == 0] = -100
    batch = Batch(ids, mask, labels, list(range(rows)))
    return replace(batch, window_tokens=window_tokens or batch.loss_tokens)


def example_of(seed: int = 0, length: int = 12, prompt: int = 3, **columns: Any) -> Example:
    """Return a row of random tokens; its prompt carries no loss."""
    ids = torch.randint(3, SHAPE.vocab_size, (length,), generator=generator(seed)).tolist()
    return Example(str(seed), (Tokens(ids, prompt, length - prompt),), columns=columns)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return tokens [rows, length], none of them a special one."""
    return torch.randint(3, 128, (rows, length), generator=generator(seed))


def decoded(session: Any, ids: torch.Tensor, prompt: int, mask: Any = None) -> torch.Tensor:
    """Return the logits from the end of the prompt on, [B, T - P + 1, V].

    Args:
        session: What decodes.
        ids: Tokens [B, T], given one after the other.
        prompt: How many go in together at first, P.
        mask: Of the prompt, [B, P], 0 on padding.
    """
    steps = [session.prefill(ids[:, :prompt], mask)]
    steps += [session.step(ids[:, t : t + 1]) for t in range(prompt, ids.shape[1])]
    return torch.stack(steps, dim=1)


def context(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    load_model: Callable[[str], torch.nn.Module] = lambda name: tiny_model(seed=7),
) -> Context:
    return Context(seed, torch.device("cpu"), dtype, generator(seed), load_model)


def base_for(method: Method, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return the tiny model held as `method` wants it."""
    model = tiny_model(dtype=dtype)
    if is_packed(method.weights):
        pack_linears(model, find(method.weights)(), dtype)
    return model


def prepared(
    method: Method, seed: int = 0, dtype: torch.dtype = torch.float32, steps: int = 0
) -> tuple[torch.nn.Module, Context]:
    ctx = context(seed, dtype)
    ctx.total_steps = steps
    return begun(method, base_for(method, dtype), ctx), ctx


def adamw(model: torch.nn.Module, **settings: Any) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, **{"lr": 1e-2, "weight_decay": 0.0, **settings})


def window(step: int = 0) -> list[Batch]:
    """Return two micro-batches that share one loss denominator."""
    parts = [batch_of(2 * step), batch_of(2 * step + 1)]
    tokens = sum(b.loss_tokens for b in parts)
    return [replace(b, window_tokens=tokens) for b in parts]


def train(
    method: Method,
    model: torch.nn.Module,
    ctx: Context,
    steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    same_batch: bool = False,
) -> list[float]:
    """Train from `ctx.step` on and return the loss of each step."""
    optimizer = optimizer or adamw(model)
    losses = []
    for _ in range(steps):
        ctx.evolution.before_step()
        parts = window(0 if same_batch else ctx.step)
        losses.append(method.update(model, optimizer, parts, ctx).item())
        ctx.step += 1
    return losses


@torch.no_grad()
def logits(model: torch.nn.Module, batch: Batch | None = None) -> torch.Tensor:
    """Return the logits in eval mode, and put the mode back."""
    training = model.training
    out = Method().logits(model.eval(), batch or batch_of())
    model.train(training)
    return out


def counted(model: torch.nn.Module) -> dict[str, int]:
    """Count what `Cost` states, on the model itself; NF4 weights by their logical size."""
    packed = [m for m in model.modules() if isinstance(m, NF4Linear)]
    return {
        "params": sum(p.numel() for p in model.parameters())
        + sum(m.in_features * m.out_features for m in packed),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "resident_bytes": storage_bytes(model),
    }


def stated(method: Method, point: Point = UNNAMED, shape: Shape = SHAPE) -> dict[str, int]:
    """Return the same figures from `Method.cost`."""
    cost = chain_cost([method], shape, "float32", point)
    return {
        "params": cost.params,
        "trainable": cost.trainable,
        "resident_bytes": cost.resident_bytes,
    }


def flops(model: torch.nn.Module) -> int:
    """Count the FLOPs of matrix products in a forward pass over one token."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.tensor([[5]]), use_cache=False)
    return counter.get_total_flops()


def check_cost(method: Method, model: torch.nn.Module, point: Point) -> None:
    """Hold what a method states of a point against what is counted on the model in it."""
    plain = flops(tiny_model())
    with method.at(model, point):
        assert stated(method, point) == counted(model)
        cost = chain_cost([method], SHAPE, "float32", point)
        assert flops(model) - plain == cost.flops_per_token - SHAPE.flops_per_token()


def full_batch(shape: Shape, rows: int, length: int) -> Batch:
    """Return random tokens, none of them padding, all of which count."""
    ids = torch.randint(3, shape.vocab_size, (rows, length), generator=generator(0))
    batch = Batch(ids, torch.ones_like(ids), ids.clone(), list(range(rows)))
    batch.window_tokens = batch.loss_tokens
    return batch


def kept_bytes(method: Method, dtype: str, shape: Shape, rows: int, length: int) -> int:
    """Return the bytes that a step's forward pass keeps, parameters and loss left out."""
    compute = getattr(torch, dtype)
    masters = method.weights == "float32"
    model = tiny_model(dtype=torch.float32 if masters else compute, shape=shape)
    if is_packed(method.weights):
        pack_linears(model, find(method.weights)(), compute)
    cast = torch.autocast("cpu", compute, enabled=masters and dtype != "float32")
    ctx = Context(
        0,
        torch.device("cpu"),
        compute,
        generator(0),
        lambda name: tiny_model(dtype=compute, shape=shape),
    )
    model = begun(method, model, ctx).train()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        logits = tensor.shape[-1:] == (shape.vocab_size,) and tensor.shape[0] != shape.hidden_size
        if place not in own and not logits:
            seen[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), cast:
        loss = method.loss(model, full_batch(shape, rows, length), ctx)
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for t in seen.values())


def storage_hash(model: torch.nn.Module) -> str:
    """Return a hash of all that is not an adapter."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class HeldBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that come and go, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs and storage._cdata not in self.known:
                self._hold(storage)
        return out

    def _hold(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    yield from (x for x in tree_leaves(tree) if isinstance(x, torch.Tensor))


class Watch:
    """Counts the items that journals are given, and stops the process after some groups."""

    def __init__(self, patch: pytest.MonkeyPatch, stop_after: int = 0) -> None:
        self.items: Counter[tuple[str, int]] = Counter()
        self.groups = 0
        add = Journal.add

        def watched(journal: Journal, group: Mapping[int, Any]) -> None:
            add(journal, group)
            self.items.update((str(journal._path), index) for index in group)
            self.groups += 1
            if self.groups == stop_after:
                raise KeyboardInterrupt

        patch.setattr(Journal, "add", watched)
