"""Which rank each layer of a low-rank cache has, as numbers alone.

With singular values s_1 >= s_2 >= ... of what a layer projects, kappa = s_1 / s_D its condition
number, and layers l = 1 ... L (Zhang et al., LoRC, arXiv 2410.03111):

    log K_l = sum over j >= l of (log kappa(W_k^j) + log kappa(W_v^j))
    t_l     = (max log K - log K_l) / (max log K - min log K)            in [0, 1]
    r_l     = D (1 - t_l (1 - r_min / D))                                `progressive`

An error made in a layer goes through all later ones, which make it the larger the worse they are
conditioned: early layers keep more. Ours: r_min follows from how much is kept in all, no layer has
less than a unit, and ranks are whole units that add up to exactly what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

from effbench.api.latents import PROJECTIONS
from effbench.api.shape import ModelShape
from effbench.util.errors import UserError
from effbench.util.lazy import torch

Order = Literal["progressive", "uniform", "reversed", "error"]
CLAMP = 1e-6
"""Least singular value that counts, as a share of the largest; one direction that is dead would
decide about all layers otherwise."""


class Spectra(NamedTuple):
    """Singular values of every layer's projections, each descending: [L][D]."""

    keys: Sequence[Sequence[float]]
    values: Sequence[Sequence[float]]

    @classmethod
    def of(cls, found: Sequence[Mapping[str, torch.Tensor]]) -> Spectra:
        """Return those of all layers, given the `nn.llama.factorised.bases` of each."""
        return cls(*([own[f"{n}.singular"].tolist() for own in found] for n in PROJECTIONS))

    @classmethod
    def unknown(cls, model: ModelShape) -> Spectra:
        """Return spectra that are alike in all layers: ranks of the same sums follow from them as
        from those of the weights, which are not loaded yet.
        """
        width = model.num_kv_heads * model.head_dim
        alike = [[2.0, *[1.0] * (width - 1)]] * model.num_layers
        return cls(alike, alike)

    def log_conditions(self) -> list[float]:
        """Return log kappa(W_k) + log kappa(W_v) of each layer."""
        return [_log_condition(k) + _log_condition(v) for k, v in zip(*self, strict=True)]


class Sizes(NamedTuple):
    """What ranks have to fit."""

    layers: int
    """How many there are, L."""
    width: int
    """The full rank, D."""
    unit: int
    """What ranks are multiples of; it divides D."""
    protect: int = 0
    """First layers that keep everything."""

    def total(self, kept: float) -> int:
        """Return the sum of all ranks that keeps a share of the cache, rounded down to units."""
        whole = self.layers * self.width // self.unit
        return self.unit * math.floor(kept * whole + 1e-9)


def chosen(
    order: Order, spectra: Spectra, sizes: Sizes, shares: tuple[float, float]
) -> tuple[list[int], list[int]]:
    """Return the ranks that keep shares of all keys and of all values, of each layer.

    Raises:
        UserError: When a share is too small for ranks of at least a unit.
    """
    way = ordered(order, spectra.log_conditions(), sizes.protect)
    least, totals = least_total(way, sizes), [sizes.total(share) for share in shares]
    for name, share, total in zip(("keys", "values"), shares, totals, strict=True):
        if total < least:
            lowest = math.ceil(100 * least / (sizes.layers * sizes.width)) / 100
            raise UserError(
                f"method.kept_{name}={share:g} is less than {order} ranks can keep.",
                f"Keep {lowest:g} or more.",
            )
    if order == "error":
        keys, values = map(equal_errors, spectra, [sizes] * 2, totals)
    else:
        keys, values = (sloped(way, sizes, total) for total in totals)
    return keys, values


def _log_condition(singular: Sequence[float]) -> float:
    return -math.log(max(singular[-1] / singular[0], CLAMP)) if singular[0] > 0 else 0.0


def depths(log_conditions: Sequence[float]) -> list[float]:
    """Return how far each layer is on the way to the least rank, t_l.

    It never falls, from 0 to 1; it is 1 everywhere where all layers are conditioned perfectly or
    there is one alone.
    """
    sums = list(accumulate(reversed(log_conditions)))[::-1]
    spread = sums[0] - sums[-1]
    return [(sums[0] - own) / spread if spread > 0 else 1.0 for own in sums]


def ordered(order: Order, log_conditions: Sequence[float], protect: int) -> list[float]:
    """Return t_l of every layer in one of the orders, 0 in those that are protected."""
    alike = order in ("uniform", "error")
    rest = ([1.0] * len(log_conditions) if alike else depths(log_conditions))[protect:]
    return [0.0] * protect + (rest[::-1] if order == "reversed" else rest)


def sloped(way: Sequence[float], sizes: Sizes, total: int) -> list[int]:
    """Return ranks D - t_l s, s such that they add up to `total`.

    Args:
        way: t_l of every layer.
        sizes: What they fit; no rank is below a unit.
        total: A multiple of the unit, at least `least_total(way, sizes)`.
    """
    slope = _slope(way, sizes, total)
    return whole(_ranks_at(way, sizes, slope), sizes, total)


def least_total(way: Sequence[float], sizes: Sizes) -> int:
    """Return the least sum that ranks can have: a unit wherever t_l > 0."""
    return sum(sizes.unit if t > 0 else sizes.width for t in way)


def _ranks_at(way: Sequence[float], sizes: Sizes, slope: float) -> list[float]:
    return [max(float(sizes.unit), sizes.width - t * slope) for t in way]


def _slope(way: Sequence[float], sizes: Sizes, total: int) -> float:
    """Return s, by halving an interval in which the sum of ranks falls."""
    least = min((t for t in way if t > 0), default=1.0)
    low, high = 0.0, sizes.width / least
    for _ in range(100):
        middle = (low + high) / 2
        over = sum(_ranks_at(way, sizes, middle)) > total
        low, high = (middle, high) if over else (low, middle)
    return high


def whole(ranks: Sequence[float], sizes: Sizes, total: int) -> list[int]:
    """Return ranks in whole units that add up to `total`; those with the most left over gain.

    Where they do not rise from layer to layer, neither do the whole ones.
    """
    units = [math.floor(rank / sizes.unit + 1e-9) for rank in ranks]
    left = [rank / sizes.unit - own for rank, own in zip(ranks, units, strict=True)]
    missing = total // sizes.unit - sum(units)
    room = [i for i, own in enumerate(units) if own * sizes.unit < sizes.width]
    for layer in sorted(room, key=lambda i: -round(left[i], 9))[:missing]:
        units[layer] += 1
    return [own * sizes.unit for own in units]


def tails(singular: Sequence[float], unit: int) -> list[float]:
    """Return the relative error that 0, 1, 2 ... units leave: the root of the share of squares."""
    squares = [s * s for s in singular]
    after = [*accumulate(reversed(squares), initial=0.0)][::-1]
    return [math.sqrt(rest / (after[0] or 1.0)) for rest in after[::unit]]


def equal_errors(spectra: Sequence[Sequence[float]], sizes: Sizes, total: int) -> list[int]:
    """Return the ranks that leave every layer with about the same relative error.

    A unit is kept where what is left without it is largest, so no layer that is not protected has
    an error above that of another one which could have been lower for the same sum. Every layer
    has a unit.
    """
    most, first = sizes.width // sizes.unit, sizes.protect
    errors = [tails(own, sizes.unit)[1:most] for own in spectra[first:]]
    gains = sorted((-error, layer) for layer, own in enumerate(errors) for error in own)
    units = [most] * first + [1] * (sizes.layers - first)
    for _, layer in gains[: total // sizes.unit - sum(units)]:
        units[first + layer] += 1
    return [own * sizes.unit for own in units]
