"""One pass of a batch through a model at several operating points, block by block.

With H_p the residual stream at point p, block l at point p a function F_l,p:

    for each block l:  for each point p:  H_p <- F_l,p(H_p)

So a packed weight is expanded once for all points, and what a block needs while it runs is in
memory once; the residual streams alone are there as often as there are points. Every product has
the shapes that it has in a pass of its own, so that the numbers are the same to the last bit,
whatever else is computed beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask

from effbench.nn.llama.head import has_plain_head
from effbench.nn.llama.shared_attention import hands_down
from effbench.nn.llama.walk import why_not
from effbench.nn.losses.token import head_nll
from effbench.nn.quant.linears import expanded_once
from effbench.nn.scoring.attention import in_pieces
from effbench.nn.scoring.prefix_tree import Group, Plan, Score, group_inputs, group_scores

At = Callable[[], AbstractContextManager[Any]]
"""Gives a context in which a model works at some point."""


def can_walk(model: Any) -> bool:
    """Whether the blocks of a model can be called one by one, and its head after them."""
    plain = not why_not(model) and has_plain_head(model)
    return plain and not hands_down(model.model)


def states_at(
    model: Any,
    points: Sequence[At],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Return the last hidden states, normed, at each point, [B, T, d] each.

    Args:
        model: One that `can_walk`.
        points: What they change must lie inside the blocks.
        input_ids: [B, T].
        attention_mask: [B, T], or [B, 1, T, T] to be added to the scores.
        position_ids: [B, T]; 0 … T - 1 when None.
    """
    decoder = model.model
    hidden = decoder.embed_tokens(input_ids)
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=position_ids,
    )
    angles = decoder.rotary_emb(hidden, position_ids=position_ids)
    streams = [hidden] * len(points)
    for block in decoder.layers:
        with expanded_once(block):
            for place, at in enumerate(points):
                with at():
                    streams[place] = block(
                        streams[place],
                        attention_mask=mask,
                        position_embeddings=angles,
                        position_ids=position_ids,
                    )
    for place, stream in enumerate(streams):  # one after the other, for a norm has temporaries
        streams[place] = decoder.norm(stream)
    return streams


def nll_at(
    model: Any,
    points: Sequence[At],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
) -> list[torch.Tensor]:
    """Return what `losses.answer_nll` gives at each point, [B, T - 1] each.

    Args:
        model: One that `can_walk`.
        points: What they change must lie inside the blocks.
        input_ids: [B, T].
        attention_mask: [B, T].
        labels: [B, T], not shifted; -100 where a token does not count.
    """
    streams = states_at(model, points, input_ids, attention_mask)
    return [head_nll(model, hidden, labels) for hidden in streams]


def scores_at(
    model: Any, points: Sequence[At], plan: Plan, group: Group, device: torch.device
) -> list[dict[int, Score]]:
    """Return what `scoring.tree_scores` gives for a group without a stem, at each point.

    Args:
        model: One that `can_walk`, and that `scoring.has_trees`.
        points: What they change must lie inside the blocks.
        plan: Of all requests.
        group: Of the plan.
        device: Where the model is.

    Raises:
        UserError: When the model gives numbers that are not finite; it names the layer.
    """
    inputs, asked = group_inputs(plan, group, model.dtype, device)

    def run(some: Sequence[At]) -> list[torch.Tensor]:
        with in_pieces(model, device):
            return states_at(model, some, **inputs)

    return [
        group_scores(model, group, asked, hidden, lambda at=at: run([at])[0])  # type: ignore[misc]
        for at, hidden in zip(points, run(points), strict=True)
    ]
