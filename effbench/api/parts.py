"""The parts that a model's shape is composed of, down to the single matrix.

A layer is a mixer (attention or what stands in its place), an MLP (dense or of experts) and perhaps
a bypass for tokens that skip it. These are linears, each with a weight format, an adapter and
whether it trains. Counts are per copy and token: experts are linears with `copies`, `active` of
which a token goes through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar

from effbench.api.schema import NonNegativeInt
from effbench.api.weights import COMPUTE, FLOAT32, WeightFormat

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Names of the linears that choose among experts; they stay as they are."""

Share = int | float | Fraction
"""How often something happens per token; a fraction where sums have to be exact."""


def portion(part: int, whole: int) -> Share:
    """Return a share that adds up exactly."""
    return Fraction(part, whole)


@dataclass(frozen=True)
class Factor:
    """One matrix of an adapter."""

    d_in: int
    d_out: int
    trains: bool = True
    used: int | None = None
    """Weights that a token is multiplied with; None for all."""

    @property
    def params(self) -> int:
        """Weights in memory."""
        return self.d_in * self.d_out

    @property
    def products(self) -> int:
        """Weights that a token is multiplied with."""
        return self.params if self.used is None else self.used


@dataclass(frozen=True)
class Adapter:
    """Matrices in a row beside a linear or a layer: W x + s F_n ... F_1 x."""

    factors: tuple[Factor, ...]
    format: WeightFormat = FLOAT32
    scales: int = 0
    """Trained numbers that scale what lies between the factors."""
    gains: int = 0
    """Trained numbers that scale the outputs, divided by the norms of the rows of the whole."""
    trains: bool = True
    """Whether any of it does."""
    copies: int = 1
    """How many there are (one for each expert)."""
    active: Share = 1
    """How many of them a token goes through."""

    @property
    def params(self) -> int:
        """Parameters of all copies."""
        return self.copies * (sum(f.params for f in self.factors) + self.scales + self.gains)

    def on(self, copies: int, active: Share) -> Adapter:
        """Return it beside each of so many experts, of which a token goes through some."""
        return replace(self, copies=copies * self.copies, active=active * self.active)

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        if not self.trains:
            return 0
        matrices = sum(f.params for f in self.factors if f.trains)
        return self.copies * (matrices + self.scales + self.gains)


def low_rank(d_in: int, d_out: int, rank: int, used: int | None = None) -> Adapter:
    """Return the adapter B A of `rank` ranks, `used` of which a token is multiplied with."""
    used = rank if used is None else used
    return Adapter((Factor(d_in, rank, used=used * d_in), Factor(rank, d_out, used=used * d_out)))


def deep_update(
    form: str, d_in: int, d_out: int, rank: int, depth: int, once: bool, frame_rate: float
) -> Adapter:
    """Return the adapter of a linear that is a product of several factors (`nn.adapters.deep`).

    Args:
        form: `compressed` between two frames, `narrow` or `full`.
        d_in: Width of what the linear reads.
        d_out: Width of what it gives.
        rank: Inner width r.
        depth: Factors.
        once: Whether the inner factors of the compressed form are one for a token.
        frame_rate: Of the frames; at 0 they do not train.
    """
    if form == "compressed":
        trains = frame_rate > 0
        inner = [Factor(rank, rank, used=0 if once and i else None) for i in range(depth)]
        return Adapter((Factor(d_in, rank, trains), *inner, Factor(rank, d_out, trains)))
    width = rank if form == "narrow" else min(d_in, d_out)
    inner = [Factor(width, width)] * (depth - 2)
    return Adapter((Factor(d_in, width), *inner, Factor(width, d_out)))


@dataclass(frozen=True)
class Linear:
    """A linear layer, its weight [d_out, d_in]."""

    name: str
    d_in: int
    d_out: int
    format: WeightFormat = COMPUTE
    trains: bool = False
    adapter: Adapter | None = None
    copies: int = 1
    """How many there are (one for each expert)."""
    active: Share = 1
    """How many of them a token goes through."""
    bias: bool = False
    """Whether a vector [d_out] is added, which stays dense where the weight is packed."""
    bare: bool = False
    """Whether nothing takes its place or stands beside it: a router, or a tensor of a module that
    does more than multiply."""

    @property
    def params(self) -> int:
        """Weights of all copies, without biases and the adapter."""
        return self.copies * self.d_in * self.d_out

    @property
    def biases(self) -> int:
        """Elements of the biases of all copies."""
        return self.copies * self.d_out * self.bias


@dataclass(frozen=True)
class Norm:
    """A norm over vectors of `size` elements, each with a gain; 0 where there is none."""

    size: int
    format: WeightFormat = COMPUTE
    trains: bool = False
    bias: bool = False
    """Whether each element has an offset too."""

    @property
    def params(self) -> int:
        """Gains and offsets."""
        return self.size * (1 + self.bias)


@dataclass(frozen=True)
class Cache:
    """What a mixer keeps of the tokens that it has seen, in elements."""

    keys: Share = 0
    """Heads of keys that one more token adds."""
    values: Share = 0
    """Heads of values that it adds."""
    width: int = 0
    """Elements of a head."""
    constant: int = 0
    """Elements per sequence however long it is: a state."""
    window: int | None = None
    """Most tokens that are kept; None keeps all."""
    prompt: int | None = None
    """Most tokens of a prompt that are kept, and all later ones; None keeps all."""
    element: float = 0
    """Bytes of an element; 0 takes the compute dtype's."""
    recent: int = 0
    """Last tokens whose elements are in the compute dtype all the same."""
    group: int = 1
    """Tokens that leave them together."""
    undo: int = 0
    """Tokens that can be taken back, for which what they made leave is kept a while longer."""

    @property
    def per_token(self) -> Share:
        """Elements that one more token adds, as long as the window is not full."""
        return (self.keys + self.values) * self.width

    @property
    def bounds(self) -> list[tuple[int, str]]:
        """How many tokens are kept at the most, and of which."""
        bounds = ((self.window, "tokens"), (self.prompt, "of a prompt"))
        return [(n, of) for n, of in bounds if n is not None]

    def shared_out(self, share: Share) -> Cache:
        """Return the cache that a share of the tokens enters."""
        return replace(self, keys=self.keys * share, values=self.values * share)

    def places(self, tokens: float, prompt: int = 0) -> float:
        """Return how many of the tokens that have come in are still seen.

        Args:
            tokens: All of them.
            prompt: The first of them, that were read as a prompt.
        """
        gone = 0 if self.prompt is None else max(0, prompt - self.prompt)
        return tokens - gone if self.window is None else min(tokens - gone, self.window)

    def bytes(self, tokens: float, element: int, prompt: int = 0) -> float:
        """Return the bytes of one sequence.

        Args:
            tokens: That have come in.
            element: Bytes of an element of the compute dtype.
            prompt: The first of them, that were read as a prompt.
        """
        room = self if self.window is None else replace(self, window=self.window + self.undo)
        kept, held = room.places(tokens, prompt), self.element or element
        if not self.recent:
            return float((self.per_token * kept + self.constant) * held)
        coded = self._left(kept)
        late = kept - self._left(kept - self.undo)
        return float(self.per_token * (coded * held + late * element) + self.constant * held)

    def _left(self, tokens: float) -> float:
        """Return how many of so many tokens have left the recent ones."""
        return max(0, tokens - self.recent) // self.group * self.group


def stretches(tokens: int, chunk: int) -> tuple[float, float]:
    """Return how many positions a token of a pass meets in its stretch, as a mean, and the share of
    tokens behind the first stretch.
    """
    whole, rest = divmod(tokens, chunk)
    return (whole * chunk**2 + rest**2) / max(1, tokens), max(0.0, 1 - chunk / max(1, tokens))


@dataclass(frozen=True)
class Recurrence:
    """Linear attention: a state [kv heads, d, d] in the place of keys and values.

    Each query and key may first be multiplied with a fixed float32 matrix [d, d] of the layer.
    """

    heads: int
    kv_heads: int
    width: int
    """Of a head, d."""
    mapped: bool
    """Whether there is such a matrix."""
    chunk: int
    """Positions that a pass over many compares with each other directly."""
    features: int = 1
    """Tensors that a gradient needs of the features of a query or key."""
    learned: bool = False
    """Whether its rates of decay train."""
    made: tuple[int, int] = (2, 3)
    """Float32 tensors of a query's size that there are while features are made of one that is in
    float32, and of one that is not."""

    @property
    def state(self) -> int:
        """Elements of the state."""
        return self.kv_heads * self.width**2

    @property
    def held(self) -> int:
        """Bytes of the fixed matrix."""
        return FLOAT32.element * self.width**2 * self.mapped

    @property
    def mapping(self) -> int:
        """Multiply-adds per token with the fixed matrix."""
        return (self.heads + self.kv_heads) * self.width**2 * self.mapped

    @property
    def stepping(self) -> int:
        """Multiply-adds per token that put a key into the state and read it with the queries."""
        return (self.heads + self.kv_heads) * self.width**2

    @property
    def chunking(self) -> int:
        """Multiply-adds per token and position of its stretch: scores, and what they weigh."""
        return 2 * self.heads * self.width

    def passing(self, tokens: int) -> float:
        """Return the multiply-adds per token of a pass over so many, the fixed matrix left out."""
        met, later = stretches(tokens, self.chunk)
        return self.chunking * met + self.stepping * later

    @property
    def kept(self) -> int:
        """Bytes per token that a pass over many keeps for its gradient, all in float32.

        Features; keys and values, once faded and once as they are; queries likewise; scores within
        a stretch, before their decay too where that trains; means and deviations of the norm.
        """
        q, k = self.heads * self.width, self.kv_heads * self.width
        own = self.features * (q + k) + 3 * k + 2 * q
        scores = self.chunk * (1 + self.learned)
        return FLOAT32.element * (own + self.heads * (scores + 2))

    def running(self, element: int) -> int:
        """Return the bytes per token of a pass that keeps nothing for a gradient, at its peak.

        Queries are turned, with three more tensors of their size; or their features are made; or
        there are all features, the values as they came, and in float32 what was read, the same side
        by side, and normed.

        Args:
            element: Bytes of a compute element.
        """
        q, k = self.heads * self.width, self.kv_heads * self.width
        made = self.made[element < FLOAT32.element]
        turned = element * (4 * q + 2 * k)
        mapped = element * (q + 2 * k) + FLOAT32.element * made * q
        normed = FLOAT32.element * (4 * q + k) + element * k
        return max(turned, mapped, normed)


@dataclass(frozen=True)
class Mixer:
    """What lets tokens see each other: attention, or a recurrence in its place."""

    linears: tuple[Linear, ...]
    heads: int
    """Query heads that attend to all positions; 0 for what keeps a state."""
    kv_heads: int
    head_dim: int
    cache: Cache
    source: int | None = None
    """An earlier layer that states are taken from."""
    runs: Share = 1
    """How often it is computed per token."""
    reads: Share | None = None
    """How often its weights are read per token; None is `runs`."""
    norms: tuple[Norm, ...] = ()
    """Norms inside it or after it, beside the one that it reads through."""
    recurrence: Recurrence | None = None
    """What it has in the place of attention."""


@dataclass(frozen=True)
class MLP:
    """An MLP; of experts where its linears have copies and a router chooses among them."""

    linears: tuple[Linear, ...]
    width: int
    """Inner neurons that a token goes through."""
    runs: Share = 1
    """How often it is computed per token."""
    reads: Share | None = None
    """How often its weights are read per token; None is `runs`."""
    norms: tuple[Norm, ...] = ()
    """Norms inside it or after it, beside the one that it reads through."""
    gated: bool = True
    """Whether its inner neurons are products of two projections."""


@dataclass(frozen=True)
class LayerSize:
    """Sizes of one decoder block; a block may have no head or no MLP neuron at all."""

    num_heads: NonNegativeInt
    """Query heads."""
    num_kv_heads: NonNegativeInt
    """Key/value heads."""
    intermediate_size: NonNegativeInt
    """Neurons of the gated MLP."""


@dataclass(frozen=True)
class LayerShape:
    """One decoder block."""

    mixer: Mixer | None
    mlp: MLP | None
    norms: tuple[Norm, Norm]
    """Before the mixer and before the MLP; they are there even where those are not."""
    bypass: Adapter | None = None
    """What stands in for the layer where a token skips it."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears in the order they run."""
        parts = (p for p in (self.mixer, self.mlp) if p is not None)
        return tuple(linear for part in parts for linear in part.linears)

    @property
    def all_norms(self) -> tuple[Norm, ...]:
        """The two norms, and those of its parts."""
        parts = (p for p in (self.mixer, self.mlp) if p is not None)
        return (*self.norms, *(norm for part in parts for norm in part.norms))

    @property
    def size(self) -> LayerSize:
        """Heads, key/value heads and neurons."""
        heads = (self.mixer.heads, self.mixer.kv_heads) if self.mixer else (0, 0)
        return LayerSize(*heads, self.mlp.width if self.mlp else 0)

    @property
    def runs(self) -> Share:
        """How often the layer is computed per token: the MLP decides, which is most of it."""
        part = self.mlp or self.mixer
        return part.runs if part else 1

    @property
    def trains(self) -> bool:
        """Whether anything but the bypass trains."""
        own = any(x.trains or (x.adapter and x.adapter.trainable) for x in self.linears)
        return own or any(n.trains for n in self.all_norms)

    def linear(self, name: str) -> Linear | None:
        """Return a linear by its name."""
        return next((x for x in self.linears if x.name == name), None)

    def map(self, change: Callable[[Linear], Linear]) -> LayerShape:
        """Return the layer with every linear changed."""
        mixer, mlp = self.mixer, self.mlp
        if mixer:
            mixer = replace(mixer, linears=tuple(map(change, mixer.linears)))
        if mlp:
            mlp = replace(mlp, linears=tuple(map(change, mlp.linears)))
        return replace(self, mixer=mixer, mlp=mlp)

    def map_norms(self, change: Callable[[Norm], Norm]) -> LayerShape:
        """Return the layer with every norm changed."""
        mixer, mlp = self.mixer, self.mlp
        if mixer and mixer.norms:
            mixer = replace(mixer, norms=tuple(change(x) for x in mixer.norms))
        if mlp and mlp.norms:
            mlp = replace(mlp, norms=tuple(change(x) for x in mlp.norms))
        first, second = self.norms
        return replace(self, mixer=mixer, mlp=mlp, norms=(change(first), change(second)))

    def still(self) -> LayerShape:
        """Return the layer with nothing in it that trains."""

        def frozen(linear: Linear) -> Linear:
            quiet = _still(linear)
            return replace(quiet, adapter=_still(linear.adapter)) if linear.adapter else quiet

        return replace(self.map(frozen).map_norms(_still), bypass=_still(self.bypass))

    def training(self) -> LayerShape:
        """Return the layer with all of its weights training."""
        moving = self.map(lambda linear: replace(linear, trains=True))
        return moving.map_norms(lambda norm: replace(norm, trains=True))

    def bounded(self, tokens: int) -> LayerShape:
        """Return the layer with a cache that stops growing after so many tokens."""
        if self.mixer is None:
            return self
        cache = replace(self.mixer.cache, window=tokens)
        return replace(self, mixer=replace(self.mixer, cache=cache))

    def keeping(self, tokens: int) -> LayerShape:
        """Return the layer with a cache that keeps so many tokens of a prompt, and later ones."""
        if self.mixer is None:
            return self
        cache = replace(self.mixer.cache, prompt=tokens)
        return replace(self, mixer=replace(self.mixer, cache=cache))

    def undoing(self, tokens: int) -> LayerShape:
        """Return the layer with a cache of which so many tokens can be taken back."""
        if self.mixer is None:
            return self
        cache = replace(self.mixer.cache, undo=tokens)
        return replace(self, mixer=replace(self.mixer, cache=cache))

    def running(self, runs: Share, reads: Share | None = None) -> LayerShape:
        """Return the layer computed `runs` times per token, its weights read `reads` times."""
        mixer = self.mixer and replace(self.mixer, runs=runs, reads=reads)
        return replace(
            self, mixer=mixer, mlp=self.mlp and replace(self.mlp, runs=runs, reads=reads)
        )


Part = TypeVar("Part", "Adapter | None", Linear, Norm)


def _still(part: Part) -> Part:
    """Return a part with nothing that trains: the same one where nothing does."""
    return replace(part, trains=False) if part and part.trains else part


@dataclass(frozen=True)
class Readout:
    """A norm and a head that give logits."""

    norm: Norm
    head: Linear
    tied: bool = False
    """Whether the head shares the embedding's storage."""
    runs: Share = 1
    """How often it is computed per token."""
    reads: Share | None = None
    """How often its weights are read per token; None is `runs`."""
    before: tuple[Linear, ...] = ()
    """Linears that the head reads through, such as BERT's pooler."""
    learns: bool = False
    """Whether it trains in float32 beside adapters, as the head of a classifier does."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its linears in the order they run, the head last."""
        return (*self.before, self.head)

    @property
    def products(self) -> int:
        """Weights that a state is multiplied with."""
        return sum(x.d_in * x.d_out for x in self.linears)

    def map(self, linear: Callable[[Linear], Linear], norm: Callable[[Norm], Norm]) -> Readout:
        """Return it with every linear and the norm changed."""
        before = tuple(linear(x) for x in self.before)
        return replace(self, norm=norm(self.norm), head=linear(self.head), before=before)

    def learning(self) -> Readout:
        """Return it as it is beside adapters."""
        if not self.learns:
            return self
        return self.map(
            lambda x: replace(x, format=FLOAT32, trains=True),
            lambda x: replace(x, format=FLOAT32, trains=True),
        )


@dataclass(frozen=True)
class Objective:
    """What a loss makes of the logits, where it is not plain cross-entropy."""

    logit_bytes: int | None = 12
    """Bytes per counted logit when the backward pass begins: log-softmax and two gradients in
    float32; None is one element of the compute dtype."""
    every: bool = False
    """Whether the head runs on all positions, not only on those that count."""
    fixed: int = 0
    """Bytes whatever the batch is."""
    again: bool = False
    """Whether logits are made anew in the backward pass."""
    held_again: bool = False
    """Whether those of other models that training holds are, too."""
    reads_out: bool = True
    """Whether the head runs at all."""
    exits: int = 0
    """Exits that a step reads out, each made anew in the backward pass; 0 reads the end alone."""
    gradient_constant: float = 0
    """FLOPs of terms on the weights, which do not depend on tokens."""


PLAIN = Objective()
"""Cross-entropy of one pass."""
