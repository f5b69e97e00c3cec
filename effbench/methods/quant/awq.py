"""AWQ: channels with large activations are enlarged before their weights are rounded.

Lin et al., AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration, MLSys 2024, arXiv 2306.00978.

Linears that read the same channels get one scale for each channel j, from the mean m_j of |x_j|:

    s = m^α / sqrt(max m^α · min m^α),   W_ij <- quant(W_ij s_j),   x_j <- x_j / s_j

and α, of 0, 1/20 .. 19/20, is that with the least Σ |W x - quant(W s) (x / s)|^2 over the
calibration inputs. The division is part of what makes x: the norm before q, k, v and before gate
and up, the rows of v before o, the rows of up before down. So nothing is added to the model.

Our choices: the error is that of the linears themselves, not of the attention around them; v is
scaled with grouped queries too, where the heads that read one head of values share its scales, from
the mean of their m; no weight is clipped; calibration rows are the first of the train split,
whole; and by `propagate` they come through the blocks as they are rounded. At α = 0 it is `rtn`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

from effbench.api.method_types import Paper
from effbench.api.shape import Anatomy
from effbench.methods.calibrates import CompressesBlocks
from effbench.methods.quant.groups import PacksGroups
from effbench.nn.llama import stack, surgery
from effbench.nn.quant import calibration, groupwise, scaling
from effbench.util.lazy import torch


@dataclass(frozen=True)
class AWQ(PacksGroups, CompressesBlocks):
    """Rounds every decoder weight on scales that follow the activations."""

    paper: ClassVar[Paper | None] = Paper(
        "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration",
        "MLSys 2024",
        "2306.00978",
    )
    anatomy: ClassVar[Anatomy] = "llama"

    def block_tensors(self, walk: calibration.Walk) -> dict[str, torch.Tensor]:
        """Return the buffers of a block's packed linears, and the norms and biases it has then."""
        found: dict[str, torch.Tensor] = {}
        dense: dict[str, Any] = {}
        with walk.tried() as block:
            for fold in scaling.folds(block):
                scaled = self._scaled(walk, fold, dense.get(fold.source))
                for name, module in scaled.items():
                    found |= self._put_tried(block, name, module)
                last = fold.readers[-1]
                dense = {last: scaled[last]}
                del scaled
        return found

    def _scaled(self, walk: calibration.Walk, fold: scaling.Fold, source: Any) -> dict[str, Any]:
        """Return copies of the modules of a fold with the scales in them, by their names.

        Args:
            walk: Before the block.
            fold: One of the block.
            source: The fold's source, if it is one of the linears that were scaled before.
        """
        inputs = walk.inputs(fold.readers)
        source = source or deepcopy(walk.block.get_submodule(fold.source))
        readers = {n: scaling.copied(walk.block.get_submodule(n)) for n in fold.readers}
        self._scale(fold, source, list(readers.values()), inputs)
        return {fold.source: source, **readers}

    def _scale(
        self, fold: scaling.Fold, source: Any, readers: list[Any], inputs: calibration.Inputs
    ) -> None:
        """Find the scales of a fold and put them into its modules, in place."""
        channels, weights = scaling.channels_of(source), [r.weight for r in readers]
        scales, _ = scaling.search(fold, weights, inputs, channels, self._as_rounded)
        scales = scaling.divide(source, scales)
        for reader in readers:
            scaling.multiply(reader, fold.of_readers(scales, reader.in_features))

    def _as_rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight, [d_out, d_in], as its codes give it back."""
        return groupwise.expanded(groupwise.rounded(weight, *self.format.settings), self.group_size)

    def _put_tried(self, block: torch.nn.Module, name: str, module: Any) -> dict[str, torch.Tensor]:
        """Return the tensors of what a module becomes, and put that there if errors propagate."""
        new = self.format.quantise(module) if isinstance(module, torch.nn.Linear) else module
        tensors = {**dict(new.named_buffers()), **dict(new.named_parameters())}
        if self.propagate:
            surgery.replace_module(block, name, new)
        return {f"{name}.{key}": t.detach() for key, t in tensors.items()}

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the buffers of every linear, and the parameters of the blocks beside them."""
        inside = {id(p) for p in stack.decoder_layers(model).parameters()}
        own = {n: p.detach() for n, p in model.named_parameters() if id(p) in inside}
        return {**super().artefact_tensors(model), **own}
