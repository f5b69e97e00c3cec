"""GPTQ: weights rounded column by column, each error made up for by the columns not yet rounded.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
ICLR 2023, arXiv 2210.17323.

For a matrix W [d_out, d_in] with inputs x, H = 2 Σ x x^T + λ I and H^-1 = U^T U, for i = 1 .. d_in:

    q_i = quant(w_i),   e = (w_i - q_i) / U_ii,   w_j = w_j - e U_ij  for all j > i

with columns w_i, the grid of `rtn`, and scales found from the weights as they are when their group
is reached. λ is `percdamp` times the mean of H's diagonal.

Our choices: calibration rows are the first of the train split, whole; in a block each group of
linears with one input is calibrated after those before it are rounded; groups are those of
neighbouring columns with `act_order` too, whose scales are then found at the start; a row for which
plain rounding has the smaller error, d Σ x x^T d^T with d = w - ŵ, keeps the rounded codes; columns
that no input reaches are rounded to the nearest; λ is raised where the matrix is still singular.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from effbench.api.method_types import Paper
from effbench.api.schema import NonNegativeFloat
from effbench.methods.calibrates import CompressesBlocks
from effbench.methods.quant.groups import PacksGroups
from effbench.nn.llama import surgery
from effbench.nn.quant import calibration, groupwise
from effbench.nn.quant import gptq as solver
from effbench.nn.quant.alternating import refuse_not_finite
from effbench.util.lazy import torch


@dataclass(frozen=True)
class GPTQ(PacksGroups, CompressesBlocks):
    """Rounds every decoder weight so that the products with calibration inputs stay."""

    paper: ClassVar[Paper | None] = Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "ICLR 2023",
        "2210.17323",
    )

    percdamp: NonNegativeFloat = 0.01
    """What is added to the Hessian's diagonal, in shares of its mean."""
    act_order: bool = False
    """Columns with the largest inputs first, on scales that are found before."""

    def block_tensors(self, walk: calibration.Walk) -> dict[str, torch.Tensor]:
        """Return the buffers of a block's packed linears."""
        found: dict[str, torch.Tensor] = {}
        with walk.tried() as block:
            for group in walk.groups():
                dense = [cast("torch.nn.Linear", block.get_submodule(name)) for name in group]
                for name, linear in zip(group, dense, strict=True):
                    refuse_not_finite(linear.weight, f"{name} of block {walk.index}")
                stored = self._rounded([linear.weight for linear in dense], walk.inputs(group).gram)
                for name, linear, own in zip(group, dense, stored, strict=True):
                    found |= {f"{name}.{key}": t for key, t in own.items()}
                    if self.propagate:
                        surgery.replace_module(block, name, self.holding(linear, own))
        return found

    def _rounded(
        self, weights: Sequence[torch.Tensor], gram: torch.Tensor
    ) -> list[dict[str, torch.Tensor]]:
        """Return the buffers of linears that read the same inputs: the rows of one problem."""
        weight, grid = torch.cat([w.detach().float() for w in weights]), self.format.settings
        solved = solver.solve(weight, gram, *grid, self.percdamp, self.act_order)
        plain = groupwise.rounded(weight, *grid)
        best = solver.better(solved, plain, weight, self.group_size, gram)
        rows = zip(*(part.split([len(w) for w in weights]) for part in best), strict=True)
        found = (groupwise.Codes(*own) for own in rows)
        packed = (groupwise.packed(own, self.bits, self.symmetric)._asdict() for own in found)
        return [{k: t for k, t in own.items() if t is not None} for own in packed]
