"""How a model decodes, in words: a cache, a route and a driver.

- The **cache** says what each layer keeps of the tokens read: everything, or what a policy chooses.
- The **route** says which blocks run: all of them, those up to an exit, all but the dropped ones.
- The **driver** says how many tokens go in at once: one, or drafts that are then verified.

They are values without torch, so that what does not go together is refused before a model is
loaded. A new one is a subclass in a file of its own; nothing here knows them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from effbench.api.batch import Batch
from effbench.api.session import Session
from effbench.nn.decode import (
    copied_maps,
    early_exit,
    encoded,
    session,
    sessions,
    speculative,
    staged,
    static,
    temporal,
    temporal_static,
)
from effbench.nn.decode.policy import EVERYTHING, CachePolicy
from effbench.nn.decode.scratch import most_drafts
from effbench.nn.depth import droppable
from effbench.nn.llama import shared_attention, stack, walk
from effbench.nn.model_kinds.base import kind_of
from effbench.util.errors import UserError
from effbench.util.lazy import torch

Engine = Literal["auto", "static", "eager"]
"""`auto`: the fastest one that applies. `static`: our engine. `eager`: whole modules and a growing
cache."""
ANY_ENGINE = frozenset({"auto", "static", "eager", "generate"})
"""What decodes a model's own forward pass; `generate` is the loop of transformers."""
Logits = Callable[[Any, Batch], "torch.Tensor"]
"""From a model and a batch to teacher-forced logits, [B, T, V]."""


@dataclass(frozen=True)
class Route:
    """Which blocks run for which tokens; on its own, all of them for every token."""

    @property
    def engines(self) -> frozenset[str]:
        """What can decode it where everything is kept."""
        return ANY_ENGINE

    def why_not(self, cache: CachePolicy) -> str:
        """Return what keeps it from a cache; empty when nothing does."""
        return ""

    def logits(self, cache: CachePolicy) -> Logits | None:
        """Return what gives the logits that decoding gives, in one go.

        None where a plain forward pass does.
        """
        if cache == EVERYTHING:
            return None

        def run(model: Any, batch: Batch) -> torch.Tensor:

            def alone(ids: torch.Tensor, prompt: int) -> torch.Tensor:
                return staged.whole_logits(model, cache, ids, prompt=prompt)

            if cache.reads_prompts(batch.input_ids.shape[1]):
                return by_prompts(alone, batch)
            return staged.whole_logits(model, cache, batch.input_ids, batch.attention_mask)

        return run

    def session(self, model: Any, cache: CachePolicy, engine: Engine) -> Session:
        """Return a fresh session that reads one token at a time.

        Raises:
            ValueError: When the engine does not apply.
        """

        if cache != EVERYTHING:
            return staged.WholeSession(model, cache)
        if kind_of(model).encoding(model):
            if engine == "static":
                raise ValueError("An encoder-decoder has no static engine.")
            return encoded.EncodedSession(model)
        if engine == "static":
            return static.StaticSession(model)
        return session.CachedSession(model) if engine == "eager" else sessions.session_for(model)


@dataclass(frozen=True)
class CopiedMaps(Route):
    """All blocks; shared attention maps are handed on where our engine does not apply."""

    def why_not(self, cache: CachePolicy) -> str:
        """Return what keeps it from a cache; empty when nothing does."""
        return (
            "" if cache == EVERYTHING else "layers that take a map see all of their source's keys"
        )

    def session(self, model: Any, cache: CachePolicy, engine: Engine) -> Session:
        """Return a fresh session."""

        copies = engine == "auto" and shared_attention.map_of(model) and walk.why_not(model)
        return (
            copied_maps.CopyingSession(model) if copies else super().session(model, cache, engine)
        )


@dataclass(frozen=True)
class Drops(Route):
    """Most tokens skip the droppable layers (`nn.depth.droppable`), as long as any are active."""

    module: str
    """The submodule with the stand-ins and their schedule."""
    window: int
    """Dropped tokens between two refreshes; 0 drops nothing."""

    @property
    def engines(self) -> frozenset[str]:
        """What can decode it."""
        return ANY_ENGINE - {"generate"} if self.window else ANY_ENGINE

    def why_not(self, cache: CachePolicy) -> str:
        """Return what keeps it from a cache; empty when nothing does."""
        return (
            "" if cache == EVERYTHING else "dropped tokens leave gaps that a cache does not know of"
        )

    def logits(self, cache: CachePolicy) -> Logits:
        """Return one parallel pass that gives what decoding after each row's prompt would give."""
        return self._logits

    def _logits(self, model: Any, batch: Batch) -> torch.Tensor:

        stand_ins = getattr(model, self.module)
        if not stand_ins.active:
            return forward_logits(model, batch)
        return droppable.scheduled_logits(
            model, stand_ins, batch.input_ids, batch.attention_mask, batch.labels
        )

    def session(self, model: Any, cache: CachePolicy, engine: Engine) -> Session:
        """Return a fresh session; where nothing is dropped, an ordinary one.

        Raises:
            ValueError: When the engine does not apply.
        """

        stand_ins = getattr(model, self.module)
        if not stand_ins.active:
            return super().session(model, cache, engine)
        if engine == "eager" or (
            engine == "auto" and temporal_static.why_not_static(model, stand_ins)
        ):
            return temporal.TemporalSession(model, stand_ins)
        return temporal_static.StaticTemporalSession(model, stand_ins)


@dataclass(frozen=True)
class Exits(Route):
    """Each token leaves at the first exit whose rule says so.

    The deepest exit is always the model's last layer.
    """

    depths: tuple[int, ...]
    """Depths of the exits, ascending; those that the model does not have do not count."""
    rule: Callable[[int], early_exit.Rule]
    """From the number of exits to who leaves at each but the last."""
    propagate: bool = False
    """Whether the cache is repaired by propagating instead of recomputing."""

    @property
    def engines(self) -> frozenset[str]:
        """What can decode it."""
        return frozenset({"auto"})

    def logits(self, cache: CachePolicy) -> Logits:
        """Return what gives the logits of each position's exit."""

        def run(model: Any, batch: Batch) -> torch.Tensor:

            inputs = batch.input_ids, batch.attention_mask
            if self.propagate:
                prompts = droppable.prompt_lengths(batch.labels)
                return early_exit.stepwise_logits(
                    lambda: self.session(model, cache), *inputs, prompts
                )
            exits = exits_of(model, self.depths)
            rule = self.rule(len(exits))

            def alone(ids: torch.Tensor, prompt: int) -> torch.Tensor:
                all_real = torch.ones_like(ids)
                return early_exit.exit_logits(model, exits, rule, ids, all_real, cache, prompt)[0]

            if cache.reads_prompts(batch.input_ids.shape[1]):
                return by_prompts(alone, batch)
            return early_exit.exit_logits(model, exits, rule, *inputs, cache)[0]

        return run

    def why_not(self, cache: CachePolicy) -> str:
        """Return what keeps it from a cache; empty when nothing does."""
        if self.propagate and cache != EVERYTHING:
            return "keys that are propagated come from no query, so that nothing says what it sees"
        return ""

    def session(self, model: Any, cache: CachePolicy, engine: Engine = "auto") -> Session:
        """Return a fresh session."""

        exits = exits_of(model, self.depths)
        return early_exit.ExitSession(model, exits, self.rule(len(exits)), self.propagate, cache)


@dataclass(frozen=True)
class Driver:
    """Who asks for tokens; on its own, each token goes in by itself."""

    @property
    def ahead(self) -> int:
        """Most tokens that are in the cache and may be taken back."""
        return 0

    def why_not(self, route: Route, cache: CachePolicy) -> str:
        """Return what keeps it from a route and a cache; empty when nothing does."""
        return ""

    def session(self, model: Any, route: Route, cache: CachePolicy, engine: Engine) -> Session:
        """Return a fresh session.

        Raises:
            ValueError: When the engine does not apply.
        """
        return route.session(model, cache, engine)


@dataclass(frozen=True)
class Drafts(Driver):
    """The first layers draft some tokens and all layers verify them in one pass."""

    depth: int
    """Layers that draft."""
    tokens: int = 4
    """Drafted tokens of the first round."""
    adaptive: bool = True
    """Whether their number follows what was kept."""

    @property
    def ahead(self) -> int:
        """Most tokens that are in the cache and may be taken back."""
        return most_drafts(self.tokens)

    def why_not(self, route: Route, cache: CachePolicy) -> str:
        """Return what keeps it from a route and a cache; empty when nothing does."""
        if route != Route():
            return "drafts are verified by all blocks, for every token"
        return "" if cache.takes_back else "a draft that is not kept cannot be taken back"

    def session(self, model: Any, route: Route, cache: CachePolicy, engine: Engine) -> Session:
        """Return a fresh session."""

        pair = self.depth, len(stack.decoder_layers(model))
        return speculative.SpeculativeSession(model, pair, self.tokens, self.adaptive, cache)


@dataclass(frozen=True)
class Decoder:
    """A cache, a route and a driver.

    Raises:
        UserError: When they do not go together.
    """

    route: Route = field(default_factory=Route)
    driver: Driver = field(default_factory=Driver)
    cache: CachePolicy = EVERYTHING

    def __post_init__(self) -> None:
        reason = self.route.why_not(self.cache) or self.driver.why_not(self.route, self.cache)
        if reason:
            names = (type(part).__name__ for part in (self.cache, self.route, self.driver))
            raise UserError(
                f"{', '.join(names)} do not decode together: {reason}.",
                "Choose another way of decoding.",
            )

    @property
    def engines(self) -> frozenset[str]:
        """What can decode it."""
        plain = self.driver == Driver() and self.cache == EVERYTHING
        return self.route.engines if plain else frozenset({"auto"})

    @property
    def logits(self) -> Logits | None:
        """What gives the logits that decoding gives, in one go; None for a plain forward pass."""
        return self.route.logits(self.cache)

    def session(self, model: Any, engine: Engine = "auto") -> Session:
        """Return a fresh session.

        Raises:
            ValueError: When the engine does not apply.
        """
        return self.driver.session(model, self.route, self.cache, engine)


def exits_of(model: Any, depths: Sequence[int]) -> tuple[int, ...]:
    """Return the depths at which a model can be left, ascending, its last layer among them."""

    full = len(stack.decoder_layers(model))
    return (*(depth for depth in depths if depth < full), full)


def by_prompts(logits: Callable[[torch.Tensor, int], torch.Tensor], batch: Batch) -> torch.Tensor:
    """Return logits of a batch whose rows go in alone, each with the length of its prompt."""
    prompts = droppable.prompt_lengths(batch.labels)
    return staged.row_by_row(logits, batch.input_ids, batch.attention_mask, prompts)


def forward_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return the logits of a model's own forward pass, [B, T, V]."""
    inputs = batch.input_ids, batch.attention_mask, batch.labels
    return kind_of(model).logits(model, *inputs)
