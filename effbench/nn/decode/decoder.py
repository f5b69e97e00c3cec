"""How a model decodes, in words: which blocks run for which token, and who asks for tokens.

- The **route** says which blocks run: all of them, those up to an exit, all but the dropped ones.
- The **driver** says how many tokens go in at once: one, or drafts that are then verified.

They are values without torch, so that what does not go together is refused before a model is
loaded. A new route or driver is a subclass with its own session; nothing here knows them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.batch import Batch
    from effbench.api.session import Session
    from effbench.nn.decode.early_exit import Rule

Engine = Literal["auto", "static", "eager"]
"""`auto`: the fastest one that applies. `static`: our engine. `eager`: whole modules and a growing
cache."""
ANY_ENGINE = frozenset({"auto", "static", "eager", "generate"})
"""What decodes a model's own forward pass; `generate` is the loop of transformers."""
Logits = Callable[[Any, "Batch"], "torch.Tensor"]
"""From a model and a batch to teacher-forced logits, [B, T, V]."""


@dataclass(frozen=True)
class Route:
    """Which blocks run for which tokens; on its own, all of them for every token."""

    @property
    def engines(self) -> frozenset[str]:
        """What can decode it."""
        return ANY_ENGINE

    @property
    def logits(self) -> Logits | None:
        """What gives the logits that decoding gives, in one go; None for a plain forward pass."""
        return None

    def session(self, model: Any, engine: Engine) -> Session:
        """Return a fresh session that reads one token at a time.

        Raises:
            ValueError: When the engine does not apply.
        """
        from effbench.nn.decode.session import CachedSession
        from effbench.nn.decode.static import StaticSession, session_for

        if engine == "static":
            return StaticSession(model)
        return CachedSession(model) if engine == "eager" else session_for(model)


@dataclass(frozen=True)
class CopiedMaps(Route):
    """All blocks; shared attention maps are handed on where our engine does not apply."""

    def session(self, model: Any, engine: Engine) -> Session:
        """Return a fresh session."""
        from effbench.nn.decode.copied_maps import CopyingSession
        from effbench.nn.llama.shared_attention import map_of
        from effbench.nn.llama.walk import why_not

        copies = engine == "auto" and map_of(model) and why_not(model)
        return CopyingSession(model) if copies else super().session(model, engine)


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

    @property
    def logits(self) -> Logits:
        """One parallel pass that gives what decoding after each row's prompt would give."""
        return self._logits

    def _logits(self, model: Any, batch: Batch) -> torch.Tensor:
        from effbench.nn.depth.droppable import scheduled_logits

        droppable = getattr(model, self.module)
        if not droppable.active:
            return forward_logits(model, batch)
        return scheduled_logits(
            model, droppable, batch.input_ids, batch.attention_mask, batch.labels
        )

    def session(self, model: Any, engine: Engine) -> Session:
        """Return a fresh session; where nothing is dropped, an ordinary one.

        Raises:
            ValueError: When the engine does not apply.
        """
        from effbench.nn.decode.droppable import TemporalSession
        from effbench.nn.decode.droppable_static import StaticTemporalSession, why_not_static

        droppable = getattr(model, self.module)
        if not droppable.active:
            return super().session(model, engine)
        if engine == "eager" or (engine == "auto" and why_not_static(model, droppable)):
            return TemporalSession(model, droppable)
        return StaticTemporalSession(model, droppable)


@dataclass(frozen=True)
class Exits(Route):
    """Each token leaves at the first exit whose rule says so.

    The deepest exit is always the model's last layer.
    """

    depths: tuple[int, ...]
    """Depths of the exits, ascending; those that the model does not have do not count."""
    rule: Callable[[int], Rule]
    """From the number of exits to who leaves at each but the last."""
    propagate: bool = False
    """Whether the cache is repaired by propagating instead of recomputing."""

    @property
    def engines(self) -> frozenset[str]:
        """What can decode it."""
        return frozenset({"auto"})

    @property
    def logits(self) -> Logits:
        """The logits of each position's exit."""
        return self._logits

    def _logits(self, model: Any, batch: Batch) -> torch.Tensor:
        from effbench.nn.decode.early_exit import exit_logits, stepwise_logits
        from effbench.nn.depth.droppable import prompt_lengths

        inputs = batch.input_ids, batch.attention_mask
        if self.propagate:
            prompts = prompt_lengths(batch.labels)
            return stepwise_logits(lambda: self.session(model), *inputs, prompts)
        exits = exits_of(model, self.depths)
        return exit_logits(model, exits, self.rule(len(exits)), *inputs)[0]

    def session(self, model: Any, engine: Engine = "auto") -> Session:
        """Return a fresh session."""
        from effbench.nn.decode.early_exit import ExitSession

        exits = exits_of(model, self.depths)
        return ExitSession(model, exits, self.rule(len(exits)), self.propagate)


@dataclass(frozen=True)
class Driver:
    """Who asks for tokens; on its own, each token goes in by itself."""

    def why_not(self, route: Route) -> str:
        """Return what keeps it from driving a route; empty when nothing does."""
        return ""

    def session(self, model: Any, route: Route, engine: Engine) -> Session:
        """Return a fresh session.

        Raises:
            ValueError: When the engine does not apply.
        """
        return route.session(model, engine)


@dataclass(frozen=True)
class Drafts(Driver):
    """The first layers draft some tokens and all layers verify them in one pass."""

    depth: int
    """Layers that draft."""
    tokens: int = 4
    """Drafted tokens of the first round."""
    adaptive: bool = True
    """Whether their number follows what was kept."""

    def why_not(self, route: Route) -> str:
        """Return what keeps it from driving a route; empty when nothing does."""
        return "" if route == Route() else "drafts are verified by all blocks, for every token"

    def session(self, model: Any, route: Route, engine: Engine) -> Session:
        """Return a fresh session."""
        from effbench.nn.decode.speculative import SpeculativeSession
        from effbench.nn.llama.layers import decoder_layers

        pair = self.depth, len(decoder_layers(model))
        return SpeculativeSession(model, pair, self.tokens, self.adaptive)


@dataclass(frozen=True)
class Decoder:
    """A route and a driver.

    Raises:
        ValueError: When they do not go together.
    """

    route: Route = field(default_factory=Route)
    driver: Driver = field(default_factory=Driver)

    def __post_init__(self) -> None:
        if reason := self.driver.why_not(self.route):
            raise ValueError(f"this cannot be decoded: {reason}")

    @property
    def engines(self) -> frozenset[str]:
        """What can decode it."""
        return self.route.engines if self.driver == Driver() else frozenset({"auto"})

    @property
    def plain(self) -> bool:
        """Whether anything that decodes the model's own forward pass decodes it."""
        return self.engines == ANY_ENGINE

    @property
    def logits(self) -> Logits | None:
        """What gives the logits that decoding gives, in one go; None for a plain forward pass."""
        return self.route.logits

    def session(self, model: Any, engine: Engine = "auto") -> Session:
        """Return a fresh session.

        Raises:
            ValueError: When the engine does not apply.
        """
        return self.driver.session(model, self.route, engine)


def exits_of(model: Any, depths: Sequence[int]) -> tuple[int, ...]:
    """Return the depths at which a model can be left, ascending, its last layer among them."""
    from effbench.nn.llama.layers import decoder_layers

    full = len(decoder_layers(model))
    return (*(depth for depth in depths if depth < full), full)


def forward_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return the logits of a model's own forward pass, [B, T, V]."""
    logits: torch.Tensor = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    return logits
