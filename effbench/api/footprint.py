"""Bytes that a pass through a model needs beside its weights, from shapes alone.

The counts follow what autograd keeps in transformers' Llama (PyTorch 2.13): they equal the tensors
that saved-tensor hooks see, and the tests hold them to it. With d the width, m the inner width of
the MLP, q and k the widths of queries and keys, h the heads and e the bytes of a compute element,
one decoder layer keeps per token:

    norms       the residual stream that enters each of the two, in float32
    attention   queries, keys, values and its output, e (2q + 2k), and 4h of log-sum-exp
    MLP         gate, its activation and up, 3 e m
    linears     their inputs, where their weights or an adapter beside them train
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from effbench.api.shape import Shape

Kind = Literal["train", "score", "prefill", "decode"]

BOTTOM = ("q_proj", "k_proj", "v_proj")
"""The linears of the first layer that read the embedding."""
POINTS_AT_ONCE = 8
"""Most operating points that go through a model side by side. More would save little: the work
that they share is an eighth by then."""
SCORE_BYTES = 8
"""Float32 bytes per logit at the peak of a loss without gradients: logits, their log-softmax."""
LOSS_BYTES = 12
"""The same with gradients, when the backward pass begins: log-softmax and two gradients."""


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
    fixed: int = 0
    """Bytes whatever the batch is: the casts of master weights."""
    loss_bytes: int = LOSS_BYTES
    """Bytes per counted logit when the backward pass begins."""
    quadratic: float = 0
    """Bytes per token and position of its row: masks that are not plainly causal."""
    forward: float = 0
    """FLOPs per token of the forward pass, matrix products without attention and head."""
    gradient: float = 0
    """The same of the backward pass."""
    forward_constant: float = 0
    """FLOPs of a forward pass whatever its tokens are: products of weights with weights."""
    gradient_constant: float = 0
    """The same of what recomputation does not repeat: the backward pass, terms of the loss."""
    run: float = 0
    """Layers that run, a mean over the steps."""
    passed: float = 0
    """Layers whose attention a gradient passes."""
    heads: int = 1
    """Products of the head in the forward pass, those that the backward pass repeats included."""
    head_gradients: int = 1
    """Products of the head in the backward pass: 2 where its weight trains, else 1."""
    every: bool = False
    """Whether the head runs on all positions, not only on those that count."""


def trained_layers(shape: Shape, element: int, masters: bool) -> Training:
    """Return what training every weight keeps.

    Args:
        shape: The model's shape.
        element: Bytes of a compute element.
        masters: Whether the weights are float32 masters under autocast to fewer bytes.
    """
    d, blocks = _sizes(shape, element)
    if masters and element < 4:
        # Residual stream and norms in float32; each linear casts its input and its weight anew.
        layers = [16 * d + element * (5 * d + 4 * m) + attention for m, attention in blocks]
        fixed = element * (shape.linear_params + shape.vocab_size * shape.hidden_size)
        boundary = 4 * d
    else:
        layers = [16 * d + 2 * element * d + element * 4 * m + attention for m, attention in blocks]
        fixed, boundary = 0, element * d
    return Training(
        sum(layers) + 8 * d,  # the last norm
        max(layers),
        boundary,
        fixed,
        forward=2 * shape.linear_params,
        gradient=4 * shape.linear_params,
        run=shape.num_layers,
        passed=shape.num_layers,
        head_gradients=2,
    )


def adapted_layers(
    shape: Shape, element: int, rank: int, targets: Sequence[str], through: bool = False
) -> Training:
    """Return what float32 adapters of `rank` on the linears `targets` of a frozen base keep.

    Args:
        shape: The model's shape.
        element: Bytes of a compute element.
        rank: Of each adapter.
        targets: Names of the adapted linears.
        through: Whether gradients reach the embedding, though nothing trains there.
    """
    d, blocks = _sizes(shape, element)
    layers = []
    for index, (m, attention) in enumerate(blocks):
        sizes = shape.linear_sizes(index)
        inputs = {name: d_in for name, (d_in, _) in sizes.items() if name in targets}
        hidden = 4 * rank * len(inputs)
        if element == 4:  # nothing is cast, so that linears with one input share it
            shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
            inputs = {shared.get(name, name): size for name, size in inputs.items()}
            inputs.pop("o_proj", None)  # the attention's output, which is kept anyway
        layers.append(8 * d + 3 * element * m + attention + 4 * sum(inputs.values()) + hidden)
    products = 2 * rank * sum(i + o for _, name, i, o in shape.linears() if name in targets)
    unneeded = 0 if through else _first_gradients(shape, rank, targets)
    return Training(
        sum(layers),
        max(layers),
        element * d,
        forward=2 * shape.linear_params + products,
        gradient=2 * shape.linear_params + 2 * products - unneeded,
        run=shape.num_layers,
        passed=shape.num_layers,
    )


def _first_gradients(shape: Shape, rank: int, targets: Sequence[str]) -> int:
    """Return the FLOPs of gradients with respect to what the first linears read: none has a use."""
    first = shape.linear_sizes()
    readers = [n for n in BOTTOM if n in first]
    base = sum(2 * first[n][0] * first[n][1] for n in readers)
    return base + sum(2 * rank * first[n][0] for n in readers if n in targets)


def passed_layers(shape: Shape, element: int, layers: int) -> Training:
    """Return what frozen layers without adapters keep where a gradient has to pass `layers`."""
    d, blocks = _sizes(shape, element)
    kept = [8 * d + 3 * element * m + attention for m, attention in blocks]
    passed = shape.num_layers - layers
    return Training(
        sum(kept[passed:]),
        max(kept),
        element * d,
        forward=2 * shape.linear_params,
        gradient=sum(2 * i * o for layer, _, i, o in shape.linears() if layer >= passed),
        run=shape.num_layers,
        passed=layers,
    )


def step_flops(
    shape: Shape, training: Training, one: Pass, recompute: bool = False, square: bool = False
) -> float:
    """Return the FLOPs of a training step on one micro-batch; a multiply-add counts as two.

    Args:
        shape: The model's shape.
        training: What the method's steps do.
        one: The micro-batch.
        recompute: Whether activations are computed a second time.
        square: Whether attention counts as if every position saw all of its row, as torch's
            counter has it; else half of that.
    """
    attention = 4 * shape.head_dim * (one.tokens if square else one.tokens / 2)
    heads = _heads(shape, training.run)
    passed = heads - _heads(shape, training.run - training.passed)
    layers = training.forward + attention * heads
    backward = training.gradient + 2 * attention * passed
    head = 2 * shape.vocab_size * shape.hidden_size * (one.size if training.every else one.counted)
    times = 2 if recompute else 1
    passes = layers * times + backward
    constant = training.forward_constant * times + training.gradient_constant
    return one.size * passes + head * (training.heads + training.head_gradients) + constant


def _heads(shape: Shape, layers: float) -> float:
    """Return the query heads of the first `layers` layers; of a broken one its part."""
    whole = int(layers)
    found: float = sum(shape.layer(index).num_heads for index in range(whole))
    if layers > whole:
        found += (layers - whole) * shape.layer(whole).num_heads
    return found


def _sizes(shape: Shape, element: int) -> tuple[int, list[tuple[int, int]]]:
    """Return d, and of each layer m and the bytes that attention keeps per token."""
    found = []
    for index in range(shape.num_layers):
        size, linears = shape.layer(index), shape.linear_sizes(index)
        output = shape.head_dim * size.num_heads
        # What a layer takes from another one is kept there.
        states = sum(linears[name][1] for name in BOTTOM if name in linears)
        found.append((size.intermediate_size, element * (output + states) + 4 * size.num_heads))
    return shape.hidden_size, found


def transient(shape: Shape, element: int, adapted: bool) -> int:
    """Return the bytes per token that a layer needs while it runs and nothing is kept.

    The widest moment is in the MLP: residual stream, normed input, three inner tensors, and in
    float32 the input and the output of an adapter.
    """
    d, m = shape.hidden_size, shape.intermediate_size
    return element * (2 * d + 3 * m) + (8 * m if adapted else 0)


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
    counted = one.counted * vocabulary * (SCORE_BYTES + (element if element < 4 else 0))
    return counted + (one.size * vocabulary * element if every else 0)
