"""Decoding in which each token leaves a model as early as a rule says.

Which exit a token takes is a rule of the caller's, so that methods differ in the rule alone.
Confidence as the rule: Kavehzadeh et al., Sorted LLaMA, arXiv 2309.08968.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from effbench.nn.decode.policy import EVERYTHING, CachePolicy
from effbench.nn.decode.staged import StagedDecoder, StagedSession
from effbench.nn.depth.submodel import exit_states, readout

Rule = Callable[[int, torch.Tensor], torch.Tensor]
"""From the number of an exit, shallowest first, and its logits [..., V] to who leaves there,
[...] bool. The last exit is not asked."""
PAPER_THRESHOLDS = (0.95, 0.95, 0.9, 0.9, 0.8, 0.8, 0.7)
"""Those of Sorted LLaMA, at depths 12 to 36 of 40."""


def paper_thresholds(count: int) -> tuple[float, ...]:
    """Return thresholds for `count` exits: the paper's seven, spread evenly."""
    return tuple(PAPER_THRESHOLDS[i * len(PAPER_THRESHOLDS) // count] for i in range(count))


def chosen(thresholds: Sequence[float], exits: int) -> Rule:
    """Return the rule of so many exits: `confident` in thresholds, the paper's where none are."""
    return confident(thresholds or paper_thresholds(exits - 1))


def confident(thresholds: Sequence[float]) -> Rule:
    """Return the rule: leave where the most likely token's probability exceeds the threshold.

    Args:
        thresholds: One per exit but the last. 0 always leaves, 1 and more never does.
    """

    def rule(number: int, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().softmax(-1).amax(-1) > thresholds[number]

    return rule


class ExitSession(StagedSession):
    """Decodes each token with the first exit whose rule says so.

    Sequences of a batch leave on their own, and the batch runs on until the last one has left.

    Args:
        model: A Llama-style causal language model.
        exits: Depths of the exits, ascending.
        rule: Who leaves at each but the last.
        propagate: Repair the cache by propagating instead of recomputing.
        policy: What the cache keeps.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        exits: Sequence[int],
        rule: Rule,
        propagate: bool = False,
        policy: CachePolicy = EVERYTHING,
    ) -> None:
        super().__init__(model, exits, policy)
        self.exits = list(exits)
        self.rule = rule
        self.propagating = propagate
        self.depth = 0.0
        """Sum over the decoded tokens of the depth at which they left, a mean over sequences."""

    def after_prompt(self) -> torch.Tensor:
        """Return the logits [B, V] of the exit that each sequence takes."""
        return self._leave()[0]

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read one token per sequence, [B, 1]; return logits [B, V]."""
        self.staged.read(input_ids)
        logits, depths = self._leave()
        self.steps += 1
        self.depth += float(depths.double().mean())
        return logits

    def _leave(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [B, V] and the depth [B] of the exit that each sequence takes."""
        found: list[torch.Tensor] = []

        def at(number: int) -> torch.Tensor:
            found.append(self.staged.logits(number, self.staged.run(number)[:, -1:])[:, -1])
            return found[-1]

        chosen = _first_exit(self.exits, self.rule, at)
        if self.propagating:
            for stage in range(len(found), len(self.exits)):
                self.staged.propagate(stage)
        return chosen

    def kv_bytes(self) -> int:
        """Return the bytes of all cached keys and values; what waits is not among them."""
        return self.staged.kv_bytes()

    def counts(self) -> dict[str, float]:
        """Return what was counted over the decoded tokens, each a mean per token.

        `exit_depth`: layers below the exit that gave the token. `layer_passes`: layers called, each
        of which reads its weights once for the whole batch. `layer_positions`: positions that went
        through a layer; with recomputation late ones are among them.
        """
        if not self.steps:
            return {}
        return {"exit_depth": self.depth / self.steps, **self.work_per_step()}


def _first_exit(
    exits: Sequence[int], rule: Rule, logits_at: Callable[[int], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [..., V] of each place's first exit that the rule takes, and its depth.

    Exits after everybody has left are not computed.
    """
    chosen = depths = inside = torch.empty(0)
    for number, depth in enumerate(exits):
        logits = logits_at(number)
        if number == 0:
            chosen, inside = logits, torch.ones_like(logits[..., 0], dtype=torch.bool)
            depths = inside * depth
        else:
            chosen = torch.where(inside[..., None], logits, chosen)
            depths = torch.where(inside, depth, depths)
        if number == len(exits) - 1:
            break
        inside = inside & ~rule(number, logits)
        if not bool(inside.any()):
            break
    return chosen, depths


def exit_logits(
    model: torch.nn.Module,
    exits: Sequence[int],
    rule: Rule,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    policy: CachePolicy = EVERYTHING,
    prompt: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what decoding with recomputation gives, in one pass: logits [B, T, V], depths [B, T].

    Args:
        model: A Llama-style causal language model.
        exits: Depths of the exits, ascending.
        rule: Who leaves at each but the last.
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T].
        policy: What the cache keeps.
        prompt: First tokens that are the prompt, for a policy that asks; None for all.
    """
    if policy != EVERYTHING:
        staged = StagedDecoder(model, exits, policy)
        staged.read(input_ids, prompt=prompt)
        return _first_exit(exits, rule, lambda number: staged.logits(number, staged.run(number)))
    states = exit_states(model, exits, input_ids, attention_mask)

    def at(number: int) -> torch.Tensor:
        return readout(model, states[exits[number]], exits[number])

    return _first_exit(exits, rule, at)


def stepwise_logits(
    start: Callable[[], Any],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    prompts: torch.Tensor,
) -> torch.Tensor:
    """Return teacher-forced logits [B, T, V] of a session that no single pass can stand for.

    Each sequence is decoded on its own, token by token after its prompt. Zero before the last
    position of the prompt and after the end.

    Args:
        start: Gives a fresh session.
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T].
        prompts: Prompt length of each row, [B], at least 1.
    """
    rows = []
    for ids, real, prompt in zip(input_ids, attention_mask.sum(1), prompts.tolist(), strict=True):
        session, end = start(), int(real)
        first = min(prompt, end)
        steps = [session.prefill(ids[None, :first])]
        steps += [session.step(ids[None, t : t + 1]) for t in range(first, end)]
        found = torch.cat(steps)
        rows.append(torch.nn.functional.pad(found, (0, 0, first - 1, len(ids) - end)))
    return torch.stack(rows)
