"""A decoder in stages, with a key/value cache that is put right after a stage was left out.

The layers up to an exit, and those between one exit and the next, make a stage. A token that leaves
at an exit has no keys and values in the stages above it, which later tokens will attend to. There
are two repairs:

- recompute: its hidden state waits at the stage that it did not enter, and everything that waits
  runs through the stage in one pass as soon as a later token needs it. Exact: the cache becomes
  what full decoding would have built.
- propagate: its hidden state is taken for the input of every skipped layer, and only keys and
  values are computed from it. Approximate, and nothing waits.

Prompts run through the modules of transformers. What follows them is run by our engine's kernel
where that applies (`effbench.nn.decode.verify`), else by the modules too. Under a policy that does
not keep everything, queries attend to what it shows (`effbench.nn.decode.view`): the kernel makes
the products around that where it applies (`effbench.nn.decode.between`), else the modules do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from effbench.nn.decode import prompts
from effbench.nn.decode.between import Between, States
from effbench.nn.decode.policy import EVERYTHING, CachePolicy
from effbench.nn.decode.scratch import BLOCK
from effbench.nn.decode.verify import multi_token_engine
from effbench.nn.decode.view import Stretch, as_mask, attend, looking
from effbench.nn.depth.droppable import causal_mask
from effbench.nn.depth.submodel import norm_and_head
from effbench.nn.llama.stack import (
    decoder_layers,
    require_layers_alike,
    require_plain_layers,
)
from effbench.util.errors import UserError


@dataclass
class Work:
    """What decoding did."""

    passes: int = 0
    """Layers that were called: how often a layer's weights were read."""
    positions: int = 0
    """Positions that went through a layer, summed over layers; of each sequence."""


class StagedDecoder:
    """A decoder whose layers run stage by stage, each as far behind the one before as one likes.

    Args:
        model: A Llama-style causal language model.
        exits: Depths at which the stages end, ascending.
        policy: What the cache keeps.
        undo: Most tokens that `crop` will ever take back.

    Raises:
        UserError: When the model is laid out differently, its layers differ in size, or the policy
            does not apply to it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        exits: Sequence[int],
        policy: CachePolicy = EVERYTHING,
        undo: int = 0,
    ) -> None:
        require = require_plain_layers if len(exits) == 1 else require_layers_alike
        require(model)
        self.root: Any = model
        self.decoder: Any = self.root.model
        self.stages = [range(start, end) for start, end in pairwise((0, *exits))]
        self.policy = policy
        self.engine = multi_token_engine(model) if policy == EVERYTHING else None
        self.cache: Cache = DynamicCache() if self.engine is None else self.engine.cache
        if policy != EVERYTHING:
            policy.require(model)
            self.cache = Cache(layers=list(policy.layers(model, undo)))
        self.between: Between | None = None
        """What makes the products under a policy; None for the modules. Sessions have it."""
        self.angles: tuple[torch.Tensor, torch.Tensor] | None = None
        """Cosine and sine of every place in the cache, where keys are turned at their places."""
        self.done = [0] * len(self.stages)
        """Positions that each stage has taken in."""
        self.waiting: list[torch.Tensor | None] = [None] * len(self.stages)
        """Hidden states [B, W, d] that each stage has still to take in."""
        self.positions = torch.empty(0, dtype=torch.long)
        """Position of every token read, [B, T]."""
        self.real = torch.empty(0, dtype=torch.bool)
        """Whether it is a token and not padding, [B, T]."""
        self.starts = torch.empty(0, dtype=torch.long)
        """Padding on the left of each sequence, [B]."""
        self.prompt = 0
        """Columns of the prompt, padding included."""
        self.work = Work()

    @property
    def length(self) -> int:
        """Tokens read, padding included."""
        return self.positions.shape[-1]

    def read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt: int | None = None,
    ) -> None:
        """Take in tokens [B, W]; a mask [B, W] says which are padding, on the left of a prompt.

        What comes in first is the prompt, or its first `prompt` tokens are.
        """
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.length:
            positions = self.positions[:, -1:] + real.cumsum(1)
            self.positions = torch.cat([self.positions, positions], dim=1)
            self.real = torch.cat([self.real, real.bool()], dim=1)
        else:
            self.positions = (real.cumsum(1) - 1).clamp(min=0)
            self.real = real.bool()
            self.starts = (~self.real).sum(1)
            self.prompt = input_ids.shape[1] if prompt is None else prompt
        self._hand_on(0, self.decoder.embed_tokens(input_ids))

    def run(self, stage: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Run a stage on all that waits for it; return what comes out of it, [B, W, d].

        A mask of whole sequences, in the form of the model's attention, says that some of them end
        early.
        """
        hidden, done = self._taken(stage)
        positions = self.positions[:, done : done + hidden.shape[1]]
        if self.policy != EVERYTHING:
            hidden = self._looking(stage, hidden, positions, mask)
        elif self.engine is not None and done and self.engine.takes(hidden):
            hidden = self.engine.run_blocks(hidden, positions, self.starts, self.stages[stage])
        elif self.engine is not None and not done and self._reads_by_kernel(hidden):
            kernel, blocks = self.engine.kernel, self.stages[stage]
            hidden = prompts.through(self.engine, kernel, hidden, positions, self.starts, blocks)
        else:
            hidden = self._through_modules(stage, hidden, positions, done)
        self.work.passes += len(self.stages[stage])
        self.work.positions += len(self.stages[stage]) * hidden.shape[1]
        self._hand_on(stage + 1, hidden)
        return hidden

    def _reads_by_kernel(self, hidden: torch.Tensor) -> bool:
        """Whether the kernel reads prompts [B, P, d], as it would for a session of single steps."""
        assert self.engine is not None
        return prompts.takes(self.engine, hidden[:, :, 0], bool(self.starts.any()))

    def _through_modules(
        self, stage: int, hidden: torch.Tensor, positions: torch.Tensor, done: int
    ) -> torch.Tensor:
        """Return what a stage makes of hidden states [B, W, d] as forward passes make it."""
        rotary = self.decoder.rotary_emb(hidden, position_ids=positions)
        mask = self._mask(done, hidden)
        return self._through_layers(
            stage, hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary
        )

    def _through_layers(self, stage: int, hidden: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Return what the layers of a stage make of hidden states [B, W, d], the cache at hand."""
        for index in self.stages[stage]:
            hidden = self.decoder.layers[index](
                hidden, past_key_values=self.cache, use_cache=True, **inputs
            )
        return hidden

    def _looking(
        self,
        stage: int,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return what a stage makes of hidden states [B, W, d] that see what the policy shows."""
        rotary = self.decoder.rotary_emb(hidden, position_ids=positions)
        if self.policy.turns_at_places:
            self._make_angles(hidden)
            rotary = torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
        layers: Any = [self.cache.layers[index] for index in self.stages[stage]]
        padded = bool(self.starts.any())
        for layer in layers:
            layer.prompt = self.prompt
            if padded:
                layer.pad(self.starts)
        if self.between is not None and mask is None and self.between.takes(hidden):
            blocks = self.stages[stage]
            return self.between.through(hidden, rotary, blocks, self._attended)
        with looking(self.root) as kind:
            return self._through_layers(
                stage,
                hidden,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=rotary,
                stretch=Stretch(self.cache, kind, self.angles),
            )

    def _attended(self, index: int, hidden: torch.Tensor, states: States) -> torch.Tensor:
        """Return what queries [B, H, W, D] of a block see once its entry has taken what came with
        them, [B, W, H, D]."""
        assert self.between is not None
        module, entry = self.decoder.layers[index].self_attn, cast(Any, self.cache.layers[index])
        query, (keys, values) = states[0], entry.update(*states[1:])
        stretch = Stretch(self.cache, self.root.config._attn_implementation, self.angles)
        context = {"dropout": 0.0, "scaling": self.between.scaling(index)}
        return attend(module, query, keys, values, None, stretch=stretch, **context)[0]

    def _make_angles(self, like: torch.Tensor) -> None:
        """Compute cosine and sine of every place that there is or soon will be, [places, D]."""
        if self.angles is not None and len(self.angles[0]) >= self.policy.most_places(self.length):
            return
        most = self.policy.most_places(self.length + BLOCK)
        places = torch.arange(most, device=like.device)[None]
        cos, sin = self.decoder.rotary_emb(like, position_ids=places)
        self.angles = cos[0], sin[0]

    def propagate(self, stage: int) -> None:
        """Give a stage keys and values of what waits for it as if its layers changed nothing."""
        hidden, done = self._taken(stage)
        positions = self.positions[:, done : done + hidden.shape[1]]
        cos, sin = self.decoder.rotary_emb(hidden, position_ids=positions)
        for index in self.stages[stage]:
            layer = self.decoder.layers[index]
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            if hasattr(attention, "k_norm"):
                raise UserError(
                    f"Keys of {type(self.root).__name__} are normed and cannot be propagated.",
                    "Set method.kv=recompute.",
                )
            shape = (*normed.shape[:-1], -1, attention.head_dim)
            keys = attention.k_proj(normed).view(shape).transpose(1, 2)
            values = attention.v_proj(normed).view(shape).transpose(1, 2)
            _, keys = apply_rotary_pos_emb(keys, keys, cos, sin)
            self.cache.update(keys, values, index)
        self._hand_on(stage + 1, hidden)

    def logits(self, stage: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, W, V] of what came out of a stage."""
        norm, head = norm_and_head(self.root, self.stages[stage].stop)
        if own := self.engine or self.between:
            return own.logits(hidden, norm, head)
        logits: torch.Tensor = head(norm(hidden))
        return logits

    def _taken(self, stage: int) -> tuple[torch.Tensor, int]:
        """Return what waits for a stage, no longer waiting, and how many positions it has done."""
        hidden = self.waiting[stage]
        if hidden is None:
            raise RuntimeError(f"nothing waits for stage {stage}")
        self.waiting[stage] = None
        done = self.done[stage]
        self.done[stage] += hidden.shape[1]
        return hidden, done

    def _hand_on(self, stage: int, hidden: torch.Tensor) -> None:
        if stage < len(self.stages):
            before = self.waiting[stage]
            self.waiting[stage] = hidden if before is None else torch.cat([before, hidden], dim=1)

    def _mask(self, done: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Return which of the positions up to the last new one each new one sees, [B, 1, W, T]."""
        width = hidden.shape[1]
        kind = self.decoder.config._attn_implementation
        real = self.real[:, : done + width]
        if bool(real.all()) and (width == 1 or (done == 0 and kind == "sdpa")):
            return None
        places = torch.arange(done + width, device=real.device)
        own = places[done:, None]
        # A padded position sees itself, for a row of attention with nothing in it is NaN.
        seen = (real[:, None, None] & (places <= own)) | (places == own)
        return as_mask(seen, kind, hidden.dtype)

    def crop(self, length: int) -> None:
        """Forget all tokens after the first `length` ones."""
        layers: Any = self.cache.layers
        for stage, hidden in enumerate(self.waiting):
            ahead = max(0, self.done[stage] - length)
            for index in self.stages[stage] if ahead else ():
                layers[index].crop(-ahead)
            self.done[stage] -= ahead
            if hidden is not None:
                left = length - self.done[stage]
                self.waiting[stage] = hidden[:, :left] if left > 0 else None
        self.positions, self.real = self.positions[:, :length], self.real[:, :length]

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep the sequences `rows`, in this order."""
        self.cache.reorder_cache(rows.long())  # type: ignore[arg-type]
        self.waiting = [None if h is None else h[rows] for h in self.waiting]
        self.positions, self.real = self.positions[rows], self.real[rows]
        self.starts = self.starts[rows]

    def kv_bytes(self, length: int | None = None) -> int:
        """Return the bytes of keys and values of the first `length` tokens, or of all.

        Under a policy that does not keep everything, it is always all that is kept.
        """
        if self.policy != EVERYTHING:
            return sum(layer.kv_bytes() for layer in self.cache.layers)  # type: ignore[union-attr]
        found = 0
        for layer in self.cache.layers:
            cached: Any = layer
            for entries in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if entries is not None:
                    used = entries[..., : cached.get_seq_length(), :][..., :length, :]
                    found += used.numel() * used.element_size()
        return found

    def kv_lengths(self) -> list[int]:
        """Return the cached positions of each layer."""
        return [self.cache.get_seq_length(i) for stage in self.stages for i in stage]


class StagedSession:
    """What sessions over a staged decoder share: prompt, order of rows, and what is counted.

    Args:
        model: A Llama-style causal language model.
        exits: Depths of the exits, ascending.
        policy: What the cache keeps.
        undo: Most tokens that are taken back.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        exits: Sequence[int],
        policy: CachePolicy = EVERYTHING,
        undo: int = 0,
    ) -> None:
        self.staged = StagedDecoder(model, exits, policy, undo)
        self.staged.between = Between.of(model) if policy != EVERYTHING else None
        if self.staged.between is not None and not policy.turns_at_places:
            for entry in self.staged.cache.layers:
                entry.attends = True  # type: ignore[union-attr]
        self.steps = 0
        """Tokens decoded of each sequence."""
        self.prompt = Work()
        """What had been done when the prompt was read."""

    def reserve(self, batch: int, length: int, prompt: int = 0) -> None:
        """Make ready for a batch of `length` positions in all, before any clock runs.

        Weights that the kernel reads under a policy move to huge pages, where the system has them.
        """
        if self.staged.between is not None:
            self.staged.between.reserve()

    @torch.inference_mode()
    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read prompts [B, P]; return the logits after the last position, [B, V]."""
        self.staged.read(input_ids, attention_mask)
        logits = self.after_prompt()
        self.prompt = Work(**vars(self.staged.work))
        return logits

    def after_prompt(self) -> torch.Tensor:
        """Return the logits [B, V] after a prompt that has been taken in."""
        raise NotImplementedError

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep the sequences `rows`, in this order."""
        self.staged.reorder(rows)

    def work_per_step(self) -> dict[str, float]:
        """Return the layers called and the positions that went through a layer, per token."""
        work = self.staged.work
        return {
            "layer_passes": (work.passes - self.prompt.passes) / self.steps,
            "layer_positions": (work.positions - self.prompt.positions) / self.steps,
        }


class WholeSession(StagedSession):
    """Decodes with all layers and whatever the policy keeps; token by token, or stretch by stretch.

    Args:
        model: A Llama-style causal language model.
        policy: What the cache keeps.
    """

    def __init__(self, model: torch.nn.Module, policy: CachePolicy) -> None:
        super().__init__(model, [len(decoder_layers(model))], policy)

    def after_prompt(self) -> torch.Tensor:
        """Return the logits [B, V] after the last position."""
        norm, head = norm_and_head(self.staged.root, self.staged.stages[0].stop)
        hidden = self.staged.run(0)
        if own := self.staged.between:
            return own.logits(hidden[:, -1], norm, head)
        logits: torch.Tensor = head(norm(hidden[:, -1:]))
        return logits[:, -1]

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read one token per sequence, [B, 1]; return logits [B, V]."""
        self.staged.read(input_ids)
        return self.after_prompt()

    def kv_bytes(self) -> int:
        """Return the bytes of all cached keys and values."""
        return self.staged.kv_bytes()


def whole_logits(
    model: torch.nn.Module,
    policy: CachePolicy,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prompt: int | None = None,
) -> torch.Tensor:
    """Return the logits that decoding under a policy gives, in one pass, [B, T, V].

    Args:
        model: A Llama-style causal language model.
        policy: What the cache keeps.
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T], 1 for real tokens; None for all.
        prompt: First tokens that are the prompt; None for all.
    """
    staged = StagedDecoder(model, [len(decoder_layers(model))], policy)
    staged.read(input_ids, prompt=prompt)
    mask = None
    if attention_mask is not None and not attention_mask.all():
        hidden = staged.decoder.embed_tokens(input_ids)
        mask = causal_mask(staged.root.config, hidden, attention_mask, staged.positions)
    return staged.logits(0, staged.run(0, mask))


def row_by_row(
    logits: Callable[[torch.Tensor, int], torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    prompts: torch.Tensor,
) -> torch.Tensor:
    """Return logits of rows whose prompts end at places of their own, [B, T, V].

    Args:
        logits: From tokens [1, T'] and the length of their prompt to logits [1, T', V].
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T]; logits after a row's end are zero.
        prompts: Prompt length of each row, [B], at least 1.
    """
    found = torch.empty(0)
    for row, (end, prompt) in enumerate(
        zip(attention_mask.sum(1).tolist(), prompts.tolist(), strict=True)
    ):
        own = logits(input_ids[row : row + 1, :end], min(prompt, end))[0]
        if not row:
            found = own.new_zeros(*input_ids.shape, own.shape[1])
        found[row, :end] = own
        del own  # before the next row needs as much
    return found
