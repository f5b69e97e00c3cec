"""SnapKV: of a prompt, the cache keeps what its last tokens look at.

Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, NeurIPS 2024, arXiv
2404.14469.

    a [w, P]     weights of the last w queries of a prompt of P tokens over what each sees
    s_j = mean over query heads of the group, and over |i - j| <= k // 2, of sum_w a_wi / w
    kept: the b - w entries before the window with the largest s, and the window itself

Each key/value head of each layer chooses for itself, once, when the prompt has been read, with
attention to all of it; later tokens all stay. Keys keep the positions that they were turned at. The
cache is [B, G, b + new, d]; a prompt of b tokens or fewer loses nothing, bit for bit.

From the paper: what is scored, when, and the pooling. From the authors' code (recalled): a window
of 64 and a kernel of 5, means; the budget counts the window. Ours, as in NVIDIA's kvpress (read):
query heads that share a key head vote by their mean, where the authors' code repeats keys for each
query head, which saves nothing. Nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

from effbench.api.method_types import Paper
from effbench.api.schema import PositiveInt
from effbench.api.shape import AnyShape
from effbench.methods.evicts import EvictsPrompt
from effbench.nn.decode import importance
from effbench.nn.decode.eviction_cache import PromptEviction
from effbench.nn.decode.policy import EVERYTHING, CachePolicy
from effbench.util.errors import UserError

if TYPE_CHECKING:
    from effbench.nn.decode.importance import Score


@dataclass(frozen=True)
class ObservedCache(PromptEviction):
    """Keeps what the last queries of a prompt look at."""

    then: CachePolicy = EVERYTHING
    window: int = 64
    """Last tokens, whose queries look and whose entries stay, w."""
    kernel: int = 5
    """Entries over which weights are averaged, k."""

    def score(self, model: Any) -> Score:
        """Return the weights of the window."""
        return partial(importance.window_attention, window=self.window, kernel=self.kernel)


@dataclass(frozen=True)
class SnapKV(EvictsPrompt):
    """Changes nothing but what the cache keeps of a prompt."""

    paper: ClassVar[Paper | None] = Paper(
        "SnapKV: LLM Knows What You are Looking for Before Generation",
        "NeurIPS 2024",
        "2404.14469",
    )

    window: PositiveInt = 64
    """Last tokens of the prompt that say what stays, and stay, w."""
    kernel: PositiveInt = 5
    """Neighbouring entries over which their attention is averaged, odd; 1 averages nothing."""

    @property
    def pinned(self) -> int:
        """The window."""
        return self.window

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method.

        Raises:
            UserError: For an even kernel, and as `Evicts.resolve` does.
        """
        if self.kernel % 2 == 0:
            raise UserError(
                f"method.kernel={self.kernel} has no middle.",
                f"Set method.kernel={self.kernel + 1}.",
            )
        return super().resolve(shape)

    def evicting(self, budget: int) -> PromptEviction:
        """Return what evicts down to so many entries."""
        return ObservedCache(budget, window=self.window, kernel=self.kernel)
