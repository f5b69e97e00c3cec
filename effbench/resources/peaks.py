"""The peak of each kind of phase, by component: what `plan` and the memory evaluator predict.

Tensors are counted from shapes; `workspace` and `allocator` are modelled from measurements. Bytes
are those beyond the process itself: Python, its libraries, the tokenizer and the data.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from effbench.api.cost import Cost
from effbench.api.footprint import (
    SCORE_BYTES,
    Pass,
    Training,
    left_behind,
    logit_bytes,
    transient,
)
from effbench.api.shape import AnyShape, ModelShape
from effbench.api.spec import TrainSpec
from effbench.nn.decode.decoder import Decoder
from effbench.nn.decode.policy import EVERYTHING, CachePolicy
from effbench.nn.decode.scratch import BLOCK

BUCKET_BYTES = 25 * 2**20
"""Most bytes of gradients that several devices sum at once, in a copy (what PyTorch's
DistributedDataParallel takes by default)."""
GRADIENT_BYTES = 4
"""Gradients of trained weights are float32."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "sgd": 0}
"""Bytes of optimiser state per trained weight."""
WORKSPACE = 24 * 2**20
"""Bytes of scratch space and code that a CPU process needs in its first pass; modelled from
measurements (PyTorch 2.13 with oneDNN and MKL)."""
TRAINING_WORKSPACE = 40 * 2**20
"""The same that a CPU process needs for its first backward pass, on top, and keeps: an evaluation
after training still holds it. Measured were 30 to 100 MiB."""
KERNEL_BYTES = 0.6 * 2**20
"""Bytes of code that oneDNN makes, and keeps, for each size of bfloat16 product on a CPU; modelled
from measurements (oneDNN in PyTorch 2.13, AVX512-BF16). Float32 products need none."""
KERNELS = 1024
"""Sizes of which it keeps the code: the capacity of its cache."""
HOLES = 0.2
"""Share by which the C library's allocator needs more than the tensors that a step makes and frees,
because it cannot use freed blocks again whole; modelled from measurements with glibc 2.36, where it
was 0.14 to 0.57 of a training step and more with gradient checkpointing, and 0 to 1 of a prompt."""
MAPPED = 32 * 2**20
"""Bytes of a block from which on glibc maps it by itself and gives it back at once, whatever it has
seen before (DEFAULT_MMAP_THRESHOLD_MAX, mallopt(3))."""

Components = dict[str, float]
"""Bytes by component."""


@dataclass(frozen=True)
class Spread:
    """Bytes of a step on several devices beside what each holds."""

    buckets: int = 0
    """Copies of gradients while they are summed."""
    gathered: int = 0
    """Blocks that are whole while they are computed."""


class Caching(NamedTuple):
    """What a model's layers keep of the tokens read, at one operating point."""

    shape: ModelShape
    """As it is used there."""
    policy: CachePolicy
    ahead: int = 0
    """Most tokens that are there and not read yet, as drafts are."""

    @classmethod
    def of(cls, shape: ModelShape, decoder: Decoder) -> Caching:
        """Return what is kept where a model decodes in a way."""
        return cls(shape, decoder.cache, decoder.driver.ahead)

    def rows(self, one: Pass) -> int:
        """Return the sequences of a pass that go in together: prompts that matter go alone."""
        alone = one.kind == "score" and self.policy.reads_prompts(one.tokens)
        return 1 if alone else one.rows

    def held(self, one: Pass, element: int) -> float:
        """Return the bytes that are kept at the end of a pass; a dense one scores without."""
        if one.kind == "score" and self.policy == EVERYTHING:
            return 0
        caches = [x.mixer.cache for x in self.shape.layers if x.mixer]
        prompt = one.tokens if one.kind == "prefill" else one.prompt
        tokens = one.tokens + (self.ahead if one.kind == "decode" else 0)
        return self.rows(one) * sum(c.bytes(tokens, element, prompt) for c in caches)

    def spare(self, one: Pass, element: int) -> float:
        """Return the bytes by which our engine's buffers are larger than what is kept."""
        if one.kind == "score" or self.policy != EVERYTHING or self.shape.anatomy == "other":
            return 0
        room = BLOCK
        if one.prompt or one.after:  # made at once, in whole blocks
            room = -(one.tokens + one.after) % BLOCK + one.after
        return one.rows * room * self.shape.kv_bytes_per_token(element)

    def looking(self, one: Pass, element: int) -> float:
        """Return the bytes that the hungriest layer needs while its queries look."""
        rows, queries = self.rows(one), 1 if one.kind == "decode" else one.tokens
        mixers = [x.mixer for x in self.shape.layers if x.mixer]
        return max(
            (
                self.policy.scratch(m, rows, one.tokens, queries, element)
                + 2 * rows * queries * (m.heads + m.kv_heads) * m.head_dim * element
                for m in mixers
            ),
            default=0,
        )


@dataclass(frozen=True)
class Peaks:
    """Predicts the peaks of one model on one device."""

    shape: AnyShape
    element: int
    """Bytes of a compute element."""
    cpu: bool = True
    exact: bool = False
    """Whether the allocator gives blocks back at once (`resources.memory.exact_blocks`)."""

    def load(self, weights: int, made_from: int, packed: bool) -> Components:
        """Return the peak of loading.

        Args:
            weights: Bytes of the weights as they are first held.
            made_from: Bytes that are there beside them: files whose weights are cast.
            packed: Whether linears are packed one after the other.
        """
        room = self.expanded if packed else 0
        return {"weights": weights, "files": made_from, "workspace": room}

    def step(
        self,
        settings: TrainSpec,
        cost: Cost,
        saved: Training,
        one: Pass,
        others: int = 0,
        several: bool = False,
        kernels: int = 0,
        spread: Spread = Spread(),
    ) -> Components:
        """Return the higher of a step's two peaks: when its backward pass begins, and its update.

        Args:
            settings: Of the training loop.
            cost: The model's as it trains.
            saved: What the method keeps from the forward pass.
            one: The micro-batch.
            others: Bytes of other models beside it.
            several: Whether a step has several micro-batches, so that gradients are there already.
            kernels: Sizes of products that the process has computed (`kernels`).
            spread: What several devices need beside it; `cost` is then what one of them holds.
        """
        kept = saved.layers * one.size
        if settings.gradient_checkpointing:
            kept = (saved.boundary * self.shape.num_layers + saved.layer) * one.size
        if saved.forwards:
            return self._perturbed(cost, saved, one, others, kernels)
        gradients = cost.trainable * GRADIENT_BYTES
        backward: Components = {
            "activations": kept + saved.fixed + saved.quadratic * one.size * one.tokens,
            "logits": one.counted * self.shape.outputs * saved.loss_bytes,
            "gradients": gradients if several else 0,
            "gathered blocks": spread.gathered,
        }
        update: Components = {"gradients": gradients, "buckets": spread.buckets}
        state = cost.trainable * OPTIMIZER_BYTES[settings.optimizer]
        before = state if settings.max_steps > 1 else 0  # the first update makes it
        pairs = ((backward, before), (update, state))
        highest, held = max(pairs, key=lambda pair: sum(pair[0].values()) + pair[1])
        return {
            "weights": cost.resident_bytes,
            "other models": others,
            "optimiser": held,
            **highest,
            **self._around(_code(kernels), HOLES * sum(highest.values()), trained=True),
        }

    def _perturbed(
        self, cost: Cost, saved: Training, one: Pass, others: int, kernels: int
    ) -> Components:
        """Return the peak of a step without a backward pass: a forward pass, or one perturbation.

        Nothing is kept, there are no gradients, and nothing of an optimiser is there.
        """
        passing: Components = {
            "activations": transient(self.shape, self.element, False) * one.size,
            "logits": one.counted * self.shape.outputs * SCORE_BYTES,
        }
        moving: Components = {"noise": saved.noise * GRADIENT_BYTES}
        highest = max((passing, moving), key=lambda m: sum(m.values()))
        return {
            "weights": cost.resident_bytes,
            "other models": others,
            **highest,
            **self._around(_code(kernels), trained=True),
        }

    def compress(
        self,
        weights: int,
        read: Pass | None = None,
        kernels: int = 0,
        held: int = 0,
        saved: Training | None = None,
    ) -> Components:
        """Return the peak of compressing one linear after the other, from `weights` bytes.

        Args:
            weights: Bytes of what is compressed.
            read: The longest row that is read to calibrate; None where nothing is read. Its widest
                input is squared in float32 on the way.
            kernels: Sizes of products that the process has computed (`kernels`).
            held: Bytes of activations and statistics that the method holds all the while.
            saved: What a pass over the row keeps for the gradients of all linears, each of which is
                squared in float32 and freed; None where there are none.
        """
        reading: float = 0
        if read is not None:
            d, m = self.shape.hidden_size, self.shape.intermediate_size
            reading = read.size * (transient(self.shape, self.element, False) + 8 * max(d, m))
        holes: float = 0
        if read is not None and saved is not None:
            kept = (
                saved.layers * read.size + saved.fixed + saved.quadratic * read.size * read.tokens
            )
            kept += read.size * self.shape.vocab_size * saved.loss_bytes
            reading, holes = kept + self.expanded, HOLES * kept
        highest = max(reading, self.expanded) + held + _code(kernels)
        return {"weights": weights, **self._around(highest, holes, trained=saved is not None)}

    def kernels(self, passes: Collection[Pass], products: int = 1, lengths: int = 0) -> int:
        """Return of how many sizes the products are that bring code with them.

        Args:
            passes: What is computed.
            products: Of each linear: 1 forward, and 1 or 2 backward.
            lengths: Different sizes of passes, where there are more than in `passes`.
        """
        if not self.cpu or self.element != 2:
            return 0
        sizes = len({(i, o) for _, _, i, o in self.shape.linears()})
        rows = max(lengths, len({p.rows if p.kind == "decode" else p.size for p in passes}))
        heads = max(lengths, len({p.counted for p in passes}))
        return products * (sizes * rows + heads)

    def inference(
        self,
        cost: Cost,
        one: Pass,
        every: bool = False,
        trained: bool = False,
        points: int = 1,
        kernels: int = 0,
        expands: bool = True,
        caching: Sequence[Caching] = (),
    ) -> Components:
        """Return the peak of a pass without gradients.

        Args:
            cost: The model's as it is evaluated.
            one: The pass.
            every: Whether the head runs on all positions, not only on those that count.
            trained: Whether the process has trained before.
            points: Operating points that a scored batch goes through side by side.
            kernels: Sizes of products that the process has computed (`kernels`).
            expands: Whether packed linears, where there are some, are expanded to be multiplied.
            caching: What is kept at each point that the pass may be at; the hungriest counts.
                Without any, everything is.
        """
        kept: Sequence[Caching | None] = caching or [None]
        found = [self._at(cost, one, every, trained, points, kernels, expands, own) for own in kept]
        return max(found, key=lambda m: sum(m.values()))

    def _at(
        self,
        cost: Cost,
        one: Pass,
        every: bool,
        trained: bool,
        points: int,
        kernels: int,
        expands: bool,
        caching: Caching | None,
    ) -> Components:
        """Return the peak of a pass at one point; see `inference`."""
        adapted = cost.params > self.shape.params
        packed = cost.resident_bytes < cost.params * self.element
        together = caching.rows(one) if caching else one.rows
        positions = together * (1 if one.kind == "decode" else one.tokens)
        residual = self.element * self.shape.hidden_size * positions
        running: float = transient(self.shape, self.element, adapted) * positions
        if caching and caching.policy != EVERYTHING:
            # Embeddings, what a layer was given, what it adds to, and what it has normed.
            running = max(running, 4 * residual + caching.looking(one, self.element))
        logits = logit_bytes(one, self.shape.outputs, self.element, every)
        if together < one.rows:  # a row's logits, beside those of all
            own = (one.size + together * one.tokens) * self.shape.outputs * self.element
            logits = max(logits, own)
        passing: Components = {"activations": residual, "logits": logits}
        left = 0
        if running > residual + logits:
            passing = {"activations": running}
            left = left_behind(self.shape, self.element, positions, MAPPED)
        held = cost.cached(one.tokens, one.rows) if one.kind in ("prefill", "decode") else 0
        held = caching.held(one, self.element) if caching else held
        others = points - 1 if one.kind == "score" else 0
        kept = self.block if packed and self.cpu and others else 0
        room = self.expanded if packed and expands else 0
        return {
            "weights": cost.resident_bytes,
            "kv cache": held,
            "spare cache": caching.spare(one, self.element) if caching else 0,
            **passing,
            "other points": others * residual + kept,
            **self._around(
                room + _code(kernels), left + HOLES * (left + sum(passing.values())), trained
            ),
        }

    @property
    def expanded(self) -> int:
        """Bytes of the largest linear while it is packed or expanded, in float32 on the way."""
        largest = max((i * o for _, _, i, o in self.shape.linears()), default=0)
        return largest * (self.element + 16)

    @property
    def block(self) -> int:
        """Bytes of the largest block's linears, expanded to be used several times."""
        sizes = (self.shape.linear_sizes(i).values() for i in range(self.shape.num_layers))
        return max(sum(i * o for i, o in linears) for linears in sizes) * self.element

    def _around(self, room: float, holes: float = 0, trained: bool = False) -> Components:
        """Return scratch space, and on a CPU what the process needs beside its tensors."""
        if not self.cpu:
            return {"workspace": room}
        room += WORKSPACE + (TRAINING_WORKSPACE if trained else 0)
        return {"workspace": room, "allocator": 0 if self.exact else holes}


def _code(kernels: int) -> float:
    """Return the bytes of the kernels that are kept."""
    return min(kernels, KERNELS) * KERNEL_BYTES
