"""Linear updates that are products of three factors or more, and the subspace they can be kept in.

Source: Yaras et al., Compressible Dynamics in Deep Overparameterized Low-Rank Learning &
Adaptation, ICML 2024, arXiv 2406.04112.

    y = W x + W_L ... W_2 W_1 x        W_1 [k, d_in], W_2 ... [k, k], W_L [d_out, k]

All factors start as eps times a matrix with orthonormal rows or columns. In the compressed form
W_1 and W_L are split into an inner factor [r, r] and an orthonormal frame, [d_in, r] or [d_out, r].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

Form = Literal["narrow", "full", "compressed"]
Frames = tuple[torch.Tensor, torch.Tensor]
"""Directions of the input side [d_in, r] and of the output side [d_out, r]."""

OVERSAMPLING = 8
"""Directions beyond the wanted ones that the randomised decomposition looks at."""

HELD = 2**27
"""Bytes of gradients that are summed up at a time, where a window has several micro-batches."""


class DeepLinear(nn.Module):
    """A frozen linear layer with a deep linear update beside it.

    Args:
        base: Anything with `in_features` and `out_features`.
        form: `narrow` has inner width r, `full` min(d_in, d_out); `compressed` keeps a full one's
            trajectory in a subspace of r directions.
        rank: r.
        depth: Factors L, at least two.
        scale: eps, the singular values of every factor at the start.
        seed: Of the random start.
        name: Qualified name of the layer; the start depends on it and the seed alone.
    """

    def __init__(
        self,
        base: nn.Module,
        form: Form,
        rank: int,
        depth: int,
        scale: float,
        seed: int,
        name: str,
    ) -> None:
        super().__init__()
        self.in_features = int(base.in_features)  # type: ignore[arg-type]
        self.out_features = int(base.out_features)  # type: ignore[arg-type]
        self.base = base
        self.form = form
        self.scale = scale
        self.start = (seed, name)
        device = next(base.parameters(), next(base.buffers(), torch.empty(0))).device
        self.factors = nn.ParameterList()
        for place, (rows, columns) in enumerate(self._shapes(rank, depth)):
            random = form != "compressed"
            start = self.orthonormal(rows, columns, place) if random else torch.eye(rows)
            self.factors.append(nn.Parameter((scale * start).to(device)))
        if form == "compressed":
            self.right = nn.Parameter(torch.empty(self.in_features, rank, device=device))
            self.left = nn.Parameter(torch.empty(self.out_features, rank, device=device))
            self.set_subspace(self.random_directions(rank))

    def _shapes(self, rank: int, depth: int) -> list[tuple[int, int]]:
        if self.form == "compressed":
            return [(rank, rank)] * depth
        inner = rank if self.form == "narrow" else min(self.in_features, self.out_features)
        middle = [(inner, inner)] * (depth - 2)
        return [(inner, self.in_features), *middle, (self.out_features, inner)]

    def orthonormal(self, rows: int, columns: int, place: int) -> torch.Tensor:
        """Return a random float32 matrix [rows, columns] with orthonormal rows or columns."""
        seed, name = self.start
        number = hashlib.sha256(f"{seed}:{name}:{place}".encode()).digest()[:8]
        draws = torch.Generator().manual_seed(int.from_bytes(number, "little") >> 1)
        tall = torch.randn(max(rows, columns), min(rows, columns), generator=draws)
        q = torch.linalg.qr(tall).Q
        return q if rows >= columns else q.T.contiguous()

    def full_start(self) -> torch.Tensor:
        """Return Q [d_out, d_in]: the full form's update at the start, divided by eps^L."""
        return self.orthonormal(self.out_features, self.in_features, -1)

    @torch.no_grad()
    def directions(self, gradient: torch.Tensor, generator: torch.Generator) -> Frames:
        """Return what spans the full form's trajectory: [d_in, r] and [d_out, r].

        Args:
            gradient: Of the loss by the update, [d_out, d_in], at the start.
            generator: Of the randomised decomposition.
        """
        u, v = top_directions(gradient, self.right.shape[1] // 2, generator)
        q = self.full_start().to(gradient)
        return torch.cat([v, q.T @ u], dim=1), torch.cat([u, q @ v], dim=1)

    @torch.no_grad()
    def set_subspace(self, directions: Frames) -> None:
        """Make the frames orthonormal, and let the inner factors start as the full form does there.

        Between equally wide sides the start Q turns one frame into the other, and all inner factors
        are eps I. Otherwise the frames are chosen apart, and the factor of the longer side is eps
        left^T Q right: what Q is between them.
        """
        right, left = (torch.linalg.qr(d).Q for d in directions)
        q = self.full_start().to(right)
        square = self.in_features == self.out_features
        left = q @ right if square else left
        self.right.copy_(right)
        self.left.copy_(left)
        between = torch.eye(right.shape[1]).to(right) if square else left.T @ q @ right
        longer = self.factors[-1 if self.out_features >= self.in_features else 0]
        longer.copy_(self.scale * between)

    def random_directions(self, rank: int) -> Frames:
        """Return random directions of the narrower side, and what Q makes of them on the other."""
        q = self.full_start()
        own = self.orthonormal(min(q.shape), rank, -2)
        return (own, q @ own) if self.out_features >= self.in_features else (q.T @ own, own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [*, d_out] for x [*, d_in], in the dtype of the base layer's output."""
        y: torch.Tensor = self.base(x)
        hidden = x.to(self.factors[0].dtype)
        for factor in self.applied(hidden.numel() // self.in_features):
            hidden = F.linear(hidden, factor)
        return (y + hidden).to(y.dtype)

    def applied(self, rows: int) -> list[torch.Tensor]:
        """Return what so many inputs meet one after the other.

        More inputs than the rank make it worth multiplying the inner factors with each other first.
        """
        if self.form != "compressed" or rows <= self.right.shape[1]:
            return self.chain()
        inner, *rest = self.factors
        for factor in rest:
            inner = factor @ inner
        return [self.right.T, inner, self.left]

    def chain(self) -> list[torch.Tensor]:
        """Return the factors in the order they are applied, frames included."""
        inner = list(self.factors)
        return [self.right.T, *inner, self.left] if self.form == "compressed" else inner

    def delta(self) -> torch.Tensor:
        """Return the update as one matrix [d_out, d_in]."""
        product, *rest = self.chain()
        for factor in rest:
            product = factor @ product
        return product

    def extra_repr(self) -> str:
        """Return the sizes that `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, {self.form}, depth={len(self.factors)}"


def deep_layers(model: nn.Module) -> Iterator[tuple[str, DeepLinear]]:
    """Yield `(qualified name, layer)` of every linear with a deep update."""
    for name, module in model.named_modules():
        if isinstance(module, DeepLinear):
            yield name, module


def top_directions(
    matrix: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the leading left and right singular vectors, [m, count] and [n, count].

    Randomised subspace iteration (Halko et al., 2011). Where the matrix has a lower rank, the
    remaining vectors are arbitrary, but orthonormal all the same.
    """
    wanted = min(count + OVERSAMPLING, *matrix.shape)
    sketch = torch.randn(matrix.shape[1], wanted, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(3):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, _, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :count], vh[:count].T


@contextmanager
def weight_gradients(
    layers: Sequence[DeepLinear], use: Callable[[DeepLinear, torch.Tensor], None]
) -> Iterator[None]:
    """Hand over the gradient by each layer's update in the backward passes inside the context.

    The gradient is that of the frozen weight, G = sum_t dy_t x_t^T. It is formed one layer at a
    time, so that never more than one matrix is held, and it needs no gradient of the weight, which
    a packed one could not have.

    Args:
        layers: Whose gradients are asked for.
        use: Called with a layer and its gradient [d_out, d_in] in float32.
    """
    handles = []

    def watch(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(layer, DeepLinear)
        x = inputs[0].detach()

        def take(gradient: torch.Tensor) -> None:
            dy = gradient.flatten(0, -2).float()
            use(layer, dy.T @ x.flatten(0, -2).float())

        output.register_hook(take)

    for layer in layers:
        handles.append(layer.register_forward_hook(watch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def window_gradients(
    layers: Sequence[DeepLinear],
    passes: Sequence[Callable[[], None]],
    use: Callable[[DeepLinear, torch.Tensor], None],
) -> None:
    """Hand over each layer's gradient, summed over the micro-batches of a window.

    With one micro-batch no more than one matrix is held. With several, the passes are made again
    for every run of layers whose sums take `HELD` bytes.

    Args:
        layers: Whose gradients are asked for, the last of the model first.
        passes: Runs a micro-batch forward and backward.
        use: Called with a layer and its gradient [d_out, d_in] in float32.
    """
    for some in _runs(layers, HELD) if len(passes) > 1 else [layers]:
        sums: dict[DeepLinear, torch.Tensor] = {}

        def add(layer: DeepLinear, gradient: torch.Tensor, sums: Any = sums) -> None:
            sums[layer] = sums[layer].add_(gradient) if layer in sums else gradient

        def give(layer: DeepLinear, gradient: torch.Tensor, sums: Any = sums) -> None:
            add(layer, gradient)
            use(layer, sums.pop(layer))

        for number, run in enumerate(passes, 1):
            with weight_gradients(some, give if number == len(passes) else add):
                run()


def _runs(layers: Sequence[DeepLinear], held: int) -> Iterator[list[DeepLinear]]:
    """Yield layers in runs whose float32 gradients take at most `held` bytes, one at the least."""
    run: list[DeepLinear] = []
    for layer in layers:
        if run and 4 * sum(x.in_features * x.out_features for x in (*run, layer)) > held:
            yield run
            run = []
        run.append(layer)
    yield run


def low_rank_pair(
    deltas: Sequence[torch.Tensor], most: int, tolerance: float = 0.0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return factors A [r, d_in] and B [d_out, r] of each update, all of one rank r.

    r is the most singular values above `tolerance` times the largest that any update has, at most
    `most`; an update of a lower rank, or of a layer with a shorter side, is filled up with zeros.
    Computed in float64, the singular values shared out evenly.
    """
    parts = [torch.linalg.svd(delta.double(), full_matrices=False) for delta in deltas]
    ranks = [int((s > tolerance * s[0]).sum()) for _, s, _ in parts]
    rank = max(1, min(most, max(ranks)))
    pairs = []
    for (u, s, vh), own in zip(parts, ranks, strict=True):
        kept = torch.where(torch.arange(len(s), device=s.device) < own, s, 0)[:rank]
        root = kept.sqrt()
        a, b = (root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float()
        missing = rank - len(a)
        pairs.append((F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))))
    return pairs


def spectrum(delta: torch.Tensor) -> list[float]:
    """Return the singular values of an update, largest first."""
    values: list[float] = torch.linalg.svdvals(delta.detach().double()).tolist()
    return values
