"""Pairs before training: their states under the base, what proxies on them say, new columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from effbench.api.batch import Batch, by_length, collate
from effbench.api.examples import Example
from effbench.api.method_types import Context
from effbench.data.kinds.rated import NOT_RATED, column
from effbench.methods.preference.reward import last_states
from effbench.nn.weighting import linear
from effbench.util.errors import UserError
from effbench.util.lazy import torch

SOURCE = "source"
"""Column that says where a pair comes from."""
BATCH_TOKENS = 2048
"""Tokens of a batch whose states are computed, padding included."""
STEPS, RATE = 200, 4.0
"""Gradient steps of a proxy, and their size; a squared error takes a quarter of it."""


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

    Arguments as of `answers_of`; the preferred answer of an example is its first.
    """
    states = answers_of(model, examples, device).split([len(e.sequences) for e in examples])
    return torch.stack([h[0] - h[1:].mean(0) for h in states])


def answers_of(
    model: torch.nn.Module, examples: Sequence[Example], device: torch.device
) -> torch.Tensor:
    """Return h of each answer, [s, d] float32 on the CPU, those of an example side by side.

    h is the last token's state after the last norm. Each text goes through the model once.

    Args:
        model: The base.
        examples: With all answers as sequences.
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
            found |= dict(zip(group, states, strict=True))
    model.train(training)
    return torch.cat([found[i] for i in range(len(examples))])


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
    draws = torch.Generator().manual_seed(seed)
    dealt = _dealt(examples, folds, draws)
    return linear.out_of_fold(states, dealt, proxies, STEPS, RATE, draws)


def agreement_of(
    answers: torch.Tensor,
    examples: Sequence[Example],
    attributes: Sequence[str],
    folds: int,
    proxies: int,
    seed: int,
) -> torch.Tensor:
    """Return how far proxies agree with the ratings of each example, [n, E], as margins of pairs.

    Ratings z and predictions y of an attribute are in units of its deviation, from its mean:

        m_ie = sum_k z_k y_ke / sum_k |z_k|        over the rated entries k of an example's answers

    It is below 0 where a proxy says more than the mean and the rating less. Of a pair rated 4 and 1
    in an attribute of such pairs alone it is half of the margin of its predictions. A prediction's
    distance from the rating says less: proxies stay near the mean, far from any extreme rating.

    Args:
        answers: States, [s, d].
        examples: With ratings on their sequences.
        attributes: What they are rated in.
        folds: F.
        proxies: E.
        seed: Deals the folds, and draws each proxy's part.

    Raises:
        UserError: As `margins_of`.
    """
    draws = torch.Generator().manual_seed(seed)
    rows = torch.tensor([i for i, e in enumerate(examples) for _ in e.sequences])
    dealt = _dealt(examples, folds, draws)[rows]
    states = linear.scaled(answers - answers.mean(0))
    both = torch.zeros(len(examples), proxies)
    size = torch.zeros(len(examples), 1)
    for name in attributes:
        given = torch.tensor([s.columns[column(name)] for e in examples for s in e.sequences])
        known = given != NOT_RATED
        units = given.float() - given[known].mean()
        units = torch.where(known, units / units[known].square().mean().sqrt().clamp(min=1e-6), 0)
        said = linear.out_of_fold(
            states, dealt, proxies, STEPS, RATE / 4, draws, torch.where(known, units, torch.nan)
        )
        both.index_add_(0, rows, units[:, None] * said)
        size.index_add_(0, rows, units[:, None].abs())
    return both / size.clamp(min=1e-6)


def _dealt(examples: Sequence[Example], folds: int, draws: torch.Generator) -> torch.Tensor:
    """Return a fold for each example, [n]; those of one prompt are in one fold."""
    prompts = [tuple(e.ids[: e.prompt_length]) for e in examples]
    if len(set(prompts)) < folds:
        raise UserError(
            f"{len(prompts)} pairs of {len(set(prompts))} prompts cannot be dealt into "
            f"{folds} folds.",
            "Lower method.folds, or give more pairs.",
        )
    return linear.folds_of(prompts, folds, draws)


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
