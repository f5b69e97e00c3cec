"""TOVA: at each token, the cache drops what that token looks at least.

Oren et al., Transformers are Multi-State RNNs, EMNLP 2024, arXiv 2401.06104.

    a_t [H, S]    weights of token t over what the cache holds and itself
    s_j = mean over all heads of a_tj;     the entry with the smallest s leaves, in all heads

So a layer is a recurrent state of b entries, [B, G, b, d], that forgets one token for each that
comes in, and no token is kept for its place: neither the first ones nor the last. Keys keep the
positions that they were turned at. While b tokens are there nothing is dropped, and no bit changes.

From the paper: one choice a layer, by all heads, of each token, itself among what may leave. Ours,
as in NVIDIA's kvpress (read) and the authors' code (recalled): a prompt is read with attention to
all of it, and its last query says which b entries stay, where the paper's formula drops token by
token from the first on. Later tokens do so one by one. Nothing is trained. A token that is dropped
has been forgotten, so that nothing can be taken back: drafts are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.api.method_types import Paper
from effbench.methods.evicts import EvictsSteadily
from effbench.nn.decode import importance
from effbench.nn.decode.eviction_cache import SteadyEviction
from effbench.nn.decode.policy import CachePolicy

if TYPE_CHECKING:
    from effbench.nn.decode.importance import Score


@dataclass(frozen=True)
class MultiState(SteadyEviction):
    """Drops what the last query looks at least."""

    def score(self, model: Any) -> Score:
        """Return the weights of the last query."""
        return importance.last_attention


@dataclass(frozen=True)
class TOVA(EvictsSteadily):
    """Changes nothing but what the cache keeps."""

    paper: ClassVar[Paper | None] = Paper(
        "Transformers are Multi-State RNNs", "EMNLP 2024", "2401.06104"
    )

    def policy(self, budget: int) -> CachePolicy:
        """Return what the cache keeps with so many entries."""
        return MultiState(budget)
