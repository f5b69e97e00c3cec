"""Self-speculative decoding: the first layers of a model draft, all of them verify.

Each round drafts K tokens greedily with the layers up to an exit, then runs the layers above it on
all of them in one pass. Drafts that are the full model's own most likely tokens are kept. Draft and
verification share the layers below the exit, and their keys and values.

After Kavehzadeh et al., Sorted LLaMA, arXiv 2309.08968, and Elhoushi et al., LayerSkip, arXiv
2404.16710. The window K changes as transformers' assisted generation has it: two more after a round
whose drafts were all kept, one less after any other. Our choice: at most 16.
"""

from __future__ import annotations

from collections import deque

import torch

from effbench.nn.decode.native import most_likely
from effbench.nn.decode.policy import EVERYTHING, CachePolicy
from effbench.nn.decode.scratch import MOST_DRAFTS, most_drafts
from effbench.nn.decode.staged import StagedSession


class SpeculativeSession(StagedSession):
    """Gives the full model's logits after every token, computed several tokens at a time.

    `step` can be given any token. When it is the next drafted one, its logits are there already;
    when it is not, what was computed ahead is forgotten. So nothing is lost, however tokens are
    chosen, and greedy decoding gains.

    Args:
        model: A Llama-style causal language model.
        exits: Depth of the draft and depth of the full model.
        window: Drafted tokens of the first round, K.
        adaptive: Whether K follows what was kept.
        policy: What the cache keeps; it has to take tokens back.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        exits: tuple[int, int],
        window: int = 4,
        adaptive: bool = True,
        policy: CachePolicy = EVERYTHING,
    ) -> None:
        super().__init__(model, exits, policy, most_drafts(window))
        self.window = window
        self.adaptive = adaptive
        self.length = 0
        """Tokens read by the caller, padding included; the cache may be ahead of it."""
        self.ahead: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        """Kept drafts [B, 1] with the full model's logits after each, [B, V]."""
        self.rounds = 0
        self.drafted = 0
        self.kept = 0

    def after_prompt(self) -> torch.Tensor:
        """Return the full model's logits, [B, V]."""
        self.staged.run(0)
        self.length = self.staged.length
        return self.staged.logits(1, self.staged.run(1)[:, -1:])[:, -1]

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read one token per sequence, [B, 1]; return the full model's logits [B, V]."""
        self.steps += 1
        if self.ahead and not self.ahead[0][0].equal(input_ids):
            self.ahead.clear()
            self.staged.crop(self.length)
        self.length += 1
        if self.ahead:
            return self.ahead.popleft()[1]
        return self._round(input_ids)

    def _round(self, token: torch.Tensor) -> torch.Tensor:
        """Draft after `token` [B, 1] and verify; return the logits after `token`, [B, V]."""
        drafts: list[torch.Tensor] = []
        for _ in range(self.window):
            drafts.append(self._draft(drafts[-1] if drafts else token))
        self.staged.read(drafts[-1])
        self.staged.run(0)
        logits = self.staged.logits(1, self.staged.run(1))
        agreed = (most_likely(logits[:, :-1]) == torch.cat(drafts, dim=1)).all(0)
        kept = int(agreed.long().cumprod(0).sum())
        self.staged.crop(self.length + kept)
        self.ahead.extend((drafts[i], logits[:, i + 1]) for i in range(kept))
        self._adapt(kept)
        return logits[:, 0]

    def _draft(self, token: torch.Tensor) -> torch.Tensor:
        self.staged.read(token)
        return most_likely(self.staged.logits(0, self.staged.run(0)))

    def _adapt(self, kept: int) -> None:
        self.rounds += 1
        self.drafted += self.window
        self.kept += kept
        if self.adaptive:
            longer = kept == self.window
            self.window = min(MOST_DRAFTS, self.window + 2) if longer else max(1, self.window - 1)

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep the sequences `rows`, in this order."""
        super().reorder(rows)
        self.ahead = deque((token[rows], logits[rows]) for token, logits in self.ahead)

    def kv_bytes(self) -> int:
        """Return the bytes of the keys and values of the tokens read."""
        return self.staged.kv_bytes(self.length)

    def counts(self) -> dict[str, float]:
        """Return what was counted while decoding.

        `acceptance_length`: tokens that a round gives, the verified one included.
        `acceptance_rate`: kept drafts of all drafts. `layer_passes`, `layer_positions`: layers
        called and positions that went through a layer, per token.
        """
        if not self.rounds:
            return {}
        return {
            "acceptance_length": 1 + self.kept / self.rounds,
            "acceptance_rate": self.kept / self.drafted,
            **self.work_per_step(),
        }
