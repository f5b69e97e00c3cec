"""Expected attention: of a prompt, the cache keeps what queries to come are expected to look at.

Devoto et al., Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
Distribution, 2025, arXiv 2510.00636.

    m, C [d], [d, d]    mean and covariance of a head's queries before their turn, over the prompt
    M = mean of the rotary turns R(P), ..., R(P + f - 1)       of the next f positions
    z_j = (M m) . k_j / sqrt(d) + k_j^T M C M^T k_j / (2 d)
        = log E[exp(q . k_j / sqrt(d))]                        q normal
    s_j = (mean over query heads of the group of softmax(z)_j + e) |v_j|
    kept: the n first entries, and the b - n others with the largest s

Each key/value head of each layer chooses for itself, once, when the prompt has been read, with
attention to all of it; later tokens all stay. Keys keep the positions that they were turned at. The
cache is [B, G, b + new, d]; a prompt of b tokens or fewer loses nothing, bit for bit.

The formula and its defaults (n = 4, whose queries count for nothing; f = 512; e = 0) are those of
NVIDIA's kvpress (read), the authors' own; the turned covariance is not symmetrised there either.
Ours: queries are turned back by the angles that turned them. The paper's budgets that differ
between heads, and its repeated eviction while decoding, are not here. Nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.api.method_types import Paper
from effbench.api.schema import NonNegativeFloat, NonNegativeInt, PositiveInt
from effbench.methods.evicts import EvictsPrompt
from effbench.nn.decode import importance
from effbench.nn.decode.eviction_cache import PromptEviction
from effbench.nn.decode.policy import EVERYTHING, CachePolicy
from effbench.nn.llama import walk
from effbench.util.errors import UserError

if TYPE_CHECKING:
    from effbench.nn.decode.importance import Score


@dataclass(frozen=True)
class ExpectedCache(PromptEviction):
    """Keeps what queries to come are expected to look at."""

    then: CachePolicy = EVERYTHING
    sinks: int = 4
    future: int = 512
    covariance: bool = True
    epsilon: float = 0.0

    def score(self, model: Any) -> Score:
        """Return the expected attention."""
        return partial(
            importance.expected_attention,
            rotary=model.model.rotary_emb,
            sinks=self.sinks,
            future=self.future,
            covariance=self.covariance,
            epsilon=self.epsilon,
        )

    def require(self, model: Any) -> None:
        """Refuse a model whose turns depend on how long the text is.

        Raises:
            UserError: Naming the kind of its rotary positions.
        """
        super().require(model)
        kind = getattr(model.model.rotary_emb, "rope_type", "default")
        if kind not in walk.STATIC_ROPE:
            raise UserError(
                f"Rotary positions of kind {kind!r} depend on the length of the text, so that "
                "those to come are not known.",
                "Choose another method, as method=snapkv.",
            )


@dataclass(frozen=True)
class ExpectedAttention(EvictsPrompt):
    """Changes nothing but what the cache keeps of a prompt."""

    paper: ClassVar[Paper | None] = Paper(
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries "
        "Distribution",
        "",
        "2510.00636",
    )

    sinks: NonNegativeInt = 4
    """First entries, which stay, and whose queries do not count, n."""
    future: PositiveInt = 512
    """Next positions whose turns are averaged, f."""
    covariance: bool = True
    """Whether the spread of queries counts, or their mean alone."""
    epsilon: NonNegativeFloat = 0.0
    """Weight of a value's norm that attention does not enter, e."""

    @property
    def pinned(self) -> int:
        """The first entries."""
        return self.sinks

    def evicting(self, budget: int) -> PromptEviction:
        """Return what evicts down to so many entries."""
        return ExpectedCache(
            budget,
            sinks=self.sinks,
            future=self.future,
            covariance=self.covariance,
            epsilon=self.epsilon,
        )
