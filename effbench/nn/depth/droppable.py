"""Layers that run on some tokens only, and a low-rank stand-in for the others.

A token either refreshes a droppable layer (the layer runs as ever and its output is kept as the
anchor) or drops it (the layer's output is the anchor plus a low-rank map of its input). Two forms
of the same computation are here: one parallel pass over whole sequences, for training and
teacher-forced evaluation; and sessions that decode token by token, which are in
`nn.decode.temporal`. They give the same logits.

A session in our engine is in `effbench.nn.decode.temporal_static`.

They walk through the blocks themselves, so the model must be laid out as Llama is: embedding,
blocks, norm and head, with nothing between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers.masking_utils import create_causal_mask

from effbench.api.batch import Batch
from effbench.nn.llama.head import IGNORED
from effbench.nn.llama.stack import require_plain_layers

Start = Literal["refresh", "previous", "input", "residual"]
"""What a dropped token starts from: the layer's output at the last refresh or at the previous
token, the layer's input, or that and what the layer added at the last refresh."""

Baseline = Literal["reuse", "identity"]
"""What a dropped token has without a map: the anchor, or the layer's input."""
Policy = tuple[Start, bool]
"""What a dropped token starts from, and whether the map of its input is added."""
MOST_PLACES = 8
"""Longest place in a cycle that has a loss of its own."""


class LowRankMap(torch.nn.Module):
    """h -> (alpha / r) B A h; zero when it is new."""

    def __init__(self, width: int, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        self.A = torch.nn.Parameter(torch.empty(rank, width))
        self.B = torch.nn.Parameter(torch.zeros(width, rank))
        torch.nn.init.kaiming_uniform_(self.A, a=5**0.5, generator=generator)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map [B, T, d] to [B, T, d], in the dtype of A and B."""
        return self.scale * F.linear(F.linear(hidden.to(self.A.dtype), self.A), self.B)


class DroppableLayers(torch.nn.Module):
    """What stands in for each droppable layer, and the policy that says when.

    Args:
        width: Width d of the residual stream.
        layers: The droppable layers, without layer 0.
        rank: Rank r of each stand-in.
        scale: alpha / r.
        window: Dropped tokens between two refreshes, k; 0 drops nothing.
        fill: Whether dropped tokens enter the key/value cache of a droppable layer all the same.
        start: What a dropped token starts from.
        seed: Seed of the stand-ins; layer i starts alike whatever the other layers are.
    """

    def __init__(
        self,
        width: int,
        layers: Sequence[int],
        rank: int,
        scale: float,
        window: int,
        fill: bool = False,
        start: Start = "refresh",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.window = window
        self.fill = fill
        self.start: Start = start
        self.mapped = True
        """Whether the maps apply; without them a dropped token stays where it starts."""
        self.layers = torch.nn.ModuleDict()
        for index in sorted(layers):
            generator = torch.Generator().manual_seed((seed * 10_007 + index) % 2**63)
            self.layers[str(index)] = LowRankMap(width, rank, scale, generator)

    @property
    def indices(self) -> list[int]:
        """The droppable layers, in the order they run."""
        return [int(i) for i in self.layers]

    @property
    def active(self) -> bool:
        """Whether any token drops any layer."""
        return self.window > 0 and len(self.layers) > 0

    def drops(self, index: int) -> bool:
        """Return whether layer `index` is droppable."""
        return str(index) in self.layers

    @property
    def policy(self) -> Policy:
        """What dropped tokens get now."""
        return self.start, self.mapped

    @contextmanager
    def using(self, window: int, baseline: Baseline | None = None) -> Iterator[None]:
        """Work with a window inside the context, and without maps where a baseline is given."""
        before = self.window, self.start, self.mapped
        self.window = window
        if baseline:
            self.start, self.mapped = "refresh" if baseline == "reuse" else "input", False
        try:
            yield
        finally:
            self.window, self.start, self.mapped = before

    def replaced(
        self, index: int, hidden: torch.Tensor, anchor: torch.Tensor, policy: Policy
    ) -> torch.Tensor:
        """Return what a droppable layer gives for dropped tokens, [B, T, d].

        Args:
            index: Of the layer.
            hidden: What it would read, [B, T, d].
            anchor: Its anchor, [B, T or 1, d]; see `anchors_of`.
            policy: What they get.
        """
        start, mapped = policy
        before = hidden if start == "input" else anchor
        if start == "residual":
            before = hidden + anchor
        if not mapped:
            return before.expand_as(hidden)
        return (before + self.layers[str(index)](hidden)).to(hidden.dtype)


def anchors_of(before: torch.Tensor, after: torch.Tensor, start: Start) -> torch.Tensor:
    """Return what a layer that ran leaves for tokens that drop it, [B, T, d].

    Args:
        before: What it read, [B, T, d].
        after: What it gave, [B, T, d].
        start: What such tokens start from.
    """
    return after - before if start == "residual" else after


def attach(model: torch.nn.Module, name: str, droppable: DroppableLayers) -> None:
    """Register `droppable` as the submodule `name` of a Llama-style model.

    Raises:
        UserError: When the model is laid out differently or some layer sees a sliding window.
    """
    require_plain_layers(model)
    model.add_module(name, droppable)


def causal_mask(
    config: Any, hidden: torch.Tensor, real: torch.Tensor, positions: torch.Tensor
) -> Any:
    """Return the mask of whole sequences in the form that the model's attention takes.

    Args:
        config: The model's configuration.
        hidden: [B, T, d].
        real: [B, T] int64, 1 where a position may be seen.
        positions: [B, T] or [1, T] int64.
    """
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=real,
        past_key_values=None,
        position_ids=positions,
    )


# -- parallel pass -----------------------------------------------------------------------------


def prompt_lengths(labels: torch.Tensor) -> torch.Tensor:
    """Return how many leading positions of each row carry no label, at least 1, [B].

    Args:
        labels: [B, T], -100 where a token does not count.
    """
    return (labels == IGNORED).long().cumprod(1).sum(1).clamp(min=1)


def schedule(prompts: torch.Tensor, phases: torch.Tensor, length: int, window: int) -> torch.Tensor:
    """Return which positions refresh the droppable layers, [B, T] bool.

    Args:
        prompts: Prompt length of each row, [B] int64, at least 1; the whole prompt refreshes.
        phases: Place in the cycle of k + 1 at which each row leaves its prompt, [B] int64;
            0 when decoding.
        length: T.
        window: k.
    """
    decoded = torch.arange(length, device=prompts.device) - prompts[:, None]
    return (decoded < 0) | ((decoded + phases[:, None]) % (window + 1) == window)


def draw_starts(
    batch: Batch, window: int, generator: torch.Generator, prefix: float, random_phase: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a random prompt length and phase for each sequence, [B] and [B] int64.

    Two numbers are drawn per sequence, in order, so that the split of a window into micro-batches
    does not matter.

    Args:
        batch: The sequences; a prompt holds at least their unlabelled start.
        window: k.
        generator: CPU generator.
        prefix: Largest share of the rest of a sequence that counts as prompt too.
        random_phase: Whether the phase is drawn; 0 otherwise.
    """
    draws = batch.drawn(lambda n: torch.rand(n, 2, generator=generator, dtype=torch.float64))
    draws = draws.to(batch.labels.device)
    shortest = prompt_lengths(batch.labels)
    rest = (batch.attention_mask.sum(1) - shortest).clamp(min=0)
    extra = (draws[:, 0] * ((prefix * rest).floor() + 1)).long()
    phases = (draws[:, 1] * (window + 1)).long() * int(random_phase)
    return shortest + extra, phases


def cycle_places(labels: torch.Tensor, window: int) -> torch.Tensor:
    """Return the place in the cycle at which each token was predicted, [B, T - 1] int64.

    0 follows a refresh or the prompt; the first column is the second token.

    Args:
        labels: [B, T], -100 where a token does not count.
        window: k.
    """
    prompts = prompt_lengths(labels)
    decoded = torch.arange(labels.shape[1] - 1, device=prompts.device) - prompts[:, None] + 1
    return decoded.clamp(min=0) % (window + 1)


def cycle_parts(labels: torch.Tensor, window: int) -> dict[str, torch.Tensor]:
    """Return which tokens were predicted in each place of the cycle, [B, T - 1] bool each.

    They are named `j0`, `j1` and so on up to `j8`; see `cycle_places`.
    """
    place = cycle_places(labels, window)
    return {f"j{j}": place == j for j in range(min(window, MOST_PLACES) + 1)}


def masked_logits(
    model: torch.nn.Module,
    droppable: DroppableLayers,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    refreshed: torch.Tensor,
    see_dropped: bool = False,
) -> torch.Tensor:
    """Return the logits of stepwise decoding in one pass, [B, T, V].

    A droppable layer runs on all positions; where it was dropped its output is replaced, and as a
    key and value it is hidden from the others, since stepwise decoding never wrote it.

    Args:
        model: A Llama-style causal language model.
        droppable: Its stand-ins and their policy.
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T] int64, 1 for real tokens.
        refreshed: [B, T] bool, true at the first position of every row; see `schedule`.
        see_dropped: Leave dropped positions visible in droppable layers all the same.
    """
    root: Any = model
    decoder = root.model
    hidden = decoder.embed_tokens(input_ids)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    positions = places[None]
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    ordinary = gapped = causal_mask(decoder.config, hidden, attention_mask, positions)
    if not (droppable.fill or see_dropped):
        written = attention_mask * refreshed
        gapped = causal_mask(decoder.config, hidden, written, positions)
    anchor = torch.where(refreshed, places, 0).cummax(1).values[..., None].expand_as(hidden)
    for index, layer in enumerate(decoder.layers):
        output = layer(
            hidden,
            attention_mask=gapped if droppable.drops(index) else ordinary,
            position_ids=positions,
            position_embeddings=rotary,
        )
        if droppable.drops(index):
            start = anchors_of(hidden, output, droppable.start).gather(1, anchor)
            if droppable.start == "previous" and droppable.mapped:
                replaced = _summed(droppable.layers[str(index)](hidden), start, anchor, refreshed)
            else:
                replaced = droppable.replaced(index, hidden, start, droppable.policy)
            output = torch.where(refreshed[..., None], output, replaced)
        hidden = output
    logits: torch.Tensor = root.lm_head(decoder.norm(hidden))
    return logits


def scheduled_logits(
    model: torch.nn.Module,
    droppable: DroppableLayers,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Return the logits that decoding after each row's prompt would give, [B, T, V].

    Args:
        model: A Llama-style causal language model.
        droppable: Its stand-ins, their schedule and their policy.
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T].
        labels: [B, T]; the prompt is the unlabelled start of a row, at least its first token.
    """
    prompts = prompt_lengths(labels)
    phases = torch.zeros_like(prompts)
    refreshed = schedule(prompts, phases, input_ids.shape[1], droppable.window)
    return masked_logits(model, droppable, input_ids, attention_mask, refreshed)


def _summed(
    change: torch.Tensor, start: torch.Tensor, anchor: torch.Tensor, refreshed: torch.Tensor
) -> torch.Tensor:
    """Return the start and all changes since the refresh, one on top of the other, [B, T, d]."""
    change = change.masked_fill(refreshed[..., None], 0).cumsum(1)
    return (start + change - change.gather(1, anchor)).to(start.dtype)
