"""LoRC: a key/value cache of coordinates in few directions, fewer the deeper a layer is.

Zhang et al., LoRC: Low-Rank Compression for LLMs KV Cache with a Progressive Compression Strategy,
2024, arXiv 2410.03111.

For the projections W_k, W_v [D, d] of a layer, D = kv_heads * head_dim, with W = U diag(s) V^T:

    C = U_r^T W = diag(s_r) V_r^T      z = C x,  cached: [r_k] and [r_v] a token and layer
    K = turn(U_k z_k + b_k)            made of all tokens at every step, each turned at its place
    o_h = U_v[g] (sum_s p_s z_s) + b_v[g]      values themselves are not made

Ranks follow from condition numbers (`effbench.nn.decode.ranks`): an error made early goes through
all later layers, so early ones keep more. No data is used unless `whiten` asks for it, and nothing
is trained.

Ours: shares of the cache are set, the least rank follows; ranks are multiples of `multiple` that
add up to the share exactly; s below 1e-6 of the largest counts as that; an artefact has its largest
ranks, of which each point reads the first; U_v is multiplied into W_o on request (`absorb`), which
stays for prompts; a matrix with all directions at every point stays as it is; z is taken from what
the projections give, which costs a token U_k^T and U_v^T. `whiten` takes the directions of W
S^{1/2}, S = sum of x x^T over calibration rows, as ASVD and Palu do. `bits` holds coordinates as
`kv_quant` holds keys and values (Liu et al., arXiv 2402.02750): a range for each coordinate of keys
over a group of tokens, ranges for each token of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Interval

from effbench.api import latents
from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper
from effbench.api.points import Point
from effbench.api.schema import NonNegativeInt, PositiveInt
from effbench.api.shape import LAYERS_DIFFER, AnyShape, ModelShape
from effbench.api.sharing import require_own_states
from effbench.methods.codes import HoldsCodes
from effbench.methods.compresses import Compresses, Part
from effbench.methods.driven import DRIVING, Drives
from effbench.nn.decode import latent_cache, latent_plan, ranks
from effbench.nn.decode.policy import EVERYTHING, CachePolicy
from effbench.nn.llama import factorised, stack, weights
from effbench.nn.quant import calibration as calibrating
from effbench.util.errors import UserError
from effbench.util.lazy import torch

Share = Annotated[float, Interval(gt=0, le=1)]


@dataclass(frozen=True)
class Kept(Point):
    """Shares of the cache of keys and of values that are kept, over all layers."""

    keys: float
    values: float

    @property
    def name(self) -> str:
        """`k<percent>-v<percent>`."""
        return f"k{100 * self.keys:g}-v{100 * self.values:g}"


@dataclass(frozen=True)
class LoRC(HoldsCodes, Drives, Compresses):
    """Factorises the projections of keys and values, and caches what lies between the factors."""

    paper: ClassVar[Paper | None] = Paper(
        "LoRC: Low-Rank Compression for LLMs KV Cache with a Progressive Compression Strategy",
        "",
        "2410.03111",
    )
    produces: ClassVar[str] = "factorised"
    replays: ClassVar[bool] = True
    eval_settings: ClassVar[frozenset[str]] = DRIVING | {"absorb", "bits", "group_size", "recent"}

    kept_keys: tuple[Share, ...] = (0.9, 0.75, 0.6)
    """Shares of the cache of keys that stay, over all layers; an operating point for each. 1 keeps
    keys as they are."""
    kept_values: tuple[Share, ...] | None = None
    """The same of values: one for each share of keys, or one of either for all of the other. Null
    is as many as of keys."""
    order: ranks.Order = "progressive"
    """Which layers keep more: by condition numbers the early ones (`progressive`), the same ranks
    the other way round (`reversed`), all the same (`uniform`), or by a relative error that is the
    same for all (`error`)."""
    protect: NonNegativeInt = 0
    """First layers that keep all."""
    multiple: PositiveInt = 8
    """What ranks are multiples of, or of its largest common divisor with the full rank."""
    whiten: bool = False
    """Whether directions are those of what calibration rows make of the weights."""
    absorb: bool = False
    """Whether U_v is multiplied into the output projection, which is then there twice."""

    def __post_init__(self) -> None:
        counts = {len(self.kept_keys), len(self.kept_values or self.kept_keys)}
        if 0 in counts or len(counts - {1}) > 1:
            raise UserError(
                f"method.kept_keys has {len(self.kept_keys)} shares, method.kept_values "
                f"{len(self.kept_values or ())}.",
                "Give as many of both, or one of one of them.",
            )

    def cache_points(self) -> tuple[Kept, ...]:
        """Return a point for each pair of shares."""
        keys, values = self.kept_keys, self.kept_values or self.kept_keys
        count = max(len(keys), len(values))
        pairs = zip(*(s * count if len(s) == 1 else s for s in (keys, values)), strict=True)
        return tuple(Kept(*pair) for pair in pairs)

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse models whose layers share states or differ, and shares that cannot be met."""
        model = ModelShape.of(shape)
        require_own_states(model, self.name)
        if not model.uniform:
            raise UserError(*LAYERS_DIFFER)
        if self.absorb and min(self.kept_values or self.kept_keys) == 1:
            raise UserError(
                "method.absorb=true has nothing to absorb: values are kept as they are.",
                "Leave it out, or keep fewer: 'method.kept_values=[0.9]'",
            )
        if self.protect >= model.num_layers:
            raise UserError(
                f"method.protect={self.protect} leaves no layer of {model.num_layers}.",
                f"Set method.protect={model.num_layers - 1} or less.",
            )
        self._plan(ranks.Spectra.unknown(model))
        if self.codes:
            unit = math.gcd(self.multiple, model.num_kv_heads * model.head_dim)
            self.codes.require_bytes(math.gcd(unit, model.head_dim))
        return super().resolve(shape)

    def _plan(self, spectra: ranks.Spectra) -> latent_plan.Plan:
        """Return the ranks of every point."""
        layers, width = len(spectra.keys), len(spectra.keys[0])
        sizes = ranks.Sizes(layers, width, math.gcd(self.multiple, width), self.protect)
        shares = {p.name: (p.keys, p.values) for p in self.cache_points()}
        return latent_plan.planned(self.order, spectra, sizes, shares)

    @property
    def calibrates(self) -> bool:
        """Only to whiten."""
        return self.whiten

    def held(self, shape: AnyShape, tokens: int, element: int) -> int:
        """Return the bytes of all directions, and of the rows' activations and a gram matrix."""
        model = ModelShape.of(shape)
        width, wide = model.num_kv_heads * model.head_dim, model.hidden_size
        rows = tokens * wide * element + 4 * wide**2 if self.whiten else 0
        return 2 * 4 * model.num_layers * (width + 1) * width + rows

    def num_parts(self, model: torch.nn.Module, calibration: Sequence[Batch]) -> int:
        """Return the number of blocks."""
        return len(stack.decoder_layers(model))

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Find the directions of one block after the other; factorise when all are known."""
        walk = calibrating.Walk(model, calibration) if self.whiten else None
        found: list[Mapping[str, torch.Tensor]] = []

        def put(stored: Mapping[str, torch.Tensor]) -> None:
            found.append(stored)
            if walk:
                walk.advance()

        for index, block in enumerate(stack.decoder_layers(model)):
            yield Part(f"blocks.{index}", partial(latent_cache.bases_of, block, walk), put)
        latent_cache.hold(model, self._plan(ranks.Spectra.of(found)), found)
        self._absorb(model)

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return both factors of every projection that has some."""
        return dict(factorised.factors(model))

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write factors and ranks."""
        super().save(model, folder)
        config: Any = model.config
        config.latent_plan.write(folder)

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` with the factors of `folder`."""
        latent_cache.hold(model, latent_plan.Plan.read(folder))
        weights.load_tensors(self.artefact_tensors(model), folder / "weights.safetensors")
        self._absorb(model)
        return model

    def _absorb(self, model: torch.nn.Module) -> None:
        if self.absorb:
            factorised.absorb(model)

    def cache_at(self, point: Point) -> CachePolicy:
        """Return a cache of coordinates; what is kept whole is as ever."""
        points = [point] if isinstance(point, Kept) else self.cache_points()
        if max(p.keys for p in points) < 1:
            return latent_cache.LatentCache(point.name, self.codes)
        if max(p.values for p in points) < 1:
            return latent_cache.LatentValues(point.name, self.codes)
        return self.codes or EVERYTHING

    def cached(self, base: ModelShape, point: Point, folder: Path | None) -> ModelShape:
        """Narrow the cache; which layers have which ranks, only an artefact tells."""
        made = folder is not None and (folder / latent_plan.FILE).exists()
        unknown = ranks.Spectra.unknown(base)
        plan = latent_plan.Plan.read(folder) if folder and made else self._plan(unknown)
        own, held = list(plan.at(point.name).by_layer()), list(plan.factors().by_layer())
        model = base.map(lambda i, x: latents.latent_layer(x, own[i], held[i], self.absorb))
        return self.codes.shape(model) if self.codes else model
