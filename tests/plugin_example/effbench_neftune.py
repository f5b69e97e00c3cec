"""NEFTune: LoRA whose token embeddings are disturbed by noise in training.

Jain et al., NEFTune: Noisy Embeddings Improve Instruction Finetuning, ICLR 2024, arXiv 2310.05914.

    e' = e + (noise / sqrt(T d)) * u        e [B, T, d], u uniform on [-1, 1], T tokens of a row

Evaluation sees no noise. Our choice: the noise goes on top of LoRA, not of full fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper
from effbench.api.schema import NonNegativeFloat
from effbench.methods.adapters.lora import LoRA
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Neftune(LoRA):
    """LoRA on noisy embeddings."""

    paper: ClassVar[Paper | None] = Paper(
        "NEFTune: Noisy Embeddings Improve Instruction Finetuning", "ICLR 2024", "2310.05914"
    )

    noise: NonNegativeFloat = 5.0
    """Scale of the noise; 0 is plain LoRA, bit for bit."""

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the loss of one micro-batch whose embeddings are disturbed."""
        if not self.noise:
            return super().loss(model, batch, ctx)
        tokens = batch.attention_mask.sum(1).view(-1, 1, 1)

        def disturb(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            draws = 2 * torch.rand(output.shape, generator=ctx.generator) - 1
            noise = self.noise * draws.to(output.device) / (tokens * output.shape[-1]).sqrt()
            return output + noise.to(output.dtype)

        hook = model.get_input_embeddings().register_forward_hook(disturb)
        try:
            return super().loss(model, batch, ctx)
        finally:
            hook.remove()
