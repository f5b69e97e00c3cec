"""Bytes that a pass through a model needs beside its weights, from shapes alone.

The counts follow what autograd keeps in transformers' Llama (PyTorch 2.13): they equal the tensors
that saved-tensor hooks see, and the tests hold them to it. With d the width, m the inner width of
the MLP, q and k the widths of queries and keys, h the heads and e the bytes of a compute element,
one decoder layer keeps per token:

    norms       the residual stream that enters each of the two, in float32; twice if they train
    attention   queries, keys, values and its output, e (2q + 2k), and 4h of log-sum-exp
    MLP         gate, its activation and up, 3 e m
    linears     their inputs, where their weights or an adapter beside them train
    adapters    what lies between their factors, in float32

from the lowest layer in which something trains on; below it no gradient passes and nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from effbench.api.parts import Adapter, LayerShape, Linear, Recurrence, Share, stretches
from effbench.api.recurrent import CHUNK
from effbench.api.shape import DTYPE_BYTES, AnyShape, ModelShape
from effbench.api.weights import FLOAT32, MASTERS

Kind = Literal["train", "score", "prefill", "decode"]

READERS = ("q_proj", "k_proj", "v_proj", "g_proj")
"""The linears of a layer of Llama that read what enters it."""
SHARED_INPUT = {
    "k_proj": "q_proj",
    "v_proj": "q_proj",
    "g_proj": "q_proj",
    "up_proj": "gate_proj",
}
"""Linears that read what another one reads."""
POINTS_AT_ONCE = 8
"""Most operating points that go through a model side by side. More would save little: the work
that they share is an eighth by then."""
SCORE_BYTES = 8
"""Float32 bytes per logit at the peak of a loss without gradients: logits, their log-softmax."""
COMPARED_BYTES = 40
"""Float32 bytes per logit at the peak of a comparison of distributions: logits, log-softmax and
softmax of both, what they differ by, and what their divergences take."""
HEAD_ROWS = 128
"""Positions whose logits over the vocabulary are in memory at a time where answers are scored."""


@dataclass(frozen=True)
class Pass:
    """One pass of a batch through the model: what its memory depends on."""

    kind: Kind
    rows: int
    """Sequences."""
    tokens: int
    """Positions of each, padding included; for `decode` those in the cache at the end."""
    counted: int
    """Positions whose logits are needed, in all."""
    prompt: int = 0
    """For `decode`, the first positions of each, that were read as a prompt."""
    after: int = 0
    """For `prefill`, the positions of each that follow: our engine makes room for them at once."""
    beside: tuple[str, ...] = ()
    """Config names of the other models in memory meanwhile; an empty one is the dense model that
    the run started from."""
    compared: int = 0
    """Positions at a time whose distributions are compared with those of another model: the logits
    of both, of all positions, are there then."""

    @property
    def size(self) -> int:
        """Positions in all."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Training:
    """What a step of training keeps from its forward pass until the backward pass, and its work."""

    layers: float
    """Bytes per token, over all layers."""
    layer: float
    """Bytes per token of the largest layer: what recomputing one at a time needs."""
    boundary: float
    """Bytes per token of the residual stream between two layers."""
    fixed: int
    """Bytes whatever the batch is: the casts of master weights, and the loss's own."""
    loss_bytes: int
    """Bytes per counted logit when the backward pass begins."""
    quadratic: float
    """Bytes per token and position of its row: masks that are not plainly causal."""
    forward: float
    """FLOPs per token of the forward pass, matrix products without attention and head."""
    gradient: float
    """The same of the backward pass."""
    forward_constant: float
    """FLOPs of a forward pass whatever its tokens are: products of weights with weights."""
    gradient_constant: float
    """The same of what recomputation does not repeat: the backward pass, terms of the loss."""
    run: float
    """Layers that run, a mean over the steps."""
    attention: float
    """FLOPs of the forward pass per token and position that it attends to."""
    attention_gradient: float
    """The same of the backward pass, in the layers that a gradient passes."""
    head: int
    """FLOPs of the head per position."""
    heads: int
    """Products of the head in the forward pass, those that the backward pass repeats included."""
    head_gradients: int
    """Products of the head in the backward pass: 2 for each whose weight trains, else 1."""
    every: bool
    """Whether the head runs on all positions, not only on those that count."""
    forwards: int = 0
    """Forward passes of a step without a backward pass; 0 has one."""
    passes: int = 1
    """Passes forward and backward of a step, one after the other."""
    noise: int = 0
    """Parameters of the largest tensor that trains: what a perturbation of it takes."""
    chunking: float = 0
    """FLOPs of the forward pass per token and position of its stretch, in linear attention."""
    stepping: float = 0
    """FLOPs of the forward pass per token behind the first stretch: those of the states."""
    recurrent_gradient: float = 0
    """Share of these two that a gradient passes, times 2."""


def training_of(shape: AnyShape, dtype: str) -> Training:
    """Return what a training step keeps from its forward pass, and its work.

    Args:
        shape: The model as it trains.
        dtype: Compute dtype, a key of `DTYPE_BYTES`.
    """
    model, element = ModelShape.of(shape), DTYPE_BYTES[dtype]
    count, loss = Counted(model, element), model.objective
    kept = [count.kept(i) for i in range(model.num_layers)]
    stored = [math.ceil(x.runs) * bytes_ for x, bytes_ in zip(model.layers, kept, strict=True)]
    boundary = count.boundary
    read_out = model.readout.runs * (8 * model.hidden_size if model.readout.norm.trains else 0)
    backward = not model.forwards
    return Training(
        layers=float(sum(stored) + count.bypassed + read_out + loss.exits * boundary) * backward,
        layer=float(max(kept, default=0)) * backward,
        boundary=float(boundary) if count.lowest < model.num_layers and backward else 0,
        fixed=count.casts + loss.fixed,
        loss_bytes=element if loss.logit_bytes is None else loss.logit_bytes,
        quadratic=float(count.masks) * backward,
        forward=float(sum(count.forward(i) for i in range(model.num_layers))),
        gradient=float(sum(count.gradient(i) for i in range(model.num_layers))) * backward,
        forward_constant=float(count.norms_of_gains),
        gradient_constant=loss.gradient_constant * backward,
        run=float(sum(x.runs for x in model.layers)),
        attention=float(sum(count.attention(i) for i in range(model.num_layers))),
        attention_gradient=float(
            2 * sum(count.attention(i) for i in range(count.lowest, model.num_layers))
        )
        * backward,
        head=2 * model.head_products,
        heads=(2 * loss.exits or 1 + loss.again) * loss.reads_out,
        head_gradients=count.head_gradients * loss.reads_out * backward,
        every=loss.every or any(x.bypass and x.bypass.active for x in model.layers),
        forwards=model.forwards,
        passes=model.passes,
        noise=largest_trained(model) if model.forwards else 0,
        chunking=2.0 * sum(x.chunking for x in count.recurrences(0)),
        stepping=2.0 * sum(x.stepping for x in count.recurrences(0)),
        recurrent_gradient=count.recurrent_gradient * backward,
    )


def largest_trained(model: ModelShape) -> int:
    """Return the parameters of the largest single tensor that trains."""
    linears = [x for layer in model.layers for x in layer.linears]
    own = [x.d_in * x.d_out for x in (*linears, model.embed, *model.readout.linears) if x.trains]
    adapters = [x.adapter for x in linears if x.adapter and x.adapter.trains]
    return max([*own, *(f.params for a in adapters for f in a.factors)], default=0)


class Counted:
    """Counts the layers of one model that trains; see the module's text.

    Args:
        model: As it trains.
        element: Bytes of a compute element.
    """

    def __init__(self, model: ModelShape, element: int) -> None:
        self.model = model
        self.element = element
        linears = [x for layer in model.layers for x in layer.linears]
        masters = any(x.format == MASTERS and x.trains for x in linears)
        self.cast = masters and element < MASTERS.element
        """Whether each linear casts its input and its weight anew, the stream being float32."""
        self.reaches = model.through or model.embed.trains
        """Whether gradients go down to the embedding."""
        self.lowest = 0
        """The first layer that a gradient passes."""
        self.bottom: int | None = None
        """It, where nothing below has a use for the gradient of what it reads."""
        if not self.reaches:
            self._look_for_lowest()

    def _look_for_lowest(self) -> None:
        for index, layer in enumerate(self.model.layers):
            if layer.trains:
                self.lowest = self.bottom = index
                return
            if _stands_in(layer):
                self.lowest = index + 1
                return
        self.lowest = self.model.num_layers

    # -- memory --------------------------------------------------------------------------------

    def kept(self, index: int) -> float:
        """Return the bytes per token that a layer keeps; none below the lowest that trains."""
        layer, e = self.model.layers[index], self.element
        if index < self.lowest:
            return 0
        norms = sum(4 * n.size * (1 + n.trains) for n in layer.all_norms)
        inner = (3 if layer.mlp.gated else 1) * e * layer.mlp.width if layer.mlp else 0
        own = self._inputs(layer, [x.name for x in layer.linears if x.trains], e)
        adapted = [x for x in layer.linears if x.adapter and x.adapter.trains]
        beside = self._inputs(layer, [x.name for x in adapted], FLOAT32.element)
        between = sum(_between(x) for x in adapted)
        masked = self._masked(layer) if _stands_in(layer) else 0
        return norms + inner + self._attended(layer) + own + beside + between + masked

    def _attended(self, layer: LayerShape) -> int:
        """Return the bytes of queries, keys, values, output and log-sum-exp."""
        if layer.mixer is None:
            return 0
        if layer.mixer.recurrence:
            return self._recurred(layer, layer.mixer.recurrence)
        output = layer.mixer.head_dim * layer.mixer.heads
        # What a layer takes from another one is kept there.
        states = sum(x.d_out for x in layer.mixer.linears if x.name in readers(layer))
        return self.element * (output + states) + 4 * layer.mixer.heads

    def _recurred(self, layer: LayerShape, own: Recurrence) -> int:
        """Return the bytes of a recurrence, of its gate before and after silu, and its output.

        What comes out of its norm, which counts with the norms, is kept for the gate alone.
        """
        width = own.heads * own.width
        if layer.linear("g_proj"):
            return self.element * 3 * width + own.kept
        return (self.element - FLOAT32.element) * width + own.kept

    def _inputs(self, layer: LayerShape, names: Sequence[str], size: int) -> float:
        """Return the bytes of what some linears read, cast to `size` bytes.

        Where nothing is cast, linears with one input share it, and that of o_proj is the
        attention's output, which is kept anyway.
        """
        read = {x.name: x.d_in * float(x.active) for x in layer.linears if x.name in names}
        if size == self.element:
            read.pop("o_proj", None)
            if not self.cast:
                read = {SHARED_INPUT.get(name, name): width for name, width in read.items()}
        return size * sum(read.values())

    def _masked(self, layer: LayerShape) -> int:
        """Return the bytes of attention under a mask: the output, and keys and values repeated."""
        if layer.mixer is None:
            return 0
        repeated = layer.mixer.heads - layer.mixer.kv_heads
        width = self.model.hidden_size + 2 * repeated * layer.mixer.head_dim
        return self.element * width

    @property
    def masks(self) -> int:
        """Bytes of masks per token and position of its row."""
        passed = self.model.layers[self.lowest :]
        return self.element * sum(_stands_in(layer) for layer in passed)

    @property
    def bypassed(self) -> int:
        """Bytes per token that bypasses keep: what their factors read, in float32."""
        stand_ins = (x.bypass for x in self.model.layers if x.bypass and _stands_in(x))
        return sum(4 * f.d_in for a in stand_ins for f in a.factors)

    @property
    def boundary(self) -> int:
        """Bytes per token of the residual stream."""
        return self.model.hidden_size * (4 if self.cast else self.element)

    @property
    def casts(self) -> int:
        """Bytes of the compute copies of masters."""
        if not self.cast:
            return 0
        layers = (layer for layer in self.model.layers if layer.runs)
        run = sum(x.params for layer in layers for x in layer.linears if x.active)
        return self.element * (run + self.model.head_products)

    # -- work ----------------------------------------------------------------------------------

    @property
    def head_gradients(self) -> int:
        """Products of the head in the backward pass, two of each where its weight trains."""
        heads = [x.head for x in self.model.exits] or [self.model.readout.head]
        return max(1, self.model.objective.exits) * (1 + any(x.trains for x in heads))

    def attention(self, index: int) -> float:
        """Return the FLOPs of a layer per token and position that it attends to."""
        mixer = self.model.layers[index].mixer
        return 4 * float(mixer.runs) * mixer.heads * mixer.head_dim if mixer else 0.0

    def recurrences(self, first: int) -> list[Recurrence]:
        """Return what layers from one on have in the place of attention."""
        mixers = (layer.mixer for layer in self.model.layers[first:])
        return [x.recurrence for x in mixers if x and x.recurrence]

    @property
    def recurrent_gradient(self) -> float:
        """How often the backward pass makes the products of recurrences, a mean over layers."""
        every = sum(x.stepping for x in self.recurrences(0))
        return 2 * sum(x.stepping for x in self.recurrences(self.lowest)) / max(1, every)

    def forward(self, index: int) -> float:
        """Return the FLOPs of a layer's products."""
        layer = self.model.layers[index]
        adapters = [(x.runs, x.linear.adapter) for x in _each(layer) if x.linear.adapter]
        if layer.bypass and layer.bypass.active:
            adapters.append((1, layer.bypass))
        own = sum(x.runs * x.products for x in _each(layer))
        if layer.mixer and (state := layer.mixer.recurrence):
            own += layer.mixer.runs * state.mapping
        beside = sum(runs * a.active * f.products for runs, a in adapters for f in a.factors)
        return 2 * float(own + beside)

    def gradient(self, index: int) -> float:
        """Return the FLOPs of a layer's gradients, of inputs that need one and of weights."""
        layer = self.model.layers[index]
        found: Share = self._bypass_gradient(index)
        for x in _each(layer) if index >= self.lowest else ():
            unread = index == self.bottom and not layer.norms[0].trains
            unneeded = unread and x.linear.name in readers(layer)
            found += x.runs * x.products * (x.linear.trains + (not unneeded))
            if x.linear.adapter and x.linear.adapter.trains:
                found += x.runs * _adapter_gradient(x.linear.adapter, unneeded)
        if index >= self.lowest and layer.mixer and (state := layer.mixer.recurrence):
            found += layer.mixer.runs * state.mapping
        return 2 * float(found)

    def _bypass_gradient(self, index: int) -> Share:
        layer = self.model.layers[index]
        if not layer.bypass or not _stands_in(layer):
            return 0
        return _adapter_gradient(layer.bypass, unneeded=index < self.lowest)

    @property
    def norms_of_gains(self) -> float:
        """FLOPs of multiplying out adapters whose outputs are scaled by the norms of the whole."""
        linears = (x for layer in self.model.layers for x in layer.linears if x.adapter)
        return sum(
            2 * x.copies * x.d_in * x.d_out * x.adapter.factors[0].d_out
            for x in linears
            if x.adapter and x.adapter.gains
        )


def readers(layer: LayerShape) -> tuple[str, ...]:
    """Return the names of the linears that read what enters a layer."""
    names = [x.name for x in layer.mixer.linears] if layer.mixer else []
    return READERS if set(READERS) & {*names} else tuple(names[:-1])


class Running(NamedTuple):
    """A linear and how often it is computed per token."""

    linear: Linear
    runs: Share

    @property
    def products(self) -> Share:
        """Weights that a token is multiplied with."""
        return self.linear.active * self.linear.d_in * self.linear.d_out


def _each(layer: LayerShape) -> Iterator[Running]:
    for part in (layer.mixer, layer.mlp):
        for linear in part.linears if part else ():
            yield Running(linear, part.runs if part else 0)


def _stands_in(layer: LayerShape) -> bool:
    """Whether a bypass of the layer is in use and trains."""
    return layer.bypass is not None and bool(layer.bypass.active) and layer.bypass.trains


def _between(linear: Linear) -> float:
    """Return the float32 bytes per token that an adapter keeps besides what it reads."""
    adapter = linear.adapter
    assert adapter is not None
    inner = sum(f.d_in for f in adapter.factors[1:] if f.products) + adapter.scales
    return 4 * float(adapter.active) * (inner + adapter.gains)


def _adapter_gradient(adapter: Adapter, unneeded: bool) -> Share:
    """Return the products of an adapter's backward pass, perhaps without its input's gradient."""
    products = sum(f.products * (1 + f.trains) for f in adapter.factors)
    return adapter.active * (products - unneeded * adapter.factors[0].products)


def step_flops(
    training: Training, one: Pass, recompute: bool = False, square: bool = False
) -> float:
    """Return the FLOPs of a training step on one micro-batch; a multiply-add counts as two.

    Args:
        training: What the steps do.
        one: The micro-batch.
        recompute: Whether activations are computed a second time.
        square: Whether attention counts as if every position saw all of its row, as torch's
            counter has it; else half of that.
    """
    context = one.tokens if square else one.tokens / 2
    met, later = stretches(one.tokens, CHUNK)
    recurrent = training.chunking * met + training.stepping * later
    layers = training.forward + training.attention * context + recurrent
    backward = training.gradient + training.attention_gradient * context
    backward += training.recurrent_gradient * recurrent
    head = training.head * (one.size if training.every else one.counted)
    times = training.forwards or (2 if recompute else 1)
    passes = layers * times + backward
    heads = training.heads * max(1, training.forwards) + training.head_gradients
    constant = training.forward_constant * times + training.gradient_constant
    return training.passes * (one.size * passes + head * heads + constant)


def held_flops(held: AnyShape, of: ModelShape, tokens: int) -> float:
    """Return the FLOPs per token of another model that training holds, all of whose tokens count.

    Args:
        held: The other model.
        of: The model that trains.
        tokens: Position that attention counts as.
    """
    again = 2 * held.head_products if of.objective.held_again else 0
    return held.flops_per_token(tokens) + again


def transient(shape: AnyShape, element: int, adapted: bool) -> int:
    """Return the bytes per token that a layer needs while it runs and nothing is kept.

    The embeddings and what the layer was given are there all along. In the MLP what it adds to and
    what it has normed come on top, and the inner tensors: two of them, and a third one where it is
    gated; in float32 the input and the output of an adapter. In attention it is what it has normed,
    queries, keys and values, and three times the queries while they are turned; or what a
    recurrence has in their place.
    """
    d, m = shape.hidden_size, shape.intermediate_size
    found = [0]
    for layer in {id(x): x for x in shape.layers}.values():
        if layer.mlp:
            found.append(element * (4 * d + (3 if layer.mlp.gated else 2) * layer.mlp.width))
        if layer.mixer:
            heads = 4 * layer.mixer.heads + 2 * layer.mixer.kv_heads
            own = element * heads * layer.mixer.head_dim
            if layer.mixer.recurrence:
                own = layer.mixer.recurrence.running(element)
            found.append(element * 3 * d + own)
    return max(found) + (8 * m if adapted else 0)


def left_behind(shape: AnyShape, element: int, positions: int, mapped: int) -> int:
    """Return the bytes that attention frees and the MLP after it cannot use.

    Blocks of at least `mapped` bytes lie in mappings of their own. Where the inner tensors of an
    MLP are so large, and what attention makes is not, its freed blocks stay beside them, as far as
    the four tensors of the MLP's own width do not take them.
    """
    found = 0
    for layer in {id(x): x for x in shape.layers}.values():
        if layer.mlp and layer.mixer and not layer.mixer.recurrence:
            own = layer.mixer
            queries = own.heads * own.head_dim
            if element * positions * queries < mapped <= element * positions * layer.mlp.width:
                freed = 4 * queries + 2 * own.kv_heads * own.head_dim - shape.hidden_size
                found = max(found, element * positions * freed)
    return found


def logit_bytes(one: Pass, vocabulary: int, element: int, every: bool) -> int:
    """Return the bytes of the logits at the peak of a pass without gradients.

    Args:
        one: The pass.
        vocabulary: Entries of the vocabulary.
        element: Bytes of a compute element.
        every: Whether the head runs on all positions, or only on those that count.
    """
    if one.kind in ("prefill", "decode"):
        return one.rows * vocabulary * element
    again = element if element < 4 else 0
    if one.compared:
        both = 2 * element * one.size + one.compared * (COMPARED_BYTES + 2 * again)
        return both * vocabulary
    counted = one.counted * vocabulary * (SCORE_BYTES + again)
    return counted + (one.size * vocabulary * element if every else 0)
