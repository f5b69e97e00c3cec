"""Pairs before training: their states under the base, what proxies on them say, new columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from effbench.api.batch import Batch, by_length, collate
from effbench.api.examples import Example
from effbench.api.method_types import Context
from effbench.methods.preference.reward import last_states
from effbench.nn.weighting import linear
from effbench.util.errors import UserError
from effbench.util.lazy import torch

SOURCE = "source"
"""Column that says where a pair comes from."""
BATCH_TOKENS = 2048
"""Tokens of a batch whose states are computed, padding included."""
STEPS, RATE = 200, 4.0
"""Gradient steps of a proxy, and their size."""


def source_of(example: Example) -> str:
    """Return where a pair comes from, by its column; `all` where there is none."""
    return f"source {example.columns[SOURCE]:g}" if SOURCE in example.columns else "all"


def with_column(examples: Sequence[Example], name: str, values: torch.Tensor) -> list[Example]:
    """Return the examples with one more column, values [n]."""
    pairs = zip(examples, values.tolist(), strict=True)
    return [replace(e, columns={**e.columns, name: value}) for e, value in pairs]


def states_of(
    model: torch.nn.Module, examples: Sequence[Example], device: torch.device
) -> torch.Tensor:
    """Return h(preferred) less the mean h of the others, [n, d] float32 on the CPU.

    h is the last token's state after the last norm. Each text goes through the model once.

    Args:
        model: The base.
        examples: With all answers as sequences, the preferred one first.
        device: Of the model.
    """
    found: dict[int, torch.Tensor] = {}
    training = model.training
    model.eval()
    lengths = [e.longest * len(e.sequences) for e in examples]
    with torch.no_grad():
        for group in by_length(lengths, BATCH_TOKENS):
            batch = collate([examples[i] for i in group], pad_token_id=0).to(device)
            states = last_states(model, batch).float().cpu().split(batch.sizes)
            found |= {i: h[0] - h[1:].mean(0) for i, h in zip(group, states, strict=True)}
    model.train(training)
    return torch.stack([found[i] for i in range(len(examples))])


def margins_of(
    states: torch.Tensor, examples: Sequence[Example], folds: int, proxies: int, seed: int
) -> torch.Tensor:
    """Return the margins [n, E] of proxies that did not see a pair, nor another of its prompt.

    Args:
        states: Of the pairs, [n, d], scaled.
        examples: The pairs.
        folds: F.
        proxies: E.
        seed: Deals the folds, and draws each proxy's part.

    Raises:
        UserError: When there are fewer prompts than folds.
    """
    prompts = [tuple(e.ids[: e.prompt_length]) for e in examples]
    if len(set(prompts)) < folds:
        raise UserError(
            f"{len(prompts)} pairs of {len(set(prompts))} prompts cannot be dealt into "
            f"{folds} folds.",
            "Lower method.folds, or give more pairs.",
        )
    draws = torch.Generator().manual_seed(seed)
    dealt = linear.folds_of(prompts, folds, draws)
    return linear.out_of_fold(states, dealt, proxies, STEPS, RATE, draws)


def drawn_like(
    window: Sequence[Batch], examples: Sequence[Example], pad: int, ctx: Context
) -> list[Batch]:
    """Return as many other pairs as a step has, cut into micro-batches as those are.

    Args:
        window: The micro-batches of the step.
        examples: Where others are drawn from, with replacement.
        pad: Token that fills up.
        ctx: Of the run; its generator draws, and is part of checkpoints.
    """
    sizes = [len(batch.sizes) for batch in window]
    rows = torch.randint(len(examples), (sum(sizes),), generator=ctx.generator)
    batches = [collate([examples[i] for i in part], pad) for part in rows.split(sizes)]
    return [replace(b, window_examples=sum(sizes)).to(ctx.device) for b in batches]
