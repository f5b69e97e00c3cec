"""The shape of a decoder-only model, composed of its parts, from which everything is counted.

A `ModelShape` is layers (`api.parts`) between an embedding and a readout. `Shape` is its form
in configs: the sizes of a Llama whose layers are alike. What a model costs is counted in
`api.cost`, what a step of training keeps in `api.footprint`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import repeat
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from effbench.api.parts import (
    MLP,
    PLAIN,
    Adapter,
    Cache,
    LayerShape,
    LayerSize,
    Linear,
    Mixer,
    Norm,
    Objective,
    Readout,
    low_rank,
)
from effbench.api.schema import Layers, PositiveInt
from effbench.api.weights import COMPUTE, MASTERS, WeightFormat

Held = TypeVar("Held", Norm, Linear)

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + MLP_LINEARS
"""The seven linear layers of a Llama-style decoder block, in the order they run."""

LAYERS_DIFFER = (
    "The layers of this model differ in size or share states, so a number of layers is no depth.",
    "Choose another method, or a model whose layers are alike.",
)
"""Message and hint of what works with equal layers alone."""

Phase = Literal["train", "use"]
"""While a method trains, at the most, or as it is used afterwards."""

Anatomy = Literal["plain", "llama", "other"]
"""How a model's blocks are made: Llama's own without biases, what computes the same with other
classes or with biases, or anything else."""


class AnyShape:
    """What is known alike of a flat shape and of a composed one."""

    if TYPE_CHECKING:

        @property
        def hidden_size(self) -> int: ...  # noqa: D102
        @property
        def intermediate_size(self) -> int: ...  # noqa: D102
        @property
        def num_layers(self) -> int: ...  # noqa: D102
        @property
        def num_heads(self) -> int: ...  # noqa: D102
        @property
        def num_kv_heads(self) -> int: ...  # noqa: D102
        @property
        def head_dim(self) -> int: ...  # noqa: D102
        @property
        def vocab_size(self) -> int: ...  # noqa: D102
        @property
        def max_positions(self) -> int: ...  # noqa: D102
        @property
        def tied(self) -> bool: ...  # noqa: D102
        @property
        def rope_theta(self) -> float: ...  # noqa: D102
        @property
        def rms_eps(self) -> float: ...  # noqa: D102
        @property
        def layers(self) -> tuple[LayerShape, ...]: ...  # noqa: D102

    def layer(self, index: int) -> LayerSize:
        """Return the sizes of one decoder block."""
        return self.layers[index].size

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same sizes, none of which is 0, and each makes its states."""
        alike = len({x.size for x in self.layers}) <= 1
        return alike and all(x.mixer and x.mlp for x in self.layers) and not self.shares

    @property
    def shares(self) -> bool:
        """Whether some layer takes states from another."""
        return any(x.mixer and x.mixer.source is not None for x in self.layers)

    @property
    def tail(self) -> int:
        """Layers at the top that add nothing to a cache: a prompt's last position is enough."""
        count = 0
        for layer in reversed(self.layers):
            if layer.mixer is None or layer.mixer.source is None or layer.mixer.cache.per_token:
                break
            count += 1
        return count

    def linear_sizes(self, layer: int = 0) -> dict[str, tuple[int, int]]:
        """Return `(d_in, d_out)` of each linear of one block."""
        return {x.name: (x.d_in, x.d_out) for x in self.layers[layer].linears}

    def linears(self) -> Iterator[tuple[int, str, int, int]]:
        """Yield `(layer, name, d_in, d_out)` of every decoder linear, each expert's for itself."""
        for index, layer in enumerate(self.layers):
            for x in layer.linears:
                yield from repeat((index, x.name, x.d_in, x.d_out), x.copies)

    @property
    def linear_params(self) -> int:
        """Weights in all decoder linears."""
        return sum(x.params for layer in self.layers for x in layer.linears)

    @property
    def embedding_params(self) -> int:
        """Weights in the embedding and, when it is not tied, the head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def head_products(self) -> int:
        """Weights that a state is multiplied with on its way to the logits."""
        return self.vocab_size * self.hidden_size

    @property
    def outputs(self) -> int:
        """Logits of a position."""
        return self.vocab_size

    @property
    def vector_params(self) -> int:
        """Elements of the norms of every block and the final one, and of the linears' biases."""
        inner = sum(n.params for layer in self.layers for n in layer.all_norms)
        return inner + self.hidden_size + sum(x.biases for y in self.layers for x in y.linears)

    @property
    def params(self) -> int:
        """All weights without adapters and further exits, tied ones counted once."""
        return self.linear_params + self.embedding_params + self.vector_params

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Names of the linear layers of its blocks, in the order they run."""
        linears = (x for layer in self.layers for x in layer.linears if not x.bare)
        return tuple(dict.fromkeys(x.name for x in linears))

    def chosen(self, names: Collection[str]) -> tuple[str, ...]:
        """Return the linears that are meant by some names.

        `LINEARS`, the default of the methods, means all of them where blocks have others, or
        experts.
        """
        found = self.linear_names
        usual = set(LINEARS) <= {*found} and not self.has_experts
        return tuple(names) if set(names) != set(LINEARS) or usual else found

    @property
    def has_experts(self) -> bool:
        """Whether some layer has experts that linears compute."""
        return any(x.copies > 1 and not x.bare for y in self.layers for x in y.linears)

    @property
    def attention_width(self) -> int:
        """Query heads of all layers times their width."""
        return sum(x.mixer.heads * x.mixer.head_dim for x in self.layers if x.mixer)

    def kv_bytes_per_token(self, element_bytes: int) -> float:
        """Return the bytes that one token adds to a full key/value cache."""
        caches = (x.mixer.cache for x in self.layers if x.mixer)
        found = sum(c.per_token * (c.element or element_bytes) for c in caches)
        return float(found) if isinstance(found, Fraction) else found

    def kv_bytes_per_sequence(self, element_bytes: int) -> float:
        """Return the bytes of cache that a sequence has however long it is."""
        caches = (x.mixer.cache for x in self.layers if x.mixer)
        return sum(c.constant * (c.element or element_bytes) for c in caches)

    def flops_per_token(self, context: int = 0) -> int:
        """Return forward FLOPs of one token that attends to `context` positions.

        Matrix products only (multiply-adds times two), the head included; every layer runs.
        """
        linears = sum(x.d_in * x.d_out * x.active for layer in self.layers for x in layer.linears)
        states = (x.mixer.recurrence for x in self.layers if x.mixer and x.mixer.recurrence)
        linears += sum(x.mapping + x.stepping for x in states)
        products = 2 * (int(linears) + self.head_products)
        return products + 4 * self.attention_width * context

    def pass_flops_per_token(self, tokens: int) -> float:
        """Return forward FLOPs of one token of a pass over `tokens`, attention as a full square."""
        states = [x.mixer.recurrence for x in self.layers if x.mixer and x.mixer.recurrence]
        more = sum(x.passing(tokens) - x.stepping for x in states)
        return self.flops_per_token(tokens) + 2 * more


@dataclass(frozen=True)
class Shape(AnyShape):
    """Sizes of a Llama-style model whose layers are alike: the flat form of configs."""

    hidden_size: PositiveInt
    """Width d of the residual stream."""
    intermediate_size: PositiveInt
    """Inner width of the gated MLP."""
    num_layers: Layers
    """Number of decoder blocks L."""
    num_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt
    """Key/value heads (grouped-query attention when fewer than the query heads)."""
    head_dim: PositiveInt
    """Width of one head."""
    vocab_size: PositiveInt
    """Rows of the embedding."""
    max_positions: PositiveInt = 2048
    """Longest context the positions were made for, in tokens."""
    tied: bool = False
    """Whether the output head shares the embedding's storage."""
    rope_theta: float = 10000.0
    """Base of the rotary position angles."""
    rms_eps: float = 1e-5
    """Epsilon of the RMS norms."""

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """The blocks, composed."""
        return _composed(self).layers


@dataclass(frozen=True)
class ModelShape(AnyShape):
    """A model composed of its parts; every count is exact for it."""

    layers: tuple[LayerShape, ...]
    embed: Linear
    """The embedding, [vocab, d]."""
    readout: Readout
    """Norm and head after the last layer."""
    exits: tuple[Readout, ...] = ()
    """Norms and heads of earlier exits, which are in memory."""
    more: tuple[Linear, ...] = ()
    """Linears of other heads, which are in memory and which decoding does not read."""
    tables: tuple[Linear, ...] = ()
    """Further embeddings, such as one of positions."""
    norms: tuple[Norm, ...] = ()
    """Norms elsewhere than in layers and before heads, such as one after the embedding."""
    max_positions: int = 2048
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    head_dim: int = 0
    objective: Objective = PLAIN
    """Of training."""
    through: bool = False
    """Whether gradients reach the embedding, though nothing may train there."""
    forwards: int = 0
    """Forward passes of a step that estimates its gradient without a backward pass; 0 has one."""
    passes: int = 1
    """Passes forward and backward of a step, each over as many rows as a step has."""
    held_bytes: int = 0
    """Bytes of what else training holds beside the weights."""
    grown: int = 0
    """Float32 parameters by which adapters may grow while it trains."""
    fixed: int = 0
    """Numbers that are held as the embedding is and are no parameters, such as fixed positions."""
    simulated: bool = False
    """Whether fewer bytes are only computed with, and not held."""
    anatomy: Anatomy = "plain"
    family: str = "llama"
    """Its `model_type` in transformers."""
    kind: str = "causal"
    """A file in `nn/model_kinds`."""
    encoder: int = 0
    """The first layers, which read prompts alone, and the others answers alone: nothing is counted
    per token then."""

    @classmethod
    def of(cls, shape: AnyShape) -> ModelShape:
        """Return a shape composed; one that is composed already as it is."""
        return shape if isinstance(shape, ModelShape) else _composed(cast("Shape", shape))

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        """Width d of the residual stream."""
        return self.embed.d_out

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.embed.d_in

    @property
    def tied(self) -> bool:
        """Whether the output head shares the embedding's storage."""
        return self.readout.tied

    @property
    def embedding_params(self) -> int:
        """Weights in the embedding and in what gives logits, but for a head that is tied."""
        own = 0 if self.tied else self.readout.head.params
        return self.embed.params + own + sum(x.params for x in self.readout.before)

    @property
    def head_products(self) -> int:
        """Weights that a state is multiplied with on its way to the logits."""
        return self.readout.products

    @property
    def outputs(self) -> int:
        """Logits of a position."""
        return self.readout.head.d_out

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Query heads of the largest block."""
        return max(1, *(x.size.num_heads for x in self.layers), 1)

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of the largest block."""
        return max(1, *(x.size.num_kv_heads for x in self.layers), 1)

    @property
    def intermediate_size(self) -> int:
        """Neurons of the widest MLP."""
        return max(1, *(x.size.intermediate_size for x in self.layers), 1)

    @property
    def vector_params(self) -> int:
        """Elements of all norms before the logits, and of biases."""
        inner = sum(n.params for layer in self.layers for n in layer.all_norms)
        biases = sum(x.biases for layer in self.layers for x in layer.linears)
        ends = self.readout.norm.params + sum(x.biases for x in self.readout.linears)
        return inner + biases + ends + sum(n.params for n in self.norms)

    @property
    def params(self) -> int:
        """All weights without adapters and further exits, tied ones counted once."""
        return super().params + sum(x.params for x in self.tables)

    @property
    def formats(self) -> frozenset[WeightFormat]:
        """The packed formats that some of its linears are in, the head among them."""
        linears = (x for layer in self.layers for x in layer.linears)
        every = (*linears, *self.readout.linears)
        return frozenset(x.format for x in every if x.format.packed)

    # -- changes -------------------------------------------------------------------------------

    def map(self, change: Callable[[int, LayerShape], LayerShape]) -> ModelShape:
        """Return the model with every layer changed; neighbours that are equal become one."""
        made: list[LayerShape] = []
        for index, layer in enumerate(self.layers):
            new = change(index, layer)
            made.append(made[-1] if made and new == made[-1] else new)
        return replace(self, layers=tuple(made))

    def each(self, change: Callable[[LayerShape], LayerShape]) -> ModelShape:
        """Return the model with every layer changed alike, wherever it is."""
        made: dict[int, LayerShape] = {}
        for layer in self.layers:
            if id(layer) not in made:
                made[id(layer)] = change(layer)
        return replace(self, layers=tuple(made[id(layer)] for layer in self.layers))

    def map_linears(
        self, change: Callable[[int, Linear], Linear], names: Collection[str] | None = None
    ) -> ModelShape:
        """Return the model with the linears of some names changed, in every layer; None is all."""
        return self.map(
            lambda i, layer: layer.map(
                lambda x: change(i, x) if names is None or x.name in names else x
            )
        )

    def only(self, layers: Sequence[int]) -> ModelShape:
        """Return the model with some of its layers alone, by number."""
        return replace(self, layers=tuple(self.layers[i] for i in layers))

    def packed(self, weights: WeightFormat) -> ModelShape:
        """Return the model with its decoder linears in another format, frozen."""
        names = self.chosen(LINEARS)
        return self.each(
            lambda layer: layer.map(
                lambda x: replace(x, format=weights, trains=False) if x.name in names else x
            )
        )

    def adapted(
        self, make: Callable[[int, Linear], Adapter | None], names: Collection[str] = LINEARS
    ) -> ModelShape:
        """Return the frozen model with an adapter on each linear of some names; see `chosen`.

        Where these are experts', each of them has its own.
        """

        def put(index: int, linear: Linear) -> Linear:
            made = None if linear.bare else make(index, linear)
            return replace(linear, adapter=made and made.on(linear.copies, linear.active))

        frozen = self.frozen()
        return replace(frozen, readout=frozen.readout.learning()).map_linears(
            put, self.chosen(names)
        )

    def low_rank(
        self, rank: int, names: Collection[str] = LINEARS, used: int | None = None
    ) -> ModelShape:
        """Return the frozen model with adapters B A of a rank; see `low_rank`."""
        return self.adapted(lambda _, x: low_rank(x.d_in, x.d_out, rank, used), names)

    def trained(self, weights: WeightFormat = MASTERS) -> ModelShape:
        """Return the model with every weight training, held in a format."""
        return self._weights(lambda _: weights, trains=True)

    def frozen(self) -> ModelShape:
        """Return the model with nothing that trains."""
        bare = self._weights(lambda held: held, trains=False)
        return bare.each(lambda layer: layer.still())

    def merged(self) -> ModelShape:
        """Return the model with its adapters added to dense weights."""
        return self.each(
            lambda layer: layer.map(lambda x: replace(x, adapter=None, format=COMPUTE))
        )

    def dense(self) -> ModelShape:
        """Return the frozen model with its adapters added, all weights in the compute dtype."""
        return self.merged()._weights(lambda _: COMPUTE, trains=False)

    def used(self) -> ModelShape:
        """Return the model as it is used: masters are cast to the compute dtype."""
        return self._weights(lambda held: held.used())

    def _weights(
        self, change: Callable[[WeightFormat], WeightFormat], trains: bool | None = None
    ) -> ModelShape:
        """Return the model with the format of all weights changed, and whether they train."""

        def held(x: Held) -> Held:
            now, learns = change(x.format), x.trains if trains is None else trains
            same = now is x.format and learns == x.trains
            return x if same else replace(x, format=now, trains=learns)

        norm: Callable[[Norm], Norm] = held
        linear: Callable[[Linear], Linear] = held

        def readout(x: Readout) -> Readout:
            return x.map(linear, norm)

        return replace(
            self.each(lambda x: x.map(linear).map_norms(norm)),
            norms=tuple(norm(x) for x in self.norms),
            embed=linear(self.embed),
            readout=readout(self.readout),
            exits=tuple(readout(x) for x in self.exits),
            more=tuple(linear(x) for x in self.more),
            tables=tuple(linear(x) for x in self.tables),
        )


# -- plain models ------------------------------------------------------------------------------


def llama_layer(hidden_size: int, head_dim: int, size: LayerSize) -> LayerShape:
    """Return a block of Llama; what it has no head or no neuron for is not there."""
    d, m = hidden_size, size.intermediate_size
    q, kv = size.num_heads * head_dim, size.num_kv_heads * head_dim
    mixer = mlp = None
    if q:
        sizes = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
        heads = size.num_kv_heads
        mixer = Mixer(
            tuple(Linear(n, i, o) for n, (i, o) in sizes.items()),
            size.num_heads,
            heads,
            head_dim,
            Cache(heads, heads, head_dim),
        )
    if m:
        sizes = {"gate_proj": (d, m), "up_proj": (d, m), "down_proj": (m, d)}
        mlp = MLP(tuple(Linear(n, i, o) for n, (i, o) in sizes.items()), m)
    return LayerShape(mixer, mlp, (Norm(d), Norm(d)))


@cache
def _composed(shape: Shape) -> ModelShape:
    d, vocabulary = shape.hidden_size, shape.vocab_size
    size = LayerSize(shape.num_heads, shape.num_kv_heads, shape.intermediate_size)
    return ModelShape(
        layers=(llama_layer(d, shape.head_dim, size),) * shape.num_layers,
        embed=Linear("embed_tokens", vocabulary, d),
        readout=Readout(Norm(d), Linear("lm_head", d, vocabulary), shape.tied),
        max_positions=shape.max_positions,
        rope_theta=shape.rope_theta,
        rms_eps=shape.rms_eps,
        head_dim=shape.head_dim,
    )


def experts(hidden_size: int, width: int, count: int, active: int, shared: int = 0) -> MLP:
    """Return an MLP of experts with a router, as mixtures of experts have it.

    Args:
        hidden_size: Width d of the residual stream.
        width: Inner neurons of one expert.
        count: Experts.
        active: Experts that a token goes through.
        shared: Neurons of an expert that every token goes through besides; 0 is none.
    """
    d = hidden_size
    sizes = {"gate_proj": (d, width), "up_proj": (d, width), "down_proj": (width, d)}
    linears = [Linear("router", d, count)]
    linears += [Linear(n, i, o, copies=count, active=active) for n, (i, o) in sizes.items()]
    if shared:
        sizes = {"gate_proj": (d, shared), "up_proj": (d, shared), "down_proj": (shared, d)}
        linears += [Linear(f"shared_{n}", i, o) for n, (i, o) in sizes.items()]
    return MLP(tuple(linears), active * width + shared)
