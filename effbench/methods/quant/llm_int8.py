"""LLM.int8(): 8-bit products of weights and activations, with large activations left out of them.

Dettmers, Lewis, Belkada and Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for Transformers
at Scale", NeurIPS 2022, arXiv 2208.07339. For each row w of W [N, K] and each token x [K]:

    w8 = round(127 w / max |w|),   x8 = round(127 x / max |x|)      over the x_h that are below α
    y  = Σ_{|x_h| >= α} x_h ŵ_h + (max |x| max |w| / 127²) Σ_{|x_h| < α} x8_h w8_h,   ŵ ≈ w of w8

Per linear: codes [N, K] int8, scales max |w| [N] float32. Our choices: which x_h are large is said
of each token alone, where the paper takes a whole column out once a token of X is large in it, so
that nothing depends on what else is in a batch; ŵ of those columns is made of the codes, as in the
authors' library (bitsandbytes), and no second copy in 16 bits is kept; sums of integers are exact.
All linears of the decoder blocks are quantised; embeddings, norms and head are not. No data is
used. The memory is saved for real; no time is, since integers are multiplied as floating-point
numbers here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effbench.api.method_types import Paper
from effbench.api.schema import NonNegativeFloat
from effbench.api.shape import Anatomy
from effbench.methods.compresses import CompressesLinears
from effbench.nn.quant.formats.int8 import RowsOfIntegers
from effbench.util.lazy import torch


@dataclass(frozen=True)
class LLMInt8(CompressesLinears):
    """Rounds every decoder weight, and what it is multiplied by, to 8 bits but for outliers."""

    paper: ClassVar[Paper | None] = Paper(
        "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
        "NeurIPS 2022",
        "2208.07339",
    )
    anatomy: ClassVar[Anatomy] = "other"
    produces: ClassVar[str] = "int8"
    eval_settings: ClassVar[frozenset[str]] = frozenset({"threshold"})

    threshold: NonNegativeFloat = 6.0
    """α, size from which on an activation is not rounded; 0 rounds none, and weights alone."""

    @property
    def format(self) -> RowsOfIntegers:
        """What weights become."""
        return RowsOfIntegers(self.threshold)

    def compressed(self, linear: torch.nn.Linear) -> torch.nn.Module:
        """Return a linear of 8-bit integers."""
        return self.format.quantise(linear)
