"""The training recipe of LayerSkip: layers that are left out at random, and weighted exits.

Elhoushi et al., LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, ACL 2024,
arXiv 2404.16710. With layers l = 0 ... L - 1 and an exit after each:

    dropout   p(l) = p_max (exp(l ln 2 / (L - 1)) - 1)         0 at the bottom, p_max at the top
    weights   e(l) = s (0 + 1 + ... + l)                       below the last layer
              e(L - 1) = L - 1 + s (0 + 1 + ... + L - 2)
    loss      sum_l C(t, l) e(l) CE_l / sum_l C(t, l) e(l)

C is the rotation: it turns the last exit on, and of the others one in R, which moves on with every
step t. p_max and s are those that we recall for fine-tuning; a pretrained model has no curriculum
of the dropout. Our choices: exits stand at the trained depths alone, and R is such that each step
has one of them beside the last; a layer is left out for a whole micro-batch, where the paper leaves
it out for each of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from effbench.nn.depth import submodel
from effbench.nn.llama import stack
from effbench.util.lazy import torch

MOST_DROPPED = 0.1
"""p_max: how often the last layer is left out."""
EXIT_SCALE = 1.0
"""s: how much the exits below the last one count."""


def drop_rates(num_layers: int) -> list[float]:
    """Return how often each layer is left out, from the bottom up."""
    top = max(1, num_layers - 1)
    return [MOST_DROPPED * (math.exp(i * math.log(2) / top) - 1) for i in range(num_layers)]


def exit_weights(depths: Sequence[int], num_layers: int, step: int) -> dict[int, float]:
    """Return the weight of each exit that a step has, by depth; they sum to 1.

    Args:
        depths: Depths with an exit, ascending; the deepest one always takes part.
        num_layers: L.
        step: t, from 0.
    """
    *others, last = depths
    chosen = [others[step % len(others)], last] if others else [last]
    raw = {n: EXIT_SCALE * n * (n - 1) / 2 for n in chosen}
    if last == num_layers:
        raw[last] = num_layers - 1 + EXIT_SCALE * (num_layers - 1) * (num_layers - 2) / 2
    total = sum(raw.values())
    return {n: e / total if total else 1 / len(raw) for n, e in raw.items()}


def summed_nll(
    model: torch.nn.Module,
    weights: Mapping[int, float],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    generator: torch.Generator,
    of_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weighted sum of the exits' losses in nats, some layers left out; a scalar.

    Args:
        model: A Llama-style causal language model.
        weights: Of each exit, by depth.
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T].
        labels: [B, T], not shifted; -100 where a token does not count.
        generator: Draws the layers that are left out.
        of_tokens: Weight of each token that counts, [N]; None is 1.
    """
    rates = drop_rates(len(stack.decoder_layers(model)))
    chances = torch.rand(len(rates), generator=generator).tolist()
    kept = [i for i, rate in enumerate(rates) if chances[i] >= rate]
    places = {n: sum(i < n for i in kept) for n in weights}
    with stack.at_layers(model, kept):
        states = submodel.exit_states(model, places.values(), input_ids, attention_mask)
    total = torch.zeros((), device=labels.device)
    for n, weight in weights.items():
        nll = submodel.exit_nll(model, states[places[n]], labels, n, of_tokens)
        total = total + weight * nll
    return total
